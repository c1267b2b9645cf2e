// The `native` ops for any device: checks, allocation, views, and which kernel or library call does
// what. Through libtorch's stable ABI only; the schemas are in fusedmlp/ops.py. A binding file
// brings a struct Device, made of an op's name and a tensor whose device becomes the current one:
//   empty(dim, sizes, strides, dtype), mm(out, x, w), addmm(out, b, x, w)  torch's
//   fwd(p), bwd_scratch(p) in floats, bwd(p, scratch)                      bias_act_dropout
//   takes(p), linear_act(p)                                                a GEMM kernel of its own
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "bind/checks.h"
#include "common/params.h"

namespace fusedmlp {

using torch::stable::contiguous;

constexpr const char* kLinear = "linear_act";
constexpr const char* kElementwise = "bias_act_dropout";
constexpr int64_t kMaxDims = 64;

inline void check_call(int failed, const char* op, const char* what) {
    if (failed)
        throw std::runtime_error(std::string(op) + ": " + what + " failed");
}

// For launchers, which return a number that says why.
inline void check_kernel(int failed, const char* op) {
    if (failed)
        throw std::runtime_error(
            std::string(op) + ": a native kernel failed with error " + std::to_string(failed)
        );
}

// A 2-D view of memory that `base` keeps alive, without autograd.
inline Tensor
view_2d(const char* op, const View& base, int64_t m, int64_t n, int64_t step_m, int64_t step_n) {
    const int64_t sizes[2] = {m, n}, strides[2] = {step_m, step_n};
    AtenTensorHandle result = nullptr;
    // The offset is added to that of the base.
    check_call(
        aoti_torch__reinterpret_tensor(base.handle, 2, sizes, strides, 0, &result), op,
        "making a view"
    );
    return Tensor(result);
}

// Holds the copy where the tensor is not contiguous.
struct Dense {
    explicit Dense(const Tensor& t) : tensor(View(t).contiguous() ? t : contiguous(t)) {}
    void* data() const { return View(tensor).data(); }
    Tensor tensor;
};

// The numbers of an op, as its schema has them.
struct Numbers {
    int64_t act;
    double alpha;
    int64_t threshold;
    double scale;
    int64_t stream_offset;
    int64_t row_offset;
};

// Arguments that all ops share, checked; keeps what it copied.
struct Epilogue {
    Epilogue(
        const char* op,
        const View& like,
        int64_t rows,
        int64_t cols,
        const OptionalTensor& b,
        const char* b_origin,
        const View& b_from,
        const OptionalTensor& slope,
        const OptionalTensor& state,
        const Numbers& n
    ) {
        params.dtype = params.bias_dtype = params.slope_dtype = check_tensor(op, "input", like);
        params.rows = rows;
        params.cols = cols;
        params.act = n.act < 0 || n.act >= kActCount ? kActCount : int(n.act);
        params.alpha = float(n.alpha);
        params.drop = {
            nullptr, uint64_t(n.threshold), float(n.scale), n.stream_offset, n.row_offset
        };
        if (n.act != params.act)
            fail(op, ": act must be an id in [0, ", int(kActCount), "), got ", n.act);
        check_numbers(op, params);
        if (b) {
            const View v(*b);
            check_tensor(op, "bias", v);
            check_bias(op, v, cols, b_origin, b_from);
            params.bias_dtype = check_vector(op, "bias", v, like);
            params.bias = data(*b, v, bias);
        }
        if (n.act == kPrelu) {
            if (!slope)
                fail(op, ": prelu needs slope, a tensor of 1 or N = ", cols, " elements");
            const View v(*slope);
            check_tensor(op, "slope", v);
            check_slope(op, v, cols);
            params.slope_dtype = check_vector(op, "slope", v, like);
            params.slope_size = v.numel;
            params.slope = data(*slope, v, slope_copy);
        }
        if (n.threshold) {
            if (!state)
                fail(op, ": state must be an int64 tensor (seed, stream), got None");
            const View v(*state);
            check_state(op, v, like);
            params.drop.state = static_cast<const int64_t*>(data(*state, v, state_copy));
        }
    }

    static const void* data(const Tensor& t, const View& v, std::optional<Tensor>& copy) {
        if (v.contiguous())
            return v.data();
        copy = contiguous(t);
        return View(*copy).data();
    }

    EpilogueParams params{};
    std::optional<Tensor> bias;
    std::optional<Tensor> slope_copy;
    std::optional<Tensor> state_copy;
};

// A tensor (..., K) or (N, K) as a matrix: its address and strides, with a copy where it has none.
struct Matrix {
    Matrix(const char* op, const Tensor& t, const View& v) : rows(v.rows()), cols(v.last()) {
        int64_t* strides = nullptr;
        check_call(aoti_torch_get_strides(v.handle, &strides), op, "reading strides");
        if (v.dim == 2) {
            step = strides[0];
            inner = strides[1];
        } else if (v.dim == 1) {
            step = cols * strides[0];
            inner = strides[0];
        } else {
            if (!v.contiguous())
                copy = contiguous(t);
            step = cols;
        }
        view.emplace(copy ? View(*copy) : v);
    }
    Tensor tensor(const char* op) const { return view_2d(op, *view, rows, cols, step, inner); }
    Tensor transposed(const char* op) const { return view_2d(op, *view, cols, rows, inner, step); }

