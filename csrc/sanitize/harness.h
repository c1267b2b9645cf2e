// What the programs of this folder share: loops over real threads, memory of exact size, and a
// check that a call gives the same bits on any of them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fusedmlp::cpu {

inline thread_local std::mt19937_64 dice;
inline thread_local bool is_inside = false;  // of a loop: one within it runs alone, as torch's do

inline int64_t any(int64_t low, int64_t high) {
    return low + int64_t(dice() % uint64_t(high - low + 1));
}

inline int scattered(
    int64_t begin,
    int64_t end,
    int64_t,
    void (*body)(int64_t, int64_t, void*),
    void* context
) {
    if (is_inside)
        return alone(begin, end, 1, body, context);
    std::vector<int64_t> cuts{begin, end};
    for (int64_t i = any(0, 7); i > 0; --i)
        cuts.push_back(any(begin, end));
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    std::vector<std::pair<int64_t, int64_t>> pieces;
    for (size_t i = 0; i + 1 < cuts.size(); ++i)
        pieces.emplace_back(cuts[i], cuts[i + 1]);
    std::shuffle(pieces.begin(), pieces.end(), dice);
    // Dealt out before the start: a queue would order what threads do, and hide races.
    const size_t threads = size_t(any(2, 5));
    const auto take = [&](size_t thread, uint64_t seed) {
        is_inside = true;
        std::mt19937_64 mine(seed);
        for (size_t i = thread; i < pieces.size(); i += threads) {
            if (mine() % 3 == 0)
                std::this_thread::yield();
            else if (mine() % 3 == 0)
                std::this_thread::sleep_for(std::chrono::microseconds(mine() % 100));
            body(pieces[i].first, pieces[i].second, context);
        }
        is_inside = false;
    };
    std::vector<std::thread> others;
    for (size_t thread = 1; thread < std::min(threads, pieces.size()); ++thread)
        others.emplace_back(take, thread, dice());
    take(0, dice());
    for (std::thread& other : others)
        other.join();
    return 0;
}

// Of the very size that a call asks for, so that AddressSanitizer sees what goes beyond it.
using Floats = std::vector<float>;

inline Floats unwritten(int64_t n) { return Floats(size_t(n), std::nanf("")); }

inline Floats randoms(int64_t n, float scale = 1.0f) {
    Floats v(static_cast<size_t>(n));
    std::normal_distribution<float> normal(0.0f, scale);
    for (float& f : v)
        f = normal(dice);
    return v;
}

inline int64_t calls = 0, wrong = 0;

// What a call leaves, as bytes that must be equal, and as numbers of which none may be NaN.
struct Result {
    std::string bytes;
    bool is_finite = true;

    template <class T>
    void add(const std::vector<T>& v) {
        bytes.append(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T));
        if constexpr (std::is_floating_point_v<T>)
            is_finite &= std::all_of(v.begin(), v.end(), [](T x) { return std::isfinite(x); });
    }
};

using Call = std::function<Result(ParallelFor)>;

inline void check(const std::string& what, int64_t rounds, const Call& call) {
    const Result one = call(alone);
    bool is_equal = true;
    for (int64_t round = 0; round < rounds; ++round)
        is_equal &= call(scattered).bytes == one.bytes;
    ++calls;
    if (is_equal && one.is_finite)
        return;
    ++wrong;
    std::printf(
        "%s, %s: %s\n", isa().name, what.c_str(),
        is_equal ? "memory was read that nobody has written, or a result is not finite"
                 : "on several threads other bits than on one"
    );
}

template <class... Parts>
std::string text(const Parts&... parts) {
    std::string all;
    const auto add = [&](const auto& part) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
            all += std::to_string(part) + " ";
        else
            all += std::string(part) + " ";
    };
    (add(parts), ...);
    return all;
}

// Thresholds of dropout.
constexpr uint64_t kNoneDrops = 0, kSomeDrop = 0x4ccccccd, kAllDrop = uint64_t(1) << 32;

void all_elementwise();
void all_products();
void all_networks(int64_t rounds);

}  // namespace fusedmlp::cpu
