// What ops_common.h asks of a device, for CUDA: the device and stream of the call, torch's
// allocator and GEMM, and the launchers of cuda/. Nothing here waits for the GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <atomic>

#include "bind/checks.h"

#define FUSEDMLP_DISPATCH_KEY CUDA

namespace fusedmlp {

// Major * 10 + minor, asked once a device.
inline int compute_capability(int device) {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];
    const bool kept = device >= 0 && device < kDevices;
    int found = kept ? known[device].load(std::memory_order_relaxed) : 0;
    if (found)
        return found;
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    found = 10 * major + minor;
    if (kept)
        known[device].store(found, std::memory_order_relaxed);
    return found;
}

class Device {
  public:
    Device(const char* op, const View& like) : op_(op), index_(like.device_index) {
        int current = -1;
        if (cudaGetDevice(&current) != cudaSuccess || current != index_)
            check(aoti_torch_create_cuda_guard(index_, &guard_), "choosing the device");
        check(aoti_torch_get_current_cuda_stream(index_, &stream_), "asking for the stream");
        if (like.dtype == aoti_torch_dtype_bfloat16() && compute_capability(index_) < 80)
            throw std::runtime_error(
                std::string(op) +
                ": bfloat16 needs a GPU of compute capability 8.0 or newer, this one has " +
                std::to_string(compute_capability(index_) / 10) + "." +
                std::to_string(compute_capability(index_) % 10) + "; use float16"
            );
    }
    ~Device() {
        if (guard_)
            aoti_torch_delete_cuda_guard(guard_);
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    AtenTensorHandle
    empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
        AtenTensorHandle t = nullptr;
        aoti_torch_empty_strided(
            dim, sizes, strides, dtype, aoti_torch_device_type_cuda(), index_, &t
        );
        return t;
    }
    // Straight to the kernels of torch.mm and torch.addmm: no dispatcher, no autograd.
    int mm(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle w) {
        return aoti_torch_cuda_mm_out(out, x, w);
    }
    int addmm(AtenTensorHandle out, AtenTensorHandle b, AtenTensorHandle x, AtenTensorHandle w) {
        return aoti_torch_cuda_addmm_out(out, b, x, w, 1.0, 1.0);
    }
    int fwd(const BiasActDropoutFwdParams& p) {
        return cuda::launch_bias_act_dropout_fwd(p, stream_);
    }
    int64_t bwd_scratch(const BiasActDropoutBwdParams& p) {
        return cuda::bias_act_dropout_bwd_scratch(p);
    }
    int bwd(const BiasActDropoutBwdParams& p, float* scratch) {
        return cuda::launch_bias_act_dropout_bwd(p, scratch, stream_);
    }
    bool takes(const LinearActParams& p) {
        return compute_capability(index_) >= 80 && cuda::linear_act_takes(p);
    }
    int linear_act(const LinearActParams& p) { return cuda::launch_linear_act(p, stream_); }
    int cross_entropy(const CrossEntropyParams& p) {
        return cuda::launch_cross_entropy(p, stream_);
    }

  private:
    void check(int failed, const char* what) {
        if (failed)
            throw std::runtime_error(std::string(op_) + ": " + what + " failed");
    }

    const char* op_;
    int index_;
    void* stream_ = nullptr;
    CUDAGuardHandle guard_ = nullptr;
};

}  // namespace fusedmlp