    int64_t rows, cols;
    int64_t step, inner = 1;  // strides
    std::optional<Tensor> copy;
    std::optional<View> view;
};

template <class Device>
Tensor empty(const char* op, Device& device, const int64_t* sizes, int64_t dim, int32_t dtype) {
    if (dim > kMaxDims)
        fail(op, ": input must have at most ", kMaxDims, " dimensions, got ", dim);
    int64_t strides[kMaxDims];
    int64_t stride = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= sizes[i] > 1 ? sizes[i] : 1;
    }
    AtenTensorHandle result = device.empty(dim, sizes, strides, dtype);
    check_call(result == nullptr, op, "allocating the output");
    return Tensor(result);
}

template <class Device>
void run_fwd(const char* op, Device& device, void* y, const void* x, const EpilogueParams& e) {
    check_kernel(device.fwd({y, x, e}), op);
}

// y = drop(act(x w^T + b)), and h = x w^T if it is wanted: by the device's one kernel where that
// takes the call, else by the library's product and one elementwise kernel. x (..., K), w (N, K).
template <class Device>
std::tuple<Tensor, OptionalTensor> linear_act(
    const char* op,
    const Tensor& x,
    const Tensor& w,
    const OptionalTensor& b,
    const OptionalTensor& slope,
    const OptionalTensor& state,
    const Numbers& n,
    bool want_h
) {
    const View xv(x), wv(w);
    check_linear(op, xv, wv);
    const Epilogue e(op, xv, xv.rows(), wv.sizes[0], b, "weight", wv, slope, state, n);
    Device device(op, xv);

    std::array<int64_t, kMaxDims> sizes;
    std::copy(xv.sizes, xv.sizes + std::min(xv.dim, kMaxDims), sizes.begin());
    if (xv.dim <= kMaxDims)
        sizes[xv.dim - 1] = wv.sizes[0];
    Tensor y = empty(op, device, sizes.data(), xv.dim, xv.dtype);
    OptionalTensor h;
    if (want_h)
        h = empty(op, device, sizes.data(), xv.dim, xv.dtype);
    if (e.params.rows == 0 || e.params.cols == 0)
        return {y, h};

    const Matrix xm(op, x, xv), wm(op, w, wv);
    const View yv(y);
    LinearActParams p{};
    p.y = yv.data();
    p.h = h ? View(*h).data() : nullptr;
    p.x = xm.cols ? xm.view->data() : nullptr;
    p.w = xm.cols ? wm.view->data() : nullptr;
    // The step of a single row is never taken.
    p.x_stride = xm.rows == 1 ? 0 : xm.step;
    p.w_stride = wm.rows == 1 ? 0 : wm.step;
    p.k = xm.cols;
    p.e = e.params;
    if (xm.inner == 1 && wm.inner == 1 && device.takes(p)) {
        check_kernel(device.linear_act(p), op);
        return {y, h};
    }
    const bool bare = n.act == kNone && n.threshold == 0 && !h;
    // The library adds the bias for free, and z is then PyTorch's to the bit: near a kink of ReLU
    // the sign of z decides a gradient. h is kept without it.
    const bool add_bias = b && !h && e.params.bias_dtype == e.params.dtype;
    EpilogueParams rest = e.params;
    if (add_bias)
        rest.bias = nullptr;
    const Tensor product = view_2d(op, h ? View(*h) : yv, xm.rows, wm.rows, wm.rows, 1);
    const Tensor left = xm.tensor(op), right = wm.transposed(op);
    check_call(
        add_bias ? device.addmm(product.get(), b->get(), left.get(), right.get())
                 : device.mm(product.get(), left.get(), right.get()),
        op, "the matrix product"
    );
    if (!bare || (b && !add_bias))
        run_fwd(op, device, p.y, h ? p.h : p.y, rest);
    return {y, h};
}

template <class Device>
Tensor linear_act_infer(
    Tensor x,
    Tensor w,
    OptionalTensor b,
    OptionalTensor slope,
    OptionalTensor state,
    int64_t act,
    double alpha,
    int64_t threshold,
    double scale,
    int64_t stream_offset,
    int64_t row_offset
) {
    const Numbers n{act, alpha, threshold, scale, stream_offset, row_offset};
    return std::get<0>(linear_act<Device>(kLinear, x, w, b, slope, state, n, false));
}

