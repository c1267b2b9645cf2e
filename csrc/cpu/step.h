// Whole training steps on the CPU as one call. Plain pointers, no torch.
#pragma once

#include <vector>

#include "cpu/step_kernels.h"

namespace fusedmlp::cpu {

// A parameter and what the optimiser keeps for it; null where there is none.
struct StepParam {
    float* value;
    float* m1;            // momentum, or first moment
    float* m2;            // second moment
    int64_t size;         //
    double lr;            //
    double weight_decay;  //
};

// y = drop(act(x w^T + b)) with the numbers of EpilogueParams.
struct StepLayer {
    StepParam w;         // (N, K)
    StepParam b;         // (N,) or null
    StepParam slope;     // prelu only
    int64_t k;           //
    int64_t n;           //
    int act;             // an Act
    int saves;           // a Saves
    float alpha;         //
    uint64_t threshold;  //
    float scale;         //
    int64_t layer;       // its number: added to the stream of the step
};

enum Loss : int { kCrossEntropy = 0, kSquaredError = 1, kLogistic = 2 };

struct StepParams {
    std::vector<StepLayer> layers;
    ScalingParams scaling;   // of the data
    const void* targets;     // (n,) int64, or (n, C) fp32
    int loss;                // a Loss
    float smoothing;         //
    const int64_t* order;    // (rows,) of the data, step after step
    int64_t rows;            // over all steps
    int64_t batch;           // rows of a step; the last one may have fewer
    int64_t seed;            // of the masks
    int64_t first_step;      // step s takes the streams from (first_step + s) mask_layers on
    int64_t mask_layers;     //
    int rule;                // a Rule
    double momentum;         // SGD
    double beta1;            // Adam and its kin
    double beta2;            //
    double eps;              //
    int64_t updates;         // that Adam has done before
    double max_norm;         // gradients are clipped to it; 0: they are not
    const double* lr_scale;  // (steps,) factors of the learning rate, or null
    double* totals;          // (3,) sum of losses, number right, rows: added to
    float* work;             // step_work(p) floats
};

// Of update number `updates`, from 1 on, of w, where the learning rate has this factor.
UpdateParams numbers_of(const StepParams& p, const StepParam& w, double lr_scale, int64_t updates);

// Floats of memory that steps of this batch take.
int64_t step_work(const StepParams& p);
int launch_steps(StepParams& p, ParallelFor parallel);

// Adds losses, hits and rows to totals and changes nothing else. The layers save nothing and drop
// nothing; what belongs to the update is not read.
int64_t judge_work(const StepParams& p);
int launch_judge(StepParams& p, ParallelFor parallel);

// Epochs of one network: `steps` are those of the first, and order, lr_scale and totals go on with
// those of the next. They end early after one whose loss is not finite.
struct Member {
    StepParams steps;
    int64_t epochs;
};

// Several networks at once, which share the data and nothing else. work: (slots, floats), with
// floats at least many_work and one slot for each thread that is to take part.
int64_t many_work(const std::vector<Member>& members, int64_t (*work_of)(const StepParams&));
int launch_many(
    std::vector<Member>& members,
    float* work,
    int64_t slots,
    int64_t floats,
    ParallelFor parallel
);
int launch_judge_many(
    std::vector<Member>& members,
    float* work,
    int64_t slots,
    int64_t floats,
    ParallelFor parallel
);

}  // namespace fusedmlp::cpu
