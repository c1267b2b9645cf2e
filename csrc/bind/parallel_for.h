// Loops over threads, as the kernels of cpu/ take them.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/pool.h"

namespace fusedmlp {

// A team of OpenMP threads does not survive a fork: in the child torch would wait for threads that
// are not there.
inline bool is_forked = false;
inline const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

inline int parallel_for(
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*body)(int64_t, int64_t, void*),
    void* context
) {
    if (!is_forked)
        return torch_parallel_for(begin, end, grain, body, context);
    try {
        body(begin, end, context);
        return 0;
    } catch (...) {
        return 1;
    }
}

// The threads of cpu/pool.h, as many as torch has: for training and evaluation, whose steps wait
// for one another so often that a loop must not wait for a thread that has no processor.
inline int pool_parallel_for(
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*body)(int64_t, int64_t, void*),
    void* context
) {
    uint32_t threads = 1;
    torch_get_num_threads(&threads);
    return cpu::pool_for(int(threads), begin, end, grain, body, context);
}

}  // namespace fusedmlp
