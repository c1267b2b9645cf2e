// Training and evaluation of whole networks on the CPU as one call. Plain pointers, no torch.
#pragma once

#include <vector>

#include "cpu/network.h"

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

// A layer and its parameters; those that it lacks have no value. The state of its dropout is that
// of the step.
struct StepLayer {
    Layer layer;
    StepParam w;      // (N, K)
    StepParam b;      // (N,)
    StepParam slope;  // of prelu
};

enum Loss : int { kCrossEntropy = 0, kSquaredError = 1, kLogistic = 2 };

struct StepParams {
    std::vector<StepLayer> layers;
    ScalingParams scaling;   // of the data
    const void* targets;     // (n,) int64, or (n, C) fp32
    const float* weights;    // (n,) of the rows in the loss of a step, or null: all are 1
    int loss;                // a Loss
    float smoothing;         //
    bool is_bf16;            // products of operands rounded to bf16; gemm_bf16() is there
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
    float* work;             // epoch_work(p) or evaluation_work(p) floats
};

// Of update number `updates`, from 1 on, of w, where the learning rate has this factor.
UpdateParams numbers_of(const StepParams& p, const StepParam& w, double lr_scale, int64_t updates);

// Epochs of one network: `steps` are those of the first, and order, lr_scale and totals go on with
// those of the next. They end early after one whose loss is not finite.
struct Member {
    StepParams steps;
    int64_t epochs;
};

// Memory of several networks: a slot for each thread that is to take part, of `floats` each.
struct Slots {
    float* memory;
    int64_t count;
    int64_t floats;
};

// Networks that share the data and nothing else. A network alone runs on all threads, several on a
// thread each, with the same results. train_work and evaluate_work are the floats that a slot
// needs.
int64_t train_work(const std::vector<Member>& members);
int launch_train(std::vector<Member>& members, const Slots& slots, ParallelFor parallel);

// Adds losses, hits and rows to totals and changes nothing else. The layers save nothing and drop
// nothing; what belongs to the update is not read.
int64_t evaluate_work(const std::vector<Member>& members);
int launch_evaluate(std::vector<Member>& members, const Slots& slots, ParallelFor parallel);

// All steps of one epoch of one network, for launch_train and launch_evaluate; p.work is set.
int64_t epoch_work(const StepParams& p);
int train_epoch(StepParams& p, ParallelFor parallel);
int64_t evaluation_work(const StepParams& p);
int evaluate_rows(StepParams& p, ParallelFor parallel);

}  // namespace fusedmlp::cpu
