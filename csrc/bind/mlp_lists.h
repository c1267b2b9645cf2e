// The flat lists in which mlp_fwd and mlp_bwd take a whole network, fusedmlp/spec/layers.py: of the
// CPU's ops and of CUDA's.
#pragma once

#include <algorithm>
#include <vector>

#include "bind/ops_common.h"

namespace fusedmlp {

constexpr const char* kMlp = "mlp";

using Tensors = std::vector<Tensor>;

constexpr size_t kMlpInts = 4;    // of a layer: act, threshold, stream offset, which params it has
constexpr size_t kMlpFloats = 2;  // alpha, scale
enum MlpBits : int64_t { kW = 1, kB = 2, kSlope = 4 };

// One layer of the flat lists.
struct MlpLayer {
    Tensor w;
    OptionalTensor b, slope;
    Numbers n;
    int saves;
};

// saves: for fp16 where is_fp16. Whether tensors fit one another is left to the caller.
inline std::vector<MlpLayer> mlp_layers(
    const Tensors& params,
    const std::vector<int64_t>& ints,
    const std::vector<double>& numbers,
    int64_t row_offset,
    bool is_fp16
) {
    const size_t count = ints.size() / kMlpInts;
    size_t tensors = 0;
    bool known = count > 0 && ints.size() == count * kMlpInts;
    for (size_t i = 0; known && i < count; ++i) {
        const int64_t bits = ints[i * kMlpInts + 3];
        known = (bits & kW) && bits >= 0 && bits < 8;
        tensors += 1 + ((bits & kB) != 0) + ((bits & kSlope) != 0);
    }
    if (!known || numbers.size() != count * kMlpFloats || params.size() != tensors)
        fail(
            kMlp, ": ", kMlpInts, " ints, ", kMlpFloats,
            " floats and the tensors that they name must be given for each layer, got ",
            ints.size(), ", ", numbers.size(), " and ", params.size()
        );
    std::vector<MlpLayer> layers;
    layers.reserve(count);
    const Tensor* t = params.data();
    for (size_t i = 0; i < count; ++i) {
        const int64_t* k = ints.data() + i * kMlpInts;
        const double* f = numbers.data() + i * kMlpFloats;
        const Numbers n{k[0], f[0], k[1], f[1], k[2], row_offset};
        if ((k[3] & kSlope) && n.act != kPrelu)
            fail(kMlp, ": a slope must be of prelu, got act ", n.act, " in layer ", i);
        const Tensor w = *t++;
        const OptionalTensor b = k[3] & kB ? OptionalTensor(*t++) : std::nullopt;
        const OptionalTensor slope = k[3] & kSlope ? OptionalTensor(*t++) : std::nullopt;
        // The op itself says what is wrong with another id.
        const int act = n.act < 0 || n.act >= kActCount ? kNone : int(n.act);
        layers.push_back({w, b, slope, n, act_saves(act, n.alpha, n.threshold != 0, is_fp16)});
    }
    return layers;
}

// That backward was given what forward has kept, and a need of each layer.
inline void check_mlp_kept(
    const std::vector<MlpLayer>& layers,
    const Tensors& ys,
    const Tensors& hs,
    const std::vector<int64_t>& needs
) {
    const size_t count = layers.size();
    const size_t of_z = size_t(std::count_if(layers.begin(), layers.end(), [](const auto& l) {
        return l.saves == kSavesZ;
    }));
    if (ys.size() != count || hs.size() != of_z || needs.size() != count)
        fail(
            kMlp, ": ys, hs and needs must have ", count, ", ", of_z, " and ", count,
            " entries, got ", ys.size(), ", ", hs.size(), " and ", needs.size()
        );
}

}  // namespace fusedmlp
