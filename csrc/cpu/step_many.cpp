// Several networks at once: each thread takes one network after the other and runs its steps alone.
// Sums do not depend on threads, so the bits are those of launch_steps.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/step.h"

namespace fusedmlp::cpu {
namespace {

using Run = int (*)(Member&, ParallelFor);

struct Queue {
    std::vector<Member>& members;
    std::vector<size_t> order;
    float* work;
    int64_t slots;
    int64_t floats;
    Run run;
    std::atomic<size_t> next{0};
    std::atomic<int64_t> slot{0};
    std::atomic<int> failed{0};

    // Networks differ in size and rows: whoever is free takes the next one.
    static void take(int64_t, int64_t, void* context) {
        Queue& q = *static_cast<Queue*>(context);
        const int64_t slot = q.slot++;
        if (slot >= q.slots)
            return;
        for (size_t at; (at = q.next++) < q.order.size();) {
            Member& member = q.members[q.order[at]];
            member.steps.work = q.work + slot * q.floats;
            if (q.run(member, alone))
                q.failed = 1;
        }
    }
};

double cost(const Member& m) {
    double weights = 0.0;
    for (const StepLayer& l : m.steps.layers)
        weights += double(l.n) * double(l.k);
    return weights * double(m.steps.rows) * double(m.epochs);
}

// The longest first, so that threads end at about the same time.
std::vector<size_t> longest_first(const std::vector<Member>& members) {
    std::vector<size_t> order(members.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return cost(members[a]) > cost(members[b]);
    });
    return order;
}

int train(Member& m, ParallelFor parallel) {
    StepParams& p = m.steps;
    const int64_t steps = ceil_div(p.rows, p.batch);
    int failed = 0;
    for (int64_t epoch = 0; epoch < m.epochs; ++epoch) {
        failed |= launch_steps(p, parallel);
        if (failed || !std::isfinite(p.totals[0]))
            return failed;
        p.order += p.rows;
        p.lr_scale += p.lr_scale ? steps : 0;
        p.first_step += steps;
        p.updates += steps;
        p.totals += 3;
    }
    return failed;
}

int judge(Member& m, ParallelFor parallel) { return launch_judge(m.steps, parallel); }

int launch(
    std::vector<Member>& members,
    float* work,
    int64_t slots,
    int64_t floats,
    ParallelFor parallel,
    Run run
) {
    if (members.size() == 1) {
        members[0].steps.work = work;
        return run(members[0], parallel);
    }
    Queue queue{members, longest_first(members), work, slots, floats, run};
    const int64_t threads = std::min<int64_t>(slots, int64_t(members.size()));
    const int failed = parallel(0, threads, 1, Queue::take, &queue);
    return failed | queue.failed;
}

}  // namespace

int64_t many_work(const std::vector<Member>& members, int64_t (*work_of)(const StepParams&)) {
    int64_t most = 0;
    for (const Member& m : members)
        if (m.steps.rows)
            most = std::max(most, work_of(m.steps));
    return most;
}

int launch_many(
    std::vector<Member>& members,
    float* work,
    int64_t slots,
    int64_t floats,
    ParallelFor parallel
) {
    return launch(members, work, slots, floats, parallel, train);
}

int launch_judge_many(
    std::vector<Member>& members,
    float* work,
    int64_t slots,
    int64_t floats,
    ParallelFor parallel
) {
    return launch(members, work, slots, floats, parallel, judge);
}

}  // namespace fusedmlp::cpu
