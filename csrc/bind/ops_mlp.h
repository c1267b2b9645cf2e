// mlp: a whole network as one call, forward and backward, out of the ops of ops_common.h. The
// schemas are in fusedmlp/ops.py. Backward of a layer is its epilogue's kernel and two library
// GEMMs.
#pragma once

#include "bind/mlp_lists.h"

namespace fusedmlp {

inline std::vector<MlpLayer> mlp_layers(
    const Tensor& x,
    const Tensors& params,
    const std::vector<int64_t>& ints,
    const std::vector<double>& numbers,
    int64_t row_offset
) {
    const bool is_fp16 = View(x).dtype == aoti_torch_dtype_float16();
    return mlp_layers(params, ints, numbers, row_offset, is_fp16);
}

template <class Device>
Tensor without_elements(Device& device, int32_t dtype) {
    const int64_t none = 0;
    return empty(kMlp, device, &none, 1, dtype);
}

template <class Device>
Tensors mlp_fwd(
    Tensor x,
    Tensors params,
    OptionalTensor state,
    std::vector<int64_t> ints,
    std::vector<double> numbers,
    int64_t row_offset,
    bool keep
) {
    const View xv(x);
    check_tensor(kMlp, "input", xv);
    const std::vector<MlpLayer> layers = mlp_layers(x, params, ints, numbers, row_offset);
    Device device(kMlp, xv);
    Tensors ys, hs;
    Tensor in = x;
    for (const MlpLayer& l : layers) {
        const bool want_h = keep && l.saves == kSavesZ;
        auto [y, h] = linear_act<Device>(kMlp, in, l.w, l.b, l.slope, state, l.n, want_h);
        if (keep)
            ys.push_back(y);
        if (want_h)
            hs.push_back(*h);
        in = y;
    }
    if (!keep)
        return {in};
    ys.insert(ys.end(), hs.begin(), hs.end());
    return ys;
}

// a^T b (where a is (M, N), b (M, K)) or a b (where b is (N, K)), in a new tensor of these sizes.
template <class Device>
Tensor product(
    Device& device,
    const Tensor& a,
    bool a_transposed,
    const Tensor& b,
    const int64_t* sizes,
    int64_t dim
) {
    const View av(a), bv(b);
    const Tensor out = empty(kMlp, device, sizes, dim, av.dtype);
    const View ov(out);
    if (ov.numel == 0)
        return out;
    const Matrix am(kMlp, a, av), bm(kMlp, b, bv);
    const Tensor flat = view_2d(kMlp, ov, ov.rows(), ov.last(), ov.last(), 1);
    const Tensor left = a_transposed ? am.transposed(kMlp) : am.tensor(kMlp);
    const Tensor right = bm.tensor(kMlp);
    check_call(device.mm(flat.get(), left.get(), right.get()), kMlp, "the matrix product");
    return out;
}

// dx, then the gradient of each of the params; without elements where not needed.
template <class Device>
Tensors mlp_bwd(
    Tensor dy,
    Tensor x,
    Tensors params,
    OptionalTensor state,
    Tensors ys,
    Tensors hs,
    std::vector<int64_t> ints,
    std::vector<double> numbers,
    int64_t row_offset,
    std::vector<int64_t> needs,
    bool need_dx
) {
    const View xv(x), dyv(dy);
    check_tensor(kMlp, "input", xv);
    check_tensor(kMlp, "dy", dyv);
    const std::vector<MlpLayer> layers = mlp_layers(x, params, ints, numbers, row_offset);
    const size_t count = layers.size();
    check_mlp_kept(layers, ys, hs, needs);
    const View last(ys.back());
    if (!dyv.same_shape(last) || dyv.dtype != xv.dtype)
        fail(
            kMlp, ": dy must be ", dtype_name(xv.dtype), " ", last.shape(),
            " like the output, got ", dtype_name(dyv.dtype), " ", dyv.shape()
        );
    check_same_device(kMlp, "dy", dyv, xv);

    Device device(kMlp, xv);
    Tensors grads;
    for (size_t i = 0; i <= params.size(); ++i)
        grads.push_back(without_elements(device, xv.dtype));
    size_t first = 0;
    while (!need_dx && first < count && needs[first] == 0)
        ++first;

    size_t at = grads.size(), h = hs.size();  // one past the gradients and the h of the layer
    Tensor d = dy;                            // of the layer's output, then of its pre-activation
    for (size_t i = count; i-- > first;) {
        const MlpLayer& l = layers[i];
        const bool need_b = l.b && (needs[i] & kB);
        const bool need_slope = l.slope && (needs[i] & kSlope);
        const size_t slope_at = l.slope ? --at : 0, b_at = l.b ? --at : 0;
        --at;
        if (l.saves == kSavesZ)
            --h;
        // Without activation, dropout and bias gradient d is what it was.
        if (l.n.act != kNone || l.n.threshold != 0 || need_b) {
            OptionalTensor saved;
            if (l.saves != kSavesNothing)
                saved = l.saves == kSavesY ? ys[i] : hs[h];
            auto [dz, db, dslope] = bias_act_dropout_bwd<Device>(
                d, saved, l.b, l.slope, state, l.n.act, l.n.alpha, l.n.threshold, l.n.scale,
                l.n.stream_offset, l.n.row_offset, l.saves, need_b, need_slope
            );
            d = dz;
            if (need_b)
                grads[b_at] = db;
            if (need_slope)
                grads[slope_at] = dslope;
        }
        const Tensor& in = i ? ys[i - 1] : x;
        const View inv(in), wv(l.w);
        check_linear(kMlp, inv, wv);
        if (inv.rows() != xv.rows() || inv.dim != xv.dim)
            fail(kMlp, ": ys must be the outputs of input ", xv.shape(), ", got ", inv.shape());
        if (needs[i] & kW)
            grads[at] = product(device, d, true, in, wv.sizes, wv.dim);
        if (i > first || need_dx)
            d = product(device, d, false, l.w, inv.sizes, inv.dim);
    }
    if (need_dx)
        grads[0] = d;
    return grads;
}

}  // namespace fusedmlp
