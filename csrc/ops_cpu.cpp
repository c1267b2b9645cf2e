// The `native` ops for CPU tensors: checks, allocation and the GEMM; cpu/ does the rest. Through
// libtorch's stable ABI only. The schemas are in fusedmlp/ops.py.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "checks.h"
#include "common/params.h"

namespace fusedmlp {
namespace {

using torch::stable::contiguous;

void check_call(int failed, const char* op, const char* what) {
    if (failed) throw std::runtime_error(std::string(op) + ": " + what + " failed");
}

// Uninitialised and contiguous, on the CPU.
Tensor empty(const char* op, const int64_t* sizes, int64_t dim, int32_t dtype) {
    constexpr int64_t kMaxDims = 64;
    if (dim > kMaxDims) fail(op, ": input must have at most ", kMaxDims, " dimensions, got ", dim);
    int64_t strides[kMaxDims];
    int64_t stride = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= sizes[i] > 1 ? sizes[i] : 1;
    }
    AtenTensorHandle result = nullptr;
    check_call(
        aoti_torch_empty_strided(
            dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &result
        ),
        op, "allocating the output"
    );
    return Tensor(result);
}

Tensor empty_vector(const char* op, int64_t n, int32_t dtype) { return empty(op, &n, 1, dtype); }

// A 2-D view of memory that `base` keeps alive, without autograd.
Tensor view_2d(const char* op, const View& base, int64_t m, int64_t n, int64_t step_m, int64_t step_n) {
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
    const void* data() const { return View(tensor).data(); }
    Tensor tensor;
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
        int64_t act,
        double alpha,
        int64_t threshold,
        double scale,
        int64_t layer,
        int64_t row_offset
    ) {
        params.dtype = params.bias_dtype = params.slope_dtype = check_tensor(op, "input", like);
        params.rows = rows;
        params.cols = cols;
        params.act = act < 0 || act >= kActCount ? kActCount : int(act);
        params.alpha = float(alpha);
        params.drop = {nullptr, uint64_t(threshold), float(scale), layer, row_offset};
        if (act != params.act) fail(op, ": act must be an id in [0, ", int(kActCount), "), got ", act);
        check_numbers(op, params);
        if (b) {
            const View v(*b);
            check_tensor(op, "bias", v);
            check_bias(op, v, like, cols, b_origin, b_from);
            params.bias_dtype = check_vector(op, "bias", v, like);
            params.bias = data(*b, v, bias);
        }
        if (act == kPrelu) {
            if (!slope)
                fail(op, ": prelu needs slope, a tensor of 1 or N = ", cols, " elements");
            const View v(*slope);
            check_tensor(op, "slope", v);
            check_slope(op, v, cols);
            params.slope_dtype = check_vector(op, "slope", v, like);
            params.slope_size = v.numel;
            params.slope = data(*slope, v, slope_copy);
        }
        if (threshold) {
            if (!state) fail(op, ": state must be an int64 tensor (seed, stream), got None");
            const View v(*state);
            check_state(op, v, like);
            params.drop.state = static_cast<const int64_t*>(v.data());
        }
    }

    static const void* data(const Tensor& t, const View& v, std::optional<Tensor>& copy) {
        if (v.contiguous()) return v.data();
        copy = contiguous(t);
        return View(*copy).data();
    }

    EpilogueParams params{};
    std::optional<Tensor> bias;
    std::optional<Tensor> slope_copy;
};

int parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context
) {
    return torch_parallel_for(begin, end, grain, body, context);
}

// x w^T as (..., N), rounded to x's dtype; plus the bias where one is given.
Tensor matmul(const char* op, const Tensor& x, const View& xv, const View& wv, const Tensor* bias) {
    const int64_t n = wv.sizes[0], k = wv.sizes[1], m = xv.rows();
    std::array<int64_t, 64> sizes;
    if (xv.dim > 64) fail(op, ": input must have at most 64 dimensions, got ", xv.dim);
    std::copy(xv.sizes, xv.sizes + xv.dim, sizes.begin());
    sizes[xv.dim - 1] = n;
    Tensor out = empty(op, sizes.data(), xv.dim, xv.dtype);
    if (m == 0 || n == 0) return out;

    int64_t *xs = nullptr, *ws = nullptr;
    check_call(
        aoti_torch_get_strides(xv.handle, &xs) || aoti_torch_get_strides(wv.handle, &ws), op,
        "reading strides"
    );
    std::optional<Tensor> flat;
    if (xv.dim == 2)
        flat = view_2d(op, xv, m, k, xs[0], xs[1]);
    else if (xv.dim == 1)
        flat = view_2d(op, xv, 1, k, k * xs[0], xs[0]);
    else if (xv.contiguous())
        flat = view_2d(op, xv, m, k, k, 1);
    else
        flat = view_2d(op, View(contiguous(x)), m, k, k, 1);
    const Tensor wt = view_2d(op, wv, k, n, ws[1], ws[0]);
    const Tensor out_2d = view_2d(op, View(out), m, n, n, 1);
    // Straight to the CPU kernels of F.linear: no dispatcher, no autograd.
    check_call(
        bias ? aoti_torch_cpu_addmm_out(out_2d.get(), bias->get(), flat->get(), wt.get(), 1.0, 1.0)
             : aoti_torch_cpu_mm_out(out_2d.get(), flat->get(), wt.get()),
        op, "the matrix product"
    );
    return out;
}

void run_fwd(const char* op, const Tensor& y, const void* x, const EpilogueParams& e) {
    const BiasActDropoutFwdParams p{View(y).data(), x, e};
    check_call(cpu::launch_bias_act_dropout_fwd(p, parallel_for), op, "the CPU kernel");
}

