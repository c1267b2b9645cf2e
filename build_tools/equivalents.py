"""Mutants that change nothing which a user or another part could see, and why."""

# (file, line before, line after): reason
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "fusedmlp/train/data/types.py",
        "return self.x_train[0].numel()",
        "return self.x_train[-1].numel()",
    ): "Every row of a tensor has as many numbers.",
    (
        "fusedmlp/backends/triton/linear_act.py",
        "ACT, SLOPES, DROPOUT, 1, BLOCK_M, BLOCK_N,",
        "ACT, SLOPES, DROPOUT, 2, BLOCK_M, BLOCK_N,",
    ): "The columns of a tile in two parts instead of one: the same values, in other registers.",
    (
        "fusedmlp/backends/triton/launch.py",
        "dropout, threshold = KEEP_NONE, 0",
        "dropout, threshold = KEEP_NONE, -1",
    ): "Kernels that drop everything draw no mask, and read no threshold.",
    (
        "csrc/cpu/network.h",
        "int64_t piece_ = 1;  // blocks that a thread takes at least",
        "int64_t piece_ = 0;  // blocks that a thread takes at least",
    ): "Both loops over threads take a least piece of 0 as one of 1.",
    (
        "csrc/cuda/launch.cuh",
        "const bool exact = divisor > 1 && uint64_t(limit) <= UINT64_MAX / divisor;",
        "const bool exact = divisor > 1 && uint64_t(limit) < UINT64_MAX / divisor;",
    ): "One limit more is divided instead of multiplied: the same quotient.",
    (
        "csrc/cuda/launch.cuh",
        "uint64_t divisor = 1;",
        "uint64_t divisor = 0;",
    ): "Every Divider that a kernel uses has been assigned by its launcher.",
    (
        "fusedmlp/train/data/datasets.py",
        "def read(config: TrainConfig, frame=None, several: bool = False) -> Data:",
        "def read(config: TrainConfig, frame=None, several: bool = True) -> Data:",
    ): "The one caller that leaves it out holds out nothing, which is all that it decides over.",
    (
        "fusedmlp/backends/triton/mlp.py",
        "for kind, y in zip(kinds, ys, strict=True)",
        "for kind, y in zip(kinds, ys, strict=False)",
    ): "Both lists have an element for each layer.",
    (
        "fusedmlp/train/commands.py",
        "debug: bool = False",
        "debug: bool = True",
    ): "The parsed value is not read: whether --debug was given is seen in the words.",
    (
        "fusedmlp/backends/triton/tiles.py",
        "Tile(64, 32, 64, 4, 4),",
        "Tile(64, 32, 64, 3, 4),",
    ): "How many stages a tile has decides how fast it is, and not what it computes.",
    (
        "fusedmlp/backends/triton/philox.py",
        "t = threshold.to(tl.uint32, bitcast=True)",
        "t = threshold.to(tl.uint32, bitcast=False)",
    ): "A conversion of int32 to uint32 keeps the bits too.",
    (
        "csrc/cpu/isa_avx512_bf16.cpp",
        "const int64_t tiles = (rows + kMR - 1) / kMR;",
        "const int64_t tiles = (rows + kMR + 1) / kMR;",
    ): "The rows in tiles of other heights: each row has the same sum.",
    (
        "csrc/cpu/step_buffers.h",
        "int64_t floats = 0;",
        "int64_t floats = 1;",
    ): "Both functions that make the buffers assign it.",
    (
        "csrc/cpu/vec/math.h",
        "p = fma(p, q, set1(0.08461371064186096f));",
        "p = fma(q, p, set1(0.08461371064186096f));",
    ): "The same product.",
    (
        "csrc/cpu/mlp.cpp",
        "for (size_t i = 0; i < last; ++i) {",
        "for (size_t i = 0; i <= last; ++i) {",
    ): "The output of the last layer is always given, so it takes no other memory.",
    (
        "csrc/cpu/pool.cpp",
        "std::atomic<int> undone_{0};  // grains",
        "std::atomic<int> undone_{1};  // grains",
    ): "Each loop assigns it before a thread reads it.",
}
