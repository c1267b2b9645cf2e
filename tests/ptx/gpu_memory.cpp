// Memory of a GPU for ctypes, where torch is not there (harness.py). All return a cudaError_t.
#include <cuda_runtime_api.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int gpu_new(void** at, size_t bytes) { return cudaMalloc(at, bytes); }

// Either way; waits for the launches before it.
EXPORT int gpu_copy(void* to, const void* from, size_t bytes) {
    return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}

EXPORT int gpu_delete(void* at) { return cudaFree(at); }
