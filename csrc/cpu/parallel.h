// Loops over threads.
#pragma once

#include "common/params.h"

namespace fusedmlp::cpu {

// On this thread alone.
inline int
alone(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    body(begin, end, context);
    return 0;
}

// body(begin, end) over [0, n), in pieces of at least `grain`.
template <class Body>
int run(ParallelFor parallel, int64_t n, int64_t grain, const Body& body) {
    if (n <= grain) {
        body(0, n);
        return 0;
    }
    const auto call = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
    };
    return parallel(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fusedmlp::cpu