constexpr const char* kLinear = "linear_act";
constexpr const char* kElementwise = "bias_act_dropout";

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
    int64_t layer,
    int64_t row_offset
) {
    const View xv(x), wv(w);
    check_linear(kLinear, xv, wv);
    const Epilogue e(
        kLinear, xv, xv.rows(), wv.sizes[0], b, "weight", wv, slope, state, act, alpha, threshold,
        scale, layer, row_offset
    );
    const bool bare = act == kNone && threshold == 0;
    if (bare && (!b || e.params.bias_dtype == e.params.dtype))
        return matmul(kLinear, x, xv, wv, b ? &*b : nullptr);
    const Tensor y = matmul(kLinear, x, xv, wv, nullptr);
    run_fwd(kLinear, y, View(y).data(), e.params);
    return y;
}

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
    int64_t layer,
    int64_t row_offset
) {
    const View xv(x), wv(w);
    check_linear(kLinear, xv, wv);
    const Epilogue e(
        kLinear, xv, xv.rows(), wv.sizes[0], b, "weight", wv, slope, state, act, alpha, threshold,
        scale, layer, row_offset
    );
    const Tensor h = matmul(kLinear, x, xv, wv, nullptr);
    const View hv(h);
    const Tensor y = empty(kLinear, hv.sizes, hv.dim, hv.dtype);
    run_fwd(kLinear, y, hv.data(), e.params);
    return {y, h};
}

Tensor bias_act_dropout_fwd(
    Tensor x,
    OptionalTensor b,
    OptionalTensor slope,
    OptionalTensor state,
    int64_t act,
    double alpha,
    int64_t threshold,
    double scale,
    int64_t layer,
    int64_t row_offset
) {
    const View xv(x);
    check_tensor(kElementwise, "input", xv);
    if (b && xv.dim == 0)
        fail(kElementwise, ": input must be (..., N) to add a bias, got a 0-D tensor");
    const Epilogue e(
        kElementwise, xv, xv.rows(), xv.last(), b, "input", xv, slope, state, act, alpha, threshold,
        scale, layer, row_offset
    );
    const Tensor y = empty(kElementwise, xv.sizes, xv.dim, xv.dtype);
    if (xv.contiguous())
        run_fwd(kElementwise, y, xv.data(), e.params);
    else
        run_fwd(kElementwise, y, Dense(x).data(), e.params);
    return y;
}

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
    int64_t layer,
    int64_t row_offset,
    int64_t saves,
    bool need_db,
    bool need_dslope
) {
    const char* op = kElementwise;
    const View dyv(dy);
    check_tensor(op, "dy", dyv);
    const Epilogue e(
        op, dyv, dyv.rows(), dyv.last(), b, "input", dyv, slope, state, act, alpha, threshold, scale,
        layer, row_offset
    );
    if (saves < kSavesNothing || saves > kSavesZ)
        fail(op, ": saves must be 0, 1 or 2, got ", saves);
    const bool possible = act == kNone       ? true
                          : saves == kSavesY ? act_has_grad_y(int(act))
                                             : saves == kSavesZ;
    if (!possible)
        fail(op, ": saves must be one that ", kActNames[act], " can be differentiated from, got ", saves);
    if (act == kNone) saves = kSavesNothing;
    if (need_db && !b) fail(op, ": bias must be given where its gradient is asked for, got None");
    if (need_dslope && act != kPrelu)
        fail(op, ": slope must be of prelu where its gradient is asked for, got ", kActNames[act]);

    BiasActDropoutBwdParams p{};
    std::optional<Dense> saved_dense;
    if (saves != kSavesNothing) {
        if (!saved) fail(op, ": saved must be ", dyv.shape(), " like dy, got None");
        const View sv(*saved);
        if (!sv.same_shape(dyv))
            fail(op, ": saved must be ", dyv.shape(), " like dy, got ", sv.shape());
        check_tensor(op, "saved", sv);
        if (sv.dtype != dyv.dtype)
            fail(op, ": saved must be ", dtype_name(dyv.dtype), " like dy, got ", dtype_name(sv.dtype));
        check_same_device(op, "saved", sv, dyv);
        saved_dense.emplace(*saved);
        p.saved = saved_dense->data();
    }
    const Dense dy_dense(dy);
    const Tensor dz = empty(op, dyv.sizes, dyv.dim, dyv.dtype);
    const View bv(need_db ? *b : dy), slv(need_dslope ? *slope : dy);
    const Tensor db = empty_vector(op, need_db ? dyv.last() : 0, bv.dtype);
    const Tensor dslope = need_dslope ? empty(op, slv.sizes, slv.dim, slv.dtype)
                                      : empty_vector(op, 0, dyv.dtype);
    p.dz = View(dz).data();
    p.dy = dy_dense.data();
    p.db = need_db ? View(db).data() : nullptr;
    p.dslope = need_dslope ? View(dslope).data() : nullptr;
    p.saves = int(saves);
    p.e = e.params;
    check_call(cpu::launch_bias_act_dropout_bwd(p, parallel_for), op, "the CPU kernel");
    return {dz, db, dslope};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, CPU, m) {
    m.impl("linear_act_fwd.native", TORCH_BOX(&linear_act_fwd));
    m.impl("linear_act_infer.native", TORCH_BOX(&linear_act_infer));
    m.impl("bias_act_dropout_fwd.native", TORCH_BOX(&bias_act_dropout_fwd));
    m.impl("bias_act_dropout_bwd.native", TORCH_BOX(&bias_act_dropout_bwd));
}

}  // namespace fusedmlp