template <class Device>
std::tuple<Tensor, Tensor> linear_act_fwd(
    Tensor x,
    Tensor w,
    OptionalTensor b,
    OptionalTensor slope,
    OptionalTensor state,
    int64_t act,
    double alpha,
    int64_t threshold,
    double scale,
    int64_t stream_offset,
    int64_t row_offset
) {
    const Numbers n{act, alpha, threshold, scale, stream_offset, row_offset};
    auto [y, h] = linear_act<Device>(kLinear, x, w, b, slope, state, n, true);
    return {y, *h};
}

template <class Device>
Tensor bias_act_dropout_fwd(
    Tensor x,
    OptionalTensor b,
    OptionalTensor slope,
    OptionalTensor state,
    int64_t act,
    double alpha,
    int64_t threshold,
    double scale,
    int64_t stream_offset,
    int64_t row_offset
) {
    const char* op = kElementwise;
    const View xv(x);
    check_tensor(op, "input", xv);
    if (b && xv.dim == 0)
        fail(op, ": input must be (..., N) to add a bias, got a 0-D tensor");
    const Epilogue e(
        op, xv, xv.rows(), xv.last(), b, "input", xv, slope, state,
        {act, alpha, threshold, scale, stream_offset, row_offset}
    );
    Device device(op, xv);
    const Tensor y = empty(op, device, xv.sizes, xv.dim, xv.dtype);
    if (xv.numel == 0)
        return y;
    const Dense dense(x);
    run_fwd(op, device, View(y).data(), dense.data(), e.params);
    return y;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> bias_act_dropout_bwd(
    Tensor dy,
    OptionalTensor saved,
    OptionalTensor b,
    OptionalTensor slope,
    OptionalTensor state,
    int64_t act,
    double alpha,
    int64_t threshold,
    double scale,
    int64_t stream_offset,
    int64_t row_offset,
    int64_t saves,
    bool need_db,
    bool need_dslope
) {
    const char* op = kElementwise;
    const View dyv(dy);
    check_tensor(op, "dy", dyv);
    const Epilogue e(
        op, dyv, dyv.rows(), dyv.last(), b, "input", dyv, slope, state,
        {act, alpha, threshold, scale, stream_offset, row_offset}
    );
    if (saves < kSavesNothing || saves > kSavesZ)
        fail(op, ": saves must be 0, 1 or 2, got ", saves);
    if (act != kNone && !can_read(int(act), alpha, saves))
        fail(
            op, ": saves must be one that ", kActNames[act], " can be differentiated from, got ",
            saves
        );
    if (act == kNone)
        saves = kSavesNothing;
    if (need_db && !b)
        fail(op, ": bias must be given where its gradient is asked for, got None");
    if (need_dslope && act != kPrelu)
        fail(op, ": slope must be of prelu where its gradient is asked for, got ", kActNames[act]);
    std::optional<Dense> saved_dense;
    if (saves != kSavesNothing) {
        if (!saved)
            fail(op, ": saved must be ", dyv.shape(), " like dy, got None");
        const View sv(*saved);
        if (!sv.same_shape(dyv))
            fail(op, ": saved must be ", dyv.shape(), " like dy, got ", sv.shape());
        check_tensor(op, "saved", sv);
        if (sv.dtype != dyv.dtype)
            fail(
                op, ": saved must be ", dtype_name(dyv.dtype), " like dy, got ",
                dtype_name(sv.dtype)
            );
        check_same_device(op, "saved", sv, dyv);
        saved_dense.emplace(*saved);
    }

    Device device(op, dyv);
    const Dense dy_dense(dy);
    const Tensor dz = empty(op, device, dyv.sizes, dyv.dim, dyv.dtype);
    const View bv(need_db ? *b : dy), slv(need_dslope ? *slope : dy);
    const int64_t none = 0, columns = dyv.last();
    const Tensor db = empty(op, device, need_db ? &columns : &none, 1, bv.dtype);
    const Tensor dslope = need_dslope ? empty(op, device, slv.sizes, slv.dim, slv.dtype)
                                      : empty(op, device, &none, 1, dyv.dtype);
    BiasActDropoutBwdParams p{};
    p.dz = View(dz).data();
    p.dy = dy_dense.data();
    p.saved = saved_dense ? saved_dense->data() : nullptr;
    p.db = need_db ? View(db).data() : nullptr;
    p.dslope = need_dslope ? View(dslope).data() : nullptr;
    p.saves = int(saves);
    p.e = e.params;
    const int64_t floats = device.bwd_scratch(p);
    OptionalTensor scratch;
    if (floats)
        scratch = empty(op, device, &floats, 1, aoti_torch_dtype_float32());
    check_kernel(device.bwd(p, scratch ? static_cast<float*>(View(*scratch).data()) : nullptr), op);
    return {dz, db, dslope};
}

}  // namespace fusedmlp
