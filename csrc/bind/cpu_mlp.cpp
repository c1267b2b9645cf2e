// mlp_fwd and mlp_bwd for CPU tensors, fp32: checks, allocation, and pointers for cpu/mlp.cpp. The
// schemas are in fusedmlp/ops.py.
#include <cstring>
#include <vector>

#include "bind/mlp_lists.h"
#include "bind/parallel_for.h"
#include "cpu/mlp.h"

namespace fusedmlp {
namespace {

Tensor fresh(const int64_t* sizes, int64_t dim) {
    int64_t strides[kMaxDims];
    int64_t stride = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= std::max<int64_t>(sizes[i], 1);
    }
    AtenTensorHandle result = nullptr;
    const int32_t dtype = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
    check_call(
        aoti_torch_empty_strided(dim, sizes, strides, dtype, cpu, 0, &result), kMlp,
        "allocating an output"
    );
    return Tensor(result);
}

Tensor fresh(int64_t size) { return fresh(&size, 1); }

Tensor fresh_like(const Tensor& t) {
    const View v(t);
    return fresh(v.sizes, v.dim);
}

float* floats(const Tensor& t) {
    const View v(t);
    return v.numel ? static_cast<float*>(v.data()) : nullptr;
}

// The arguments of both ops, checked; keeps what it copied.
struct Net {
    Net(const Tensor& x,
        const Tensors& params,
        const OptionalTensor& state,
        const std::vector<int64_t>& ints,
        const std::vector<double>& numbers,
        int64_t row_offset)
        : xv(x), dense(x), given(mlp_layers(params, ints, numbers, row_offset, false)) {
        const size_t count = given.size();
        if (check_tensor(kMlp, "input", xv) != Dtype::kFloat32)
            fail(kMlp, ": input must be torch.float32 on the CPU, got ", dtype_name(xv.dtype));
        if (xv.dim == 0 || xv.dim > kMaxDims)
            fail(
                kMlp, ": input must be (..., K) of at most ", kMaxDims, " dimensions, got ", xv.dim
            );
        rows = xv.rows();
        p.x = floats(dense.tensor);
        int64_t width = xv.last();
        p.layers.resize(count);
        weights.reserve(count);
        epilogues.reserve(count);
        for (size_t i = 0; i < count; ++i) {
            const MlpLayer& one = given[i];
            const View wv(one.w);
            check_tensor(kMlp, "weight", wv);
            check_same_device(kMlp, "weight", wv, xv);
            if (wv.dim != 2 || wv.sizes[1] != width)
                fail(
                    kMlp, ": weight must be (N, K) with K = ", width, " in layer ", i, ", got ",
                    wv.shape()
                );
            if (wv.dtype != xv.dtype)
                fail(
                    kMlp, ": weight must be ", dtype_name(xv.dtype), " like input, got ",
                    dtype_name(wv.dtype)
                );
            weights.emplace_back(one.w);
            epilogues.emplace_back(
                kMlp, xv, rows, wv.sizes[0], one.b, "weight", wv, one.slope, state, one.n
            );
            cpu::MlpLayer& l = p.layers[i];
            l.w = floats(weights.back().tensor);
            l.k = width;
            l.e = epilogues.back().params;
            l.saves = one.saves;
            width = wv.sizes[0];
        }
    }

    // (..., N) of layer i
    Tensor output(size_t i) const {
        std::array<int64_t, kMaxDims> sizes;
        std::copy(xv.sizes, xv.sizes + xv.dim, sizes.begin());
        sizes[xv.dim - 1] = p.layers[i].e.cols;
        return fresh(sizes.data(), xv.dim);
    }

