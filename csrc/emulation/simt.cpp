// The machine behind emulation/simt.h: fibers, barriers, late copies, checks of memory.
#include "emulation/simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fusedmlp::emulation {

Thread current;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedLimit = 99 * 1024;  // of a block, on the smallest of the newer GPUs
constexpr size_t kMargin = 1024;            // beyond the shared memory that was asked for
constexpr unsigned char kPoison = 0xFF;     // NaN in each dtype

enum class Order : int { kForward, kBackward, kShuffled };

struct Range {
    uintptr_t begin, end;
    bool writable;
};

struct Copy {
    void* to;
    const void* from;
    int bytes, width;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Barrier waits = Barrier::kNone;
    bool done = false;
    int collectives = 0;
    alignas(16) char handed_in[2][kExchangeBytes];
    std::vector<Copy> open;                 // copies not committed yet
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// Of all launches; set by tests.
Order order = Order::kForward;
bool late_copies = true;
std::vector<Range> ranges;  // when empty, memory is not checked

int error = 0;
int64_t launches = 0;
std::vector<Fiber> fibers;
std::vector<char> shared_bytes;
size_t running = 0;  // index of the fiber that runs
ucontext_t scheduler;
const std::function<void()>* body = nullptr;

void fail(int code, const char* what) {
    if (!error)
        std::fprintf(
            stderr, "emulation: %s (block %u, thread %u)\n", what, current.block, current.thread
        );
    error = error ? error : code;
}

void finish_copy(const Copy& c) {
    std::memcpy(c.to, c.from, size_t(c.bytes));
    std::memset(static_cast<char*>(c.to) + c.bytes, 0, size_t(c.width - c.bytes));
}

void enter() {
    (*body)();
    fibers[running].done = true;
}

void resume(size_t i) {
    running = i;
    current.thread = uint32_t(i);
    swapcontext(&scheduler, &fibers[i].context);
}

// Lets threads [begin, end) go on if all of them wait at the same barrier.
bool release(size_t begin, size_t end, Barrier kind) {
    for (size_t i = begin; i < end; ++i)
        if (fibers[i].done || fibers[i].waits != kind)
            return false;
    for (size_t i = begin; i < end; ++i)
        fibers[i].waits = Barrier::kNone;
    return true;
}

void run_block(size_t threads, std::mt19937& random) {
    std::vector<size_t> turn(threads);
    for (size_t i = 0; i < threads; ++i) {
        turn[i] = order == Order::kBackward ? threads - 1 - i : i;
        Fiber& f = fibers[i];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStackBytes;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, enter, 0);
        f.waits = Barrier::kNone;
        f.done = false;
        f.collectives = 0;
        f.open.clear();
        f.groups.clear();
    }
    const auto run_ready = [&](size_t begin, size_t end) {
        bool moved = false;
        for (size_t t = begin; t < end; ++t) {
            const size_t i = turn[t];
            if (fibers[i].done || fibers[i].waits != Barrier::kNone)
                continue;
            resume(i);
            moved = true;
        }
        return moved;
    };
    for (;;) {
        bool moved = false;
        if (order == Order::kShuffled) {
            // All warps at about the same pace, their threads mixed.
            std::shuffle(turn.begin(), turn.end(), random);
            moved = run_ready(0, threads);
            for (size_t begin = 0; begin < threads; begin += 32)
                moved |= release(begin, begin + 32, Barrier::kWarp);
        } else {
            // Each warp as far ahead of the next one as the barriers of the block let it.
            for (size_t begin = 0; begin < threads; begin += 32) {
                const size_t first = turn[begin] / 32 * 32;
                while (run_ready(begin, begin + 32)) {
                    moved = true;
                    release(first, first + 32, Barrier::kWarp);
                }
            }
        }
        moved |= release(0, threads, Barrier::kBlock);
        if (!moved)
            break;
    }
    for (size_t i = 0; i < threads; ++i) {
        if (!fibers[i].done)
            fail(kLaunchFailure, "threads wait at a barrier that others do not reach");
        if (!fibers[i].open.empty() || !fibers[i].groups.empty())
            fail(kLaunchFailure, "a thread ended with asynchronous copies under way");
    }
}

}  // namespace

void wait(Barrier kind) {
    Fiber& f = fibers[running];
    f.waits = kind;
    swapcontext(&f.context, &scheduler);
}

