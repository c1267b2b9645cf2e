// What a thread of the pool asks of the system, so that two threads share the processors with other
// programs as well as one does. Requests only: where the system refuses or lacks one, the thread
// goes on as it is.
#pragma once

#include <cstdint>

#ifdef __linux__
#    include <sched.h>
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

namespace fusedmlp::cpu {

// That this thread runs on, or -1.
inline int this_processor() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

// Moves this thread from a processor to another that it may run on. The system leaves two threads
// together on one processor where another program keeps the other one busy: they take turns there,
// and are no faster than one.
inline void leave(int processor) {
#ifdef __linux__
    cpu_set_t allowed;
    if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    cpu_set_t others = allowed;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) > 0 && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
#else
    (void)processor;
#endif
}

// Asks to run for a short time, often (Linux 6.12): a thread that wakes then need not wait until
// the other program's time is up, and works while the thread that woke it does. Its share of the
// processor stays what it is.
inline void take_short_turns() {
#ifdef SYS_sched_setattr
    // struct sched_attr of the kernel, whose header clashes with sched.h
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;  // ns
    } attr{};
    if (syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0) || attr.policy != SCHED_OTHER)
        return;
    attr.runtime = 200'000;
    syscall(SYS_sched_setattr, 0, &attr, 0);
#endif
}

}  // namespace fusedmlp::cpu
