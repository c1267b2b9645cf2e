// torch's loop over threads, as the kernels of cpu/ take it. For the binding files.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

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

}  // namespace fusedmlp