    View xv;
    Dense dense;
    std::vector<MlpLayer> given;
    int64_t rows;
    std::vector<Dense> weights;
    std::vector<Epilogue> epilogues;
    cpu::MlpParams p{};
};

Tensors mlp_fwd(
    Tensor x,
    Tensors params,
    OptionalTensor state,
    std::vector<int64_t> ints,
    std::vector<double> numbers,
    int64_t row_offset,
    bool keep
) {
    Net net(x, params, state, ints, numbers, row_offset);
    auto& layers = net.p.layers;
    const size_t count = layers.size();
    Tensors results;
    results.reserve(keep ? 2 * count : 1);
    for (size_t i = keep ? 0 : count - 1; i < count; ++i) {
        results.push_back(net.output(i));
        layers[i].y = floats(results.back());
    }
    for (size_t i = 0; keep && i < count; ++i) {
        if (layers[i].saves != kSavesZ)
            continue;
        results.push_back(net.output(i));
        layers[i].h = floats(results.back());
    }
    if (net.rows == 0)
        return results;
    const Tensor work = fresh(cpu::mlp_fwd_work(net.p));
    net.p.work = floats(work);
    check_kernel(cpu::launch_mlp_fwd(net.p, parallel_for), kMlp);
    return results;
}

// A tensor that the forward has made, as memory of layer i.
float* kept(const char* name, const Tensor& t, const Net& net, size_t i) {
    const View v(t);
    const cpu::MlpLayer& l = net.p.layers[i];
    if (check_tensor(kMlp, name, v) != Dtype::kFloat32 || v.numel != l.e.rows * l.e.cols ||
        !v.contiguous())
        fail(
            kMlp, ": ", name, " ", i, " must be contiguous torch.float32 of ", l.e.rows, " x ",
            l.e.cols, ", got ", dtype_name(v.dtype), " ", v.shape()
        );
    check_same_device(kMlp, name, v, net.xv);
    return floats(t);
}

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
    Net net(x, params, state, ints, numbers, row_offset);
    auto& p = net.p;
    const size_t count = p.layers.size();
    check_mlp_kept(net.given, ys, hs, needs);
    size_t first = 0;
    while (!need_dx && first < count && !needs[first])
        ++first;
    const bool works = net.rows > 0 && first < count;
    Tensors results;
    results.reserve(1 + params.size());
    const auto result = [&](bool wanted, const Tensor& like) {
        results.push_back(wanted ? fresh_like(like) : fresh(0));
        float* at = floats(results.back());
        if (!works && at)
            std::memset(at, 0, size_t(View(results.back()).numel) * sizeof(float));
        return at;
    };
    p.dx = result(need_dx, x);
    for (size_t i = 0; i < count; ++i) {
        cpu::MlpLayer& l = p.layers[i];
        const MlpLayer& one = net.given[i];
        l.dw = result(needs[i] & kW, one.w);
        if (one.b)
            l.db = result(needs[i] & kB, *one.b);
        if (one.slope)
            l.dslope = result(needs[i] & kSlope, *one.slope);
    }
    if (!works)
        return results;
    p.first = first;
    const Tensor* h = hs.data();
    for (size_t i = 0; i < count; ++i) {
        cpu::MlpLayer& l = p.layers[i];
        if (l.saves == kSavesZ) {
            if (i >= first)
                l.h = kept("h", *h, net, i);
            ++h;
        }
        if (i < first)
            continue;
        const bool feeds = i + 1 < count && (needs[i + 1] & kW);
        if (l.saves == kSavesY || feeds)
            l.y = kept("y", ys[i], net, i);
    }
    if (first > 0 && p.layers[first].dw)
        p.layers[first - 1].y = kept("y", ys[first - 1], net, first - 1);
    const View dyv(dy);
    const cpu::MlpLayer& last = p.layers.back();
    check_same_device(kMlp, "dy", dyv, net.xv);
    if (check_tensor(kMlp, "dy", dyv) != Dtype::kFloat32 || dyv.last() != last.e.cols ||
        dyv.rows() != net.rows)
        fail(
            kMlp, ": dy must be torch.float32 of ", net.rows, " x ", last.e.cols, ", got ",
            dtype_name(dyv.dtype), " ", dyv.shape()
        );
    const Dense dy_dense(dy);
    p.dy = floats(dy_dense.tensor);
    const Tensor work = fresh(cpu::mlp_bwd_work(p));
    p.work = floats(work);
    check_kernel(cpu::launch_mlp_bwd(p, parallel_for), kMlp);
    return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedmlp, CPU, m) {
    m.impl("mlp_fwd.native", TORCH_BOX(&mlp_fwd));
    m.impl("mlp_bwd.native", TORCH_BOX(&mlp_bwd));
}

}  // namespace fusedmlp
