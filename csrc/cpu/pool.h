// Threads for whole networks: they wait awake for a short time, then asleep, and whoever is awake
// takes the next piece of a loop, so that a thread whose processor is taken away holds up one piece
// and not the loop.
#pragma once

#include "common/params.h"

namespace fusedmlp::cpu {

// body(begin, end) over [begin, end), in pieces of at least `grain`, on up to `threads` threads,
// the caller among them; alone where another caller has the threads, or in the child of a fork.
// Nonzero when the body has thrown.
int pool_for(
    int threads,
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*body)(int64_t, int64_t, void*),
    void* context
);

}  // namespace fusedmlp::cpu
