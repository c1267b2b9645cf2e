// The elementwise op and the matrix products.
#include "sanitize/harness.h"

#include "cpu/gemm.h"
#include "cpu/plan.h"

namespace fusedmlp::cpu {
namespace {

// --- the elementwise op
// ---------------------------------------------------------------------------

struct Array {
    Array(const Floats& values, Dtype type) : dtype(type) {
        bytes.resize(values.size() * size_of(type));
        if (!values.empty())
            from_float(bytes.data(), values.data(), type, int64_t(values.size()));
    }
    Array(int64_t n, Dtype type) : Array(unwritten(n), type) {}
    Floats floats() const {
        Floats all(bytes.size() / size_of(dtype));
        if (!all.empty())
            to_float(all.data(), bytes.data(), dtype, int64_t(all.size()));
        return all;
    }
    Dtype dtype;
    std::vector<char> bytes;
};

void elementwise(Dtype dtype, int act, uint64_t threshold, int64_t rows, int64_t cols) {
    const bool is_fp16 = dtype == Dtype::kFloat16, few = dice() % 2;
    const int64_t slopes = act != kPrelu ? 0 : few ? 1 : cols, state[2] = {int64_t(dice()), 7};
    const Dtype beside = dice() % 2 ? dtype : Dtype::kFloat32;
    const Array x(randoms(rows * cols), dtype), dy(randoms(rows * cols), dtype),
        bias(randoms(cols), beside), slope(randoms(slopes, 0.1f), beside);
    EpilogueParams e{};
    e.bias = bias.bytes.data(), e.bias_dtype = beside;
    e.slope = slopes ? slope.bytes.data() : nullptr, e.slope_dtype = beside, e.slope_size = slopes;
    e.act = act, e.alpha = 0.01f, e.dtype = dtype, e.rows = rows, e.cols = cols;
    e.drop = {state, threshold, 1.0f / 0.7f, 3, 5};
    const std::string what = text(
        "elementwise", kActNames[act], "dtype", int(dtype), "threshold", threshold, rows, "x", cols
    );
    Array y(rows * cols, dtype);
    check(what + "forward", 1, [&](ParallelFor parallel) {
        y = Array(rows * cols, dtype);
        launch_bias_act_dropout_fwd({y.bytes.data(), x.bytes.data(), e}, parallel);
        Result r;
        r.add(y.floats());
        return r;
    });
    const int saves = act_saves(act, e.alpha, threshold != 0, is_fp16);
    const Array saved = saves == kSavesZ ? x : y;
    check(what + "backward", 1, [&](ParallelFor parallel) {
        Array dz = dy, db(cols, beside), dslope(slopes, beside);  // dz where dy lies
        BiasActDropoutBwdParams p{};
        p.dz = dz.bytes.data(), p.dy = dz.bytes.data(), p.saves = saves, p.e = e;
        p.db = db.bytes.data(), p.dslope = slopes ? dslope.bytes.data() : nullptr;
        p.saved = saves == kSavesNothing ? nullptr : saved.bytes.data();
        launch_bias_act_dropout_bwd(p, parallel);
        Result r;
        for (const Array& a : {dz, db, dslope})
            r.add(a.floats());
        return r;
    });
}

}  // namespace

// Several callers at once, loops of any length one after the other: each index is met once, and a
// body that throws is told to its own caller.
void all_loops() {
    const auto call = [](uint64_t seed, int64_t loops) {
        dice.seed(seed);
        bool is_right = true;
        for (int64_t loop = 0; loop < loops; ++loop) {
            const int64_t begin = any(0, 5), n = any(1, 300), grain = any(1, 20);
            const bool throws = any(0, 9) == 0;
            std::vector<int> met(size_t(n), 0);
            const auto body = [&](int64_t first, int64_t end) {
                for (int64_t i = first; i < end; ++i)
                    ++met[size_t(i - begin)];
                if (throws)
                    throw 1;
            };
            const auto one = [](int64_t first, int64_t end, void* context) {
                (*static_cast<decltype(body)*>(context))(first, end);
            };
            const int failed = pool_for(
                int(any(1, 4)), begin, begin + n, grain, one,
                const_cast<void*>(static_cast<const void*>(&body))
            );
            is_right &= (failed != 0) == throws;
            is_right &= std::all_of(met.begin(), met.end(), [](int times) { return times == 1; });
        }
        return is_right;
    };
    bool other_is_right = false;
    std::thread other([&] { other_is_right = call(1, 2000); });
    const bool is_right = call(2, 2000);
    other.join();
    ++calls;
    if (is_right && other_is_right)
        return;
    ++wrong;
    std::printf("loops of the pool: an index was not met once, or a failure was lost\n");
}

void all_elementwise() {
    const int64_t shapes[][2] = {{1, 1}, {37, 7}, {700, 40}, {90, 300}, {20, 2500}, {5, 0}};
    for (int dtype = 0; dtype < kDtypeCount; ++dtype)
        for (int act = 0; act < kActCount; ++act)
            for (const auto& [rows, cols] : shapes)
                for (const uint64_t threshold : {kNoneDrops, kSomeDrop, kAllDrop})
                    if (threshold != kAllDrop || act == kPrelu)
                        elementwise(Dtype(dtype), act, threshold, rows, cols);
}

namespace {

// --- products
// -------------------------------------------------------------------------------------

void product(
    const GemmKernels& kernels,
    int64_t m,
    int64_t n,
    int64_t k,
    Layout b_is,
    bool a_is_turned
) {
    const Floats a = randoms(m * k), b = randoms(k * n);
    check(
        text("product", kernels.values, m, n, k, int(b_is), int(a_is_turned)), 1,
        [&](ParallelFor parallel) {
            Floats c = unwritten(m * n), scratch = unwritten(gemm_scratch(n, k));
            Gemm g{};
            g.c = c.data(), g.ldc = n;
            g.a = a.data(), g.a_row = a_is_turned ? 1 : k, g.a_col = a_is_turned ? m : 1;
            g.b = b.data(), g.ldb = b_is == Layout::kRows ? n : k, g.b_is = b_is;
            g.m = m, g.n = n, g.k = k, g.scratch = scratch.data();
            g.kernels = &kernels;
            launch_gemm(g, parallel);
            Result r;
            r.add(c);
            return r;
        }
    );
}

}  // namespace

void all_products() {
    const int64_t sizes[][3] = {{1, 1, 1},     {5, 300, 700},  {8, 33, 400},  {40, 17, 20},
                                {150, 90, 90}, {64, 1024, 40}, {33, 1, 2000}, {200, 300, 0}};
    for (const auto& [m, n, k] : sizes)
        for (const Layout b_is : {Layout::kRows, Layout::kAcross})
            for (const bool a_is_turned : {false, true})
                for (const GemmKernels* kernels : {&isa().gemm, gemm_bf16()})
                    if (kernels)
                        product(*kernels, m, n, k, b_is, a_is_turned);
}

}  // namespace fusedmlp::cpu
