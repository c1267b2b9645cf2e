// Several networks at once: each thread takes one network after the other and runs its steps alone.
// Sums do not depend on threads, so the bits are those of a network that has all of them.
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
    Slots slots;
    Run run;
    std::atomic<size_t> next{0};
    std::atomic<int64_t> slot{0};
    std::atomic<int> failed{0};

    // Networks differ in size and rows: whoever is free takes the next one.
    static void take(int64_t, int64_t, void* context) {
        Queue& q = *static_cast<Queue*>(context);
        const int64_t slot = q.slot++;
        if (slot >= q.slots.count)
            return;
        for (size_t at; (at = q.next++) < q.order.size();) {
            Member& member = q.members[q.order[at]];
            member.steps.work = q.slots.memory + slot * q.slots.floats;
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
        failed |= train_epoch(p, parallel);
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

int evaluate(Member& m, ParallelFor parallel) { return evaluate_rows(m.steps, parallel); }

int launch(std::vector<Member>& members, const Slots& slots, ParallelFor parallel, Run run) {
    if (members.size() == 1) {
        members[0].steps.work = slots.memory;
        return run(members[0], parallel);
    }
    Queue queue{members, longest_first(members), slots, run};
    const int64_t threads = std::min<int64_t>(slots.count, int64_t(members.size()));
    const int failed = parallel(0, threads, 1, Queue::take, &queue);
    return failed | queue.failed;
}

int64_t most_work(const std::vector<Member>& members, int64_t (*work_of)(const StepParams&)) {
    int64_t most = 0;
    for (const Member& m : members)
        if (m.steps.rows)
            most = std::max(most, work_of(m.steps));
    return most;
}

}  // namespace

int64_t train_work(const std::vector<Member>& members) { return most_work(members, epoch_work); }

int64_t evaluate_work(const std::vector<Member>& members) {
    return most_work(members, evaluation_work);
}

int launch_train(std::vector<Member>& members, const Slots& slots, ParallelFor parallel) {
    return launch(members, slots, parallel, train);
}

int launch_evaluate(std::vector<Member>& members, const Slots& slots, ParallelFor parallel) {
    return launch(members, slots, parallel, evaluate);
}

}  // namespace fusedmlp::cpu
