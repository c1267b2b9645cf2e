// Stands in for the CUDA runtime: what nvcc's host code calls to register and launch kernels is
// handed to two functions of Python's, so that kernel, grid, shared size and parameters are the
// ones that a GPU would get. The signatures are those of the runtime's headers.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Return a cudaError_t. params: a pointer to the kernel's only parameter.
using Launch =
    int (*)(const char* name, unsigned blocks, unsigned threads, size_t shared, void* params);
using Fill = int (*)(void* at, int value, size_t bytes);

Launch launch = nullptr;
Fill fill = nullptr;
cudaError_t last_error = cudaSuccess;

std::map<const void*, std::string>& kernels() {
    static std::map<const void*, std::string> names;
    return names;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configuration;

cudaError_t run(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared) {
    const auto name = kernels().find(kernel);
    if (name == kernels().end() || !launch || grid.y * grid.z * block.y * block.z != 1)
        return last_error = cudaErrorInvalidConfiguration;
    const int failed = launch(name->second.c_str(), grid.x, block.x, shared, args[0]);
    return last_error = static_cast<cudaError_t>(failed);
}

}  // namespace

EXPORT void ptx_machine(Launch launch_, Fill fill_) {
    launch = launch_;
    fill = fill_;
}

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }

void __cudaRegisterFunction(
    void**,
    const char* host_function,
    char*,
    const char* name,
    int,
    uint3*,
    uint3*,
    dim3*,
    dim3*,
    int*
) {
    kernels()[host_function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<void**>(stream) = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host_function));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel,
    dim3 grid,
    dim3 block,
    void** args,
    size_t shared,
    cudaStream_t
) {
    return run(kernel, grid, block, args, shared);
}

// Before CUDA 13.
cudaError_t cudaLaunchKernel(
    const void* function,
    dim3 grid,
    dim3 block,
    void** args,
    size_t shared,
    cudaStream_t
) {
    return run(function, grid, block, args, shared);
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    return last_error = static_cast<cudaError_t>(fill ? fill(at, value, bytes) : cudaErrorUnknown);
}

}  // extern "C"
