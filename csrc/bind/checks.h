// Argument checks of the ops, for calls that go to them directly: the wording of
// fusedmlp/spec/checks.py. A RuntimeError in Python, as is all that an op throws but want of
// memory. For the binding files.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/params.h"

namespace fusedmlp {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

// The facts about a tensor that checks and kernels need, fetched once.
struct View {
    explicit View(const Tensor& t) : handle(t.get()) {
        int failed = aoti_torch_get_dtype(handle, &dtype) |
                     aoti_torch_get_device_type(handle, &device_type) |
                     aoti_torch_get_layout(handle, &layout) | aoti_torch_get_dim(handle, &dim);
        if (failed)
            fail("fusedmlp: could not read a tensor argument");
        if (layout != aoti_torch_layout_strided())
            return;
        failed = aoti_torch_get_sizes(handle, &sizes) | aoti_torch_get_numel(handle, &numel) |
                 aoti_torch_get_device_index(handle, &device_index);
        if (failed)
            fail("fusedmlp: could not read a tensor argument");
    }

    int64_t last() const { return dim ? sizes[dim - 1] : 1; }
    // Flattened leading dimensions; a 0-D or 1-D tensor is one row.
    int64_t rows() const {
        int64_t n = 1;
        for (int64_t i = 0; i + 1 < dim; ++i)
            n *= sizes[i];
        return n;
    }
    bool contiguous() const {
        bool is = false;
        return aoti_torch_is_contiguous(handle, &is) == 0 && is;
    }
    void* data() const {
        void* at = nullptr;
        if (aoti_torch_get_data_ptr(handle, &at))
            fail("fusedmlp: a tensor argument has no memory");
        return at;
    }
    bool same_shape(const View& other) const {
        if (dim != other.dim)
            return false;
        for (int64_t i = 0; i < dim; ++i)
            if (sizes[i] != other.sizes[i])
                return false;
        return true;
    }
    std::string shape() const {
        std::ostringstream text;
        text << "(";
        for (int64_t i = 0; i < dim; ++i)
            text << (i ? ", " : "") << sizes[i];
        text << (dim == 1 ? ",)" : ")");
        return text.str();
    }

