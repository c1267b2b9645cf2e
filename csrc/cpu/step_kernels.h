// The row kernels of the training step.
#pragma once

#include "common/params.h"

namespace fusedmlp::cpu {

// (rows / divisor - mean) / std, in that order and with PyTorch's roundings.
struct ScalingParams {
    const void* rows;   // (n, width) uint8 or fp32
    bool is_bytes;      //
    float divisor;      // 1: no division
    const float* mean;  // mean_size values, or null
    const float* std;   //
    int64_t mean_size;  // 1 or width
    int64_t width;      //
};

// Rows [begin, end) of a batch; loss and right are added to.
struct LossParams {
    float* out;            // (rows, cols) outputs, replaced by the gradient of the weighted mean
    const int64_t* order;  // (rows,) numbers of the rows of the data
    const void* targets;   // (n,) int64, or (n, cols) fp32
    const float* weights;  // (n,) of the rows of the data in the loss, or null: all are 1
    double total_weight;   // of the rows of the batch
    int64_t cols;          //
    float smoothing;       // label smoothing, cross-entropy only
};

// kAdamEpsilonHat: Adam whose epsilon is added before the second moment's bias is corrected.
enum Rule : int { kSgd = 0, kNesterov = 1, kAdamW = 2, kAdam = 3, kAdamEpsilonHat = 4 };

constexpr bool has_moments(int rule) { return rule >= kAdamW; }

// One step's numbers of an optimiser for one parameter, as PyTorch computes them.
struct UpdateParams {
    int rule;            // a Rule
    float lr;            // SGD: learning rate; Adam: step size, lr / (1 - beta1^t)
    float weight_decay;  // AdamW: the factor 1 - lr weight_decay
    float momentum;      // Adam: 1 - beta1
    float beta2;         // Adam only, as all below
    float rest2;         // 1 - beta2
    float root;          // sqrt(1 - beta2^t); epsilon hat: 1, and lr has it
    float eps;           //
};

// What an instruction set offers.
struct StepKernels {
    // Columns [k0, k1) of rows [begin, end) of a batch to rows ld apart.
    void (*gather)(
        float* out,
        int64_t ld,
        const ScalingParams& s,
        const int64_t* order,
        int64_t begin,
        int64_t end,
        int64_t k0,
        int64_t k1
    );
    void (*cross_entropy)(
        const LossParams& p,
        int64_t begin,
        int64_t end,
        double* loss,
        int64_t* right
    );
    void (*squared_error)(
        const LossParams& p,
        int64_t begin,
        int64_t end,
        double* loss,
        int64_t* right
    );
    void (*logistic)(const LossParams& p, int64_t begin, int64_t end, double* loss, int64_t* right);
    // w, first and second moment (null where there is none) from the gradient g.
    void (*update)(
        const UpdateParams& u,
        float* w,
        const float* g,
        float* m1,
        float* m2,
        int64_t n
    );
    double (*square_sum)(const float* g, int64_t n);
    void (*scale)(float* g, float factor, int64_t n);
    void (*add)(float* sum, const float* x, int64_t n);
};

}  // namespace fusedmlp::cpu
