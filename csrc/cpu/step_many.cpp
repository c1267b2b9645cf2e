// Several networks at once: each thread takes one network after the other and runs its steps alone.
// Sums do not depend on threads, so the bits are those of launch_steps.
#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"
#include "cpu/step.h"

namespace fusedmlp::cpu {
namespace {

struct Queue {
    std::vector<StepParams>& members;
    float* work;
    int64_t slots;
    int64_t floats;
    std::atomic<size_t> next{0};
    std::atomic<int64_t> slot{0};
    std::atomic<int> failed{0};

    // Networks may have different numbers of rows: whoever is free takes the next one.
    static void take(int64_t, int64_t, void* context) {
        Queue& q = *static_cast<Queue*>(context);
        const int64_t slot = q.slot++;
        if (slot >= q.slots)
            return;
        for (size_t m; (m = q.next++) < q.members.size();) {
            q.members[m].work = q.work + slot * q.floats;
            if (launch_steps(q.members[m], alone))
                q.failed = 1;
        }
    }
};

}  // namespace

int64_t many_work(const std::vector<StepParams>& members) {
    int64_t most = 0;
    for (const StepParams& p : members)
        if (p.rows)
            most = std::max(most, step_work(p));
    return most;
}

int launch_many(
    std::vector<StepParams>& members,
    float* work,
    int64_t slots,
    int64_t floats,
    ParallelFor parallel
) {
    if (members.size() == 1) {
        members[0].work = work;
        return launch_steps(members[0], parallel);
    }
    Queue queue{members, work, slots, floats};
    const int64_t threads = std::min<int64_t>(slots, int64_t(members.size()));
    const int failed = parallel(0, threads, 1, Queue::take, &queue);
    return failed | queue.failed;
}

}  // namespace fusedmlp::cpu
