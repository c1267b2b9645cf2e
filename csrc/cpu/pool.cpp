// Loops whose pieces go to whichever thread is free. A loop is published as one number: its turn,
// and the first and one past the last of the grains that nobody has taken. A thread takes some by
// changing that number, which succeeds only where it is as the thread has read it. The owner
// returns when all grains are done, so what a thread reads of a loop that has grains left belongs
// to that loop. The owner takes grains from the front and the others from the back: one loop after
// the other over the same memory then gives a thread what it had before, which is in its cache.
#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>

#include <thread>

#ifdef FUSEDMLP_X86
#    include <immintrin.h>
#endif

namespace fusedmlp::cpu {
namespace {

// A little longer than waking a thread that sleeps takes.
constexpr auto kAwake = std::chrono::microseconds(60);
constexpr int64_t kMostGrains = 0xffff;

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

// Returns when `value` is not `old` any more.
void wait_while(const std::atomic<int>& value, int old) {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    for (int i = 1;; ++i) {
        if (value.load(std::memory_order_acquire) != old)
            return;
        if (i % 64 == 0 && std::chrono::steady_clock::now() > until)
            return value.wait(old, std::memory_order_acquire);
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
        failed_.store(0, std::memory_order_relaxed);
        undone_.store(int(grains), std::memory_order_relaxed);
        next_.store(published(++turn_, 0, uint64_t(grains)), std::memory_order_release);
        signal_.fetch_add(1, std::memory_order_release);
        signal_.notify_all();
        take(true);
        for (int undone; (undone = undone_.load(std::memory_order_acquire)) != 0;)
            wait_while(undone_, undone);
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
        for (int seen = 0;;) {
            wait_while(signal_, seen);
            seen = signal_.load(std::memory_order_acquire);
            if (number + 1 < threads_.load(std::memory_order_relaxed))
                take(false);
        }
    }

    // Pieces get smaller towards the end of the loop: threads then end at about the same time.
    void take(bool from_front) {
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
            const uint64_t taken = std::max<uint64_t>(1, (back - front) / (2 * threads));
            const uint64_t rest = from_front ? published(next >> 32, front + taken, back)
                                             : published(next >> 32, front, back - taken);
            if (!next_.compare_exchange_weak(
                    next, rest, std::memory_order_acq_rel, std::memory_order_acquire
                ))
                continue;
            const int64_t first = int64_t(from_front ? front : back - taken) * grain;
            const int64_t end = std::min(n, first + int64_t(taken) * grain);
            try {
                body(begin + first, begin + end, context);
            } catch (...) {
                failed_.store(1, std::memory_order_relaxed);
            }
            if (undone_.fetch_sub(int(taken), std::memory_order_acq_rel) == int(taken))
                undone_.notify_all();
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