Exchange exchange(const void* mine, size_t bytes) {
    const size_t self = running, first = self / 32 * 32;
    Fiber& f = fibers[self];
    // Two places in turn: nobody can be two collectives ahead of a thread of its warp.
    const int place = f.collectives++ & 1;
    std::memcpy(f.handed_in[place], mine, bytes);
    wait(Barrier::kWarp);
    Exchange all;
    for (size_t lane = 0; lane < 32; ++lane) {
        const Fiber& other = fibers[first + lane];
        if (other.collectives != f.collectives && other.collectives != f.collectives + 1)
            fail(kLaunchFailure, "the threads of a warp are at different collectives");
        all.lane[lane] = other.handed_in[place];
    }
    return all;
}

void check_alignment(const void* at, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(at) % alignment)
        fail(kMisaligned, "an access is not aligned to its width");
}

bool allowed(const void* at, size_t bytes, size_t alignment, bool write) {
    const auto begin = reinterpret_cast<uintptr_t>(at);
    check_alignment(at, alignment);
    if (ranges.empty())
        return true;
    for (const Range& r : ranges)
        if (begin >= r.begin && begin + bytes <= r.end && (r.writable || !write))
            return true;
    fail(
        kIllegalAddress,
        write ? "a write outside of every output" : "a read outside of every tensor"
    );
    return false;
}

char* shared() { return shared_bytes.data(); }

void copy_async(void* to, const void* from, int bytes, int width) {
    const auto at = static_cast<char*>(to);
    if (at < shared() || at + width > shared() + shared_bytes.size() - kMargin)
        return fail(kIllegalAddress, "an asynchronous copy leaves shared memory");
    check_alignment(to, size_t(width));
    check_alignment(from, size_t(width));
    if (bytes && !allowed(from, size_t(bytes), 1, false))
        return;
    const Copy c{to, from, bytes, width};
    if (!late_copies)
        finish_copy(c);
    fibers[running].open.push_back(c);
}

void copy_async_commit() {
    Fiber& f = fibers[running];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}

void copy_async_wait(int groups_left) {
    Fiber& f = fibers[running];
    while (f.groups.size() > size_t(groups_left)) {
        if (late_copies)
            for (const Copy& c : f.groups.front())
                finish_copy(c);
        f.groups.erase(f.groups.begin());
    }
}

int run(const std::function<void()>& kernel, int64_t blocks, int threads, size_t bytes) {
    error = 0;
    ++launches;
    if (blocks <= 0 || blocks > INT32_MAX || threads <= 0 || threads > 1024 || threads % 32 ||
        bytes > kSharedLimit)
        return 9;  // cudaErrorInvalidConfiguration
    if (fibers.size() < size_t(threads))
        fibers = std::vector<Fiber>(size_t(threads));
    shared_bytes.resize(bytes + kMargin);
    std::mt19937 random(1);
    body = &kernel;
    for (int64_t block = 0; block < blocks && !error; ++block) {
        current = {0, uint32_t(block), uint32_t(blocks)};
        std::fill(shared_bytes.begin(), shared_bytes.end(), char(kPoison));
        run_block(size_t(threads), random);
        for (size_t i = bytes; i < shared_bytes.size(); ++i)
            if (static_cast<unsigned char>(shared_bytes[i]) != kPoison)
                fail(kIllegalAddress, "a write beyond shared memory");
    }
    return error;
}

}  // namespace fusedmlp::emulation

// order: 0 one warp after the other, 1 the same backwards, 2 shuffled between barriers. late:
// copies land as late as they may, else at once.
EXPORT void fusedmlp_emulation_set(int order, int late) {
    fusedmlp::emulation::order = static_cast<fusedmlp::emulation::Order>(order);
    fusedmlp::emulation::late_copies = late != 0;
}

// Names memory that kernels may use; null forgets all of it.
EXPORT void fusedmlp_emulation_memory(const void* at, int64_t bytes, int writable) {
    if (!at)
        return fusedmlp::emulation::ranges.clear();
    const auto begin = reinterpret_cast<uintptr_t>(at);
    fusedmlp::emulation::ranges.push_back({begin, begin + uintptr_t(bytes), writable != 0});
}

EXPORT int64_t fusedmlp_emulation_launches() { return fusedmlp::emulation::launches; }
