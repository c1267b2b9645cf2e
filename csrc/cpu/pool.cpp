// Loops whose pieces go to whichever thread is free. A loop is published as one number: its turn,
// and the first and one past the last of the grains that nobody has taken. A thread takes some by
// changing that number, which succeeds only where it is as the thread has read it. The owner
// returns when all grains are done, so what a thread reads of a loop that has grains left belongs
// to that loop. The owner takes grains from the front and the others from the back: one loop after
// the other over the same memory then gives a thread what it had before, which is in its cache.
//
// Beside other programs a thread that loses its processor in the middle of a piece holds up the
// loop. So a worker gives its processor away between two pieces, before its time is up; not while
// the owner loses its own, as then both had better run at the same time.
#include "cpu/pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>

#include <thread>

#include "cpu/scheduling.h"

#ifdef FUSEDMLP_X86
#    include <immintrin.h>
#endif

namespace fusedmlp::cpu {
namespace {

// A little longer than waking a thread that sleeps takes.
constexpr auto kAwake = std::chrono::microseconds(60);
constexpr int64_t kMostGrains = 0xffff;

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
// More than a piece takes: who needs longer has lost the processor meanwhile, or slept.
constexpr auto kPiece = std::chrono::microseconds(1000);
// Less than the time for which a system leaves a thread its processor.
constexpr auto kTurn = std::chrono::microseconds(1000);
// For so long after a loss the owner counts as one that loses its processor.
constexpr auto kContended = std::chrono::milliseconds(20);

// Of a worker: since when it has run without a break, as far as it knows, when it last looked at
// the clock, and when it moved to another processor.
struct Worker {
    Time since, seen, moved;
};

// 32 bits of a turn, 16 of the first grain, 16 of the end.
uint64_t published(uint64_t turn, uint64_t first, uint64_t end) {
    return turn << 32 | first << 16 | end;
}

void relax() {
#ifdef FUSEDMLP_X86
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Returns when `value` is not `old` any more. Awake for a while, and for as long as another thread
// is at a piece that it has begun at `begun`: beside a program that is never idle, a thread that
// has slept gets its processor back when that program's turn ends, and by then the other thread may
// have lost its own.
void wait_while(const std::atomic<int>& value, int old, const std::atomic<Clock::rep>& begun) {
    const auto until = Clock::now() + kAwake;
    for (int i = 1;; ++i) {
        if (value.load(std::memory_order_acquire) != old)
            return;
        if (i % 64 == 0) {
            const Time now = Clock::now();
            const Time piece{Clock::duration(begun.load(std::memory_order_relaxed))};
            if (now > until && now - piece > kPiece)
                return value.wait(old, std::memory_order_acquire);
        }
        relax();
    }
}

class Pool {
  public:
    int
    run(int threads,
        int64_t begin,
        int64_t n,
        int64_t grain,
        void (*body)(int64_t, int64_t, void*),
        void* context) {
        start(threads - 1);
        grain = std::max(grain, ceil_div(n, kMostGrains));
        const int64_t grains = ceil_div(n, grain);
        body_.store(body, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        begin_.store(begin, std::memory_order_relaxed);
        n_.store(n, std::memory_order_relaxed);
        grain_.store(grain, std::memory_order_relaxed);
        threads_.store(threads, std::memory_order_relaxed);
        processor_.store(this_processor(), std::memory_order_relaxed);
        failed_.store(0, std::memory_order_relaxed);
        undone_.store(int(grains), std::memory_order_relaxed);
        next_.store(published(++turn_, 0, uint64_t(grains)), std::memory_order_release);
        signal_.fetch_add(1, std::memory_order_release);
        signal_.notify_all();
        take(nullptr);
        begun_[0].store(0, std::memory_order_relaxed);
        for (int undone; (undone = undone_.load(std::memory_order_acquire)) != 0;)
            wait_while(undone_, undone, begun_[1]);
        return failed_.load(std::memory_order_relaxed);
    }

    std::atomic<bool> is_taken{false};  // by a caller

  private:
    static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

    // Workers live as long as the process. Where the system gives no more, fewer do the work.
    void start(int workers) {
        try {
            for (; workers_ < workers; ++workers_)
                std::thread([this, number = workers_] { work(number); }).detach();
        } catch (const std::exception&) {
        }
    }

    void work(int number) {
        take_short_turns();
        Worker self;
        for (int seen = 0;;) {
            wait_while(signal_, seen, begun_[0]);
            seen = signal_.load(std::memory_order_acquire);
            if (number + 1 >= threads_.load(std::memory_order_relaxed))
                continue;
            leave_owner(self);
            take(&self);
        }
    }

    // Now and then only: moving takes longer than a loop.
    void leave_owner(Worker& self) {
        const int processor = this_processor();
        if (processor != processor_.load(std::memory_order_relaxed))
            return;
        const Time now = Clock::now();
        if (now - self.moved > kTurn) {
            self.moved = now;
            leave(processor);
        }
    }

    // After a piece of the owner.
    void note_loss(Time begin, Time end) {
        if (end - begin > kPiece)
            lost_.store(end.time_since_epoch().count(), std::memory_order_relaxed);
    }

    // After a piece of a worker.
    void pass(Worker& self, Time begin, Time end) {
        if (begin - self.seen > kPiece || end - begin > kPiece)
            self.since = end;
        self.seen = end;
        if (end - self.since <= kTurn)
            return;
        const Time lost{Clock::duration(lost_.load(std::memory_order_relaxed))};
        if (end - lost > kContended)
            sched_yield();
        self.since = self.seen = Clock::now();
    }

    // Pieces get smaller towards the end of the loop: threads then end at about the same time.
    // self: null for the owner
    void take(Worker* self) {
        uint64_t next = next_.load(std::memory_order_acquire);
        for (;;) {
            const uint64_t front = next >> 16 & 0xffff, back = next & 0xffff;
            if (front == back)
                return;
            const int64_t n = n_.load(std::memory_order_relaxed);
            const int64_t grain = grain_.load(std::memory_order_relaxed);
            const uint64_t threads = uint64_t(threads_.load(std::memory_order_relaxed));
            const auto body = body_.load(std::memory_order_relaxed);
            const auto context = context_.load(std::memory_order_relaxed);
            const int64_t begin = begin_.load(std::memory_order_relaxed);
            const uint64_t taken = std::max<uint64_t>(1, (back - front) / (4 * threads));
            const uint64_t rest = self ? published(next >> 32, front, back - taken)
                                       : published(next >> 32, front + taken, back);
            if (!next_.compare_exchange_weak(
                    next, rest, std::memory_order_acq_rel, std::memory_order_acquire
                ))
                continue;
            const int64_t first = int64_t(self ? back - taken : front) * grain;
            const int64_t end = std::min(n, first + int64_t(taken) * grain);
            const Time before = Clock::now();
            begun_[self != nullptr].store(
                before.time_since_epoch().count(), std::memory_order_relaxed
            );
            try {
                body(begin + first, begin + end, context);
            } catch (...) {
                failed_.store(1, std::memory_order_relaxed);
            }
            const Time after = Clock::now();
            if (undone_.fetch_sub(int(taken), std::memory_order_acq_rel) == int(taken))
                undone_.notify_all();
            if (self)
                pass(*self, before, after);
            else
                note_loss(before, after);
            next = next_.load(std::memory_order_acquire);
        }
    }

    std::atomic<uint64_t> next_{0};
    std::atomic<int> undone_{0};  // grains
    std::atomic<int> signal_{0};
    std::atomic<void (*)(int64_t, int64_t, void*)> body_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int64_t> begin_{0};
    std::atomic<int64_t> n_{0};
    std::atomic<int64_t> grain_{1};
    std::atomic<int> threads_{1};
    std::atomic<int> processor_{-1};   // that the owner was on
    std::atomic<Clock::rep> lost_{0};  // when the owner lost it
    // When the owner, or a worker, began a piece; 0: the owner has ended.
    std::atomic<Clock::rep> begun_[2]{};
    std::atomic<int> failed_{0};
    uint64_t turn_ = 0;
    int workers_ = 0;
};

// Never destroyed: its workers may outlive the end of main.
Pool& pool() {
    static Pool* const one = new Pool;
    return *one;
}

// The workers do not survive a fork.
std::atomic<bool> is_forked{false};
const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

}  // namespace

int pool_for(
    int threads,
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*body)(int64_t, int64_t, void*),
    void* context
) {
    if (end <= begin)
        return 0;
    if (threads > 1 && end - begin > grain && !is_forked) {
        Pool& shared = pool();
        if (!shared.is_taken.exchange(true, std::memory_order_acquire)) {
            const int failed = shared.run(threads, begin, end - begin, grain, body, context);
            shared.is_taken.store(false, std::memory_order_release);
            return failed;
        }
    }
    try {
        body(begin, end, context);
        return 0;
    } catch (...) {
        return 1;
    }
}

}  // namespace fusedmlp::cpu