    AtenTensorHandle handle;
    int32_t dtype = 0;
    int32_t device_type = 0;
    int32_t device_index = 0;
    int32_t layout = 0;
    int64_t dim = 0;
    int64_t numel = 0;
    int64_t* sizes = nullptr;
};

inline std::string dtype_name(int32_t dtype) {
    const std::pair<int32_t, const char*> names[] = {
        {aoti_torch_dtype_float32(), "torch.float32"},
        {aoti_torch_dtype_float16(), "torch.float16"},
        {aoti_torch_dtype_bfloat16(), "torch.bfloat16"},
        {aoti_torch_dtype_float64(), "torch.float64"},
        {aoti_torch_dtype_int64(), "torch.int64"},
        {aoti_torch_dtype_int32(), "torch.int32"},
        {aoti_torch_dtype_uint8(), "torch.uint8"},
        {aoti_torch_dtype_bool(), "torch.bool"},
        {aoti_torch_dtype_complex64(), "torch.complex64"},
    };
    for (const auto& [code, name] : names)
        if (code == dtype)
            return name;
    return "dtype " + std::to_string(dtype);
}

inline std::string device_name(const View& v) {
    if (v.device_type == aoti_torch_device_type_cpu())
        return "cpu";
    const bool cuda = v.device_type == aoti_torch_device_type_cuda();
    return (cuda ? "cuda:" : "device:") + std::to_string(v.device_index);
}

// A dense tensor of a dtype that the kernels take.
inline Dtype check_tensor(const char* op, const char* name, const View& v) {
    if (v.layout != aoti_torch_layout_strided())
        fail(op, ": ", name, " must be a dense (strided) tensor, got another layout");
    if (v.dtype == aoti_torch_dtype_float32())
        return Dtype::kFloat32;
    if (v.dtype == aoti_torch_dtype_float16())
        return Dtype::kFloat16;
    if (v.dtype == aoti_torch_dtype_bfloat16())
        return Dtype::kBFloat16;
    fail(op, ": ", name, " must be one of float32, float16, bfloat16, got ", dtype_name(v.dtype));
}

inline void check_same_device(const char* op, const char* name, const View& v, const View& like) {
    if (v.device_type != like.device_type || v.device_index != like.device_index)
        fail(
            op, ": ", name, " must be on ", device_name(like), " like input, got ", device_name(v)
        );
}

// Bias and slope may be fp32 beside 16-bit inputs.
inline Dtype check_vector(const char* op, const char* name, const View& v, const View& like) {
    check_same_device(op, name, v, like);
    const Dtype dtype = check_tensor(op, name, v);
    if (v.dtype != like.dtype && dtype != Dtype::kFloat32)
        fail(
            op, ": ", name, " must be ", dtype_name(like.dtype),
            " or torch.float32 beside an input of ", dtype_name(like.dtype), ", got ",
            dtype_name(v.dtype)
        );
    return dtype;
}

inline void
check_bias(const char* op, const View& b, int64_t cols, const char* origin, const View& from) {
    if (b.dim != 1 || b.sizes[0] != cols)
        fail(
            op, ": bias must be (N,) with N = ", cols, " to match ", origin, " ", from.shape(),
            ", got ", b.shape()
        );
}

inline void check_slope(const char* op, const View& s, int64_t cols) {
    if (s.dim > 1 || (s.numel != 1 && s.numel != cols))
        fail(op, ": slope must have 1 or N = ", cols, " elements for prelu, got ", s.shape());
}

inline void check_state(const char* op, const View& s, const View& like) {
    if (s.layout != aoti_torch_layout_strided())
        fail(op, ": state must be a dense (strided) tensor, got another layout");
    if (s.dtype != aoti_torch_dtype_int64() || s.dim != 1 || s.sizes[0] != 2)
        fail(
            op, ": state must be an int64 tensor (seed, stream) of shape (2,), got ",
            dtype_name(s.dtype), " ", s.shape()
        );
    if (s.device_type != like.device_type || s.device_index != like.device_index)
        fail(op, ": state must be on ", device_name(like), " like input, got ", device_name(s));
}

inline void check_linear(const char* op, const View& x, const View& w) {
    check_tensor(op, "input", x);
    check_tensor(op, "weight", w);
    if (x.dim == 0)
        fail(op, ": input must be (..., K), got a 0-D tensor");
    if (w.dim != 2 || w.sizes[1] != x.last())
        fail(
            op, ": weight must be (N, K) with K = ", x.last(), " to match input ", x.shape(),
            ", got ", w.shape()
        );
    if (w.dtype != x.dtype)
        fail(
            op, ": weight must be ", dtype_name(x.dtype), " like input, got ", dtype_name(w.dtype)
        );
    check_same_device(op, "weight", w, x);
}

// activations.can_read: whether backward of an activation other than `none` can do with what is
// saved.
constexpr bool can_read(int act, double alpha, int64_t saves) {
    const bool is_ambiguous = act == kLeakyRelu && !(alpha >= 0);
    return saves == kSavesY ? act_has_grad_y(act) && !is_ambiguous : saves == kSavesZ;
}

// The numbers of an epilogue; the rows and columns are set by the caller before.
inline void check_numbers(const char* op, const EpilogueParams& e) {
    constexpr int64_t two32 = int64_t(1) << 32;
    if (e.act < 0 || e.act >= kActCount)
        fail(op, ": act must be an id in [0, ", int(kActCount), "), got ", e.act);
    if (!std::isfinite(e.drop.scale))
        fail(op, ": scale must be finite, got ", e.drop.scale);
    if (e.drop.threshold > uint64_t(two32))
        fail(op, ": threshold must be in [0, 2^32], got ", int64_t(e.drop.threshold));
    if (e.drop.threshold == 0)
        return;
    if (e.drop.row_offset < 0)
        fail(op, ": row_offset must be >= 0, got ", e.drop.row_offset);
    if (e.rows > two32 - e.drop.row_offset)
        fail(
            op, ": rows + row_offset must be at most 2^32 for dropout, got ", e.rows, " + ",
            e.drop.row_offset
        );
    if (e.cols > 8 * two32)
        fail(op, ": columns must be at most 2^35 for dropout, got ", e.cols);
}

}  // namespace fusedmlp
