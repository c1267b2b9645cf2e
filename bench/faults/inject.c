// Preloaded into a process whose memory or disk is to run out: counts allocations, or what is done
// to files of one folder, and makes the n-th fail or end the process. bench/faults/inject.py builds
// it and says when.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { kNothing, kMemory, kDisk };
enum { kFails = 1, kStaysFull = 2, kKills = 3 };

static int watched = kNothing, way = kFails;
static long wanted, seen;
static uintptr_t low, high;       // where the code lies whose allocations are counted
static char folder[PATH_MAX];     // with a slash at its end
static size_t folder_length;

// --- what inject.py calls

void faults_memory(long n, uintptr_t from, uintptr_t to) {
    wanted = n, seen = 0, low = from, high = to, way = kFails;
    watched = kMemory;
}

void faults_disk(long n, int how, const char* place) {
    folder_length = strlen(place);
    memcpy(folder, place, folder_length + 1);
    wanted = n, seen = 0, way = how;
    watched = kDisk;
}

long faults_off(void) {
    watched = kNothing;
    return seen;
}

// --- memory

static int fails_here(const void* caller, int anywhere) {
    if (watched != kMemory)
        return 0;
    const uintptr_t at = (uintptr_t)caller;
    if (!anywhere && (at < low || at >= high))
        return 0;
    return __atomic_add_fetch(&seen, 1, __ATOMIC_RELAXED) == wanted;
}

#define NEXT(name) (name##_type) next(#name, &name##_real)

static void* next(const char* name, void** kept) {
    if (!*kept)
        *kept = dlsym(RTLD_NEXT, name);
    return *kept;
}

#define REAL(result, name, ...)                  \
    typedef result (*name##_type)(__VA_ARGS__);  \
    static void* name##_real

// operator new, of one size and with an alignment: a size that nobody has makes the real one throw.
REAL(void*, _Znwm, size_t);
void* _Znwm(size_t size) {
    const int fails = fails_here(__builtin_return_address(0), 0);
    return (NEXT(_Znwm))(fails ? SIZE_MAX / 4 : size);
}

REAL(void*, _ZnwmSt11align_val_t, size_t, size_t);
void* _ZnwmSt11align_val_t(size_t size, size_t alignment) {
    const int fails = fails_here(__builtin_return_address(0), 0);
    return (NEXT(_ZnwmSt11align_val_t))(fails ? SIZE_MAX / 4 : size, alignment);
}

REAL(void*, aligned_alloc, size_t, size_t);
void* aligned_alloc(size_t alignment, size_t size) {
    if (fails_here(__builtin_return_address(0), 0)) {
        errno = ENOMEM;
        return NULL;
    }
    return (NEXT(aligned_alloc))(alignment, size);
}

// Torch's tensors, whoever asked for them.
REAL(int, posix_memalign, void**, size_t, size_t);
int posix_memalign(void** out, size_t alignment, size_t size) {
    if (fails_here(NULL, 1))
        return ENOMEM;
    return (NEXT(posix_memalign))(out, alignment, size);
}

// --- files

static int is_inside(const char* path) {
    char whole[PATH_MAX];
    if (path[0] != '/') {
        if (!getcwd(whole, sizeof whole))
            return 0;
        strncat(whole, "/", sizeof whole - strlen(whole) - 1);
        strncat(whole, path, sizeof whole - strlen(whole) - 1);
        path = whole;
    }
    return strncmp(path, folder, folder_length) == 0;
}

static int is_open_inside(int handle) {
    char link[64] = "/proc/self/fd/", digits[24], path[PATH_MAX];
    int length = 0;
    do
        digits[length++] = (char)('0' + handle % 10);
    while ((handle /= 10) > 0);
    char* end = link + strlen(link);
    while (length)
        *end++ = digits[--length];
    *end = 0;
    const ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return is_inside(path);
}

// Whether this is the one; a process that is to end does so here.
static int is_full(void) {
    const long number = ++seen;
    if (number != wanted && !(way == kStaysFull && number > wanted))
        return 0;
    if (way == kKills)
        kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return 1;
}

REAL(ssize_t, write, int, const void*, size_t);
ssize_t write(int handle, const void* bytes, size_t count) {
    write_type real = NEXT(write);
    if (watched != kDisk || handle < 3 || !is_open_inside(handle))
        return real(handle, bytes, count);
    if (seen + 1 == wanted && count > 1)  // half of it gets there
        real(handle, bytes, count / 2);
    return is_full() ? -1 : real(handle, bytes, count);
}

REAL(int, fsync, int);
int fsync(int handle) {
    if (watched == kDisk && is_open_inside(handle) && is_full())
        return -1;
    return (NEXT(fsync))(handle);
}

REAL(int, rename, const char*, const char*);
int rename(const char* from, const char* to) {
    if (watched == kDisk && is_inside(to) && is_full())
        return -1;
    const int result = (NEXT(rename))(from, to);
    if (watched == kDisk && way == kKills && is_inside(to))
        is_full();  // also right after it
    return result;
}

REAL(int, mkdir, const char*, mode_t);
int mkdir(const char* path, mode_t mode) {
    if (watched == kDisk && is_inside(path) && is_full())
        return -1;
    return (NEXT(mkdir))(path, mode);
}

REAL(int, open64, const char*, int, ...);
int open64(const char* path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (watched == kDisk && flags & O_CREAT && is_inside(path) && is_full())
        return -1;
    return (NEXT(open64))(path, flags, mode);
}
