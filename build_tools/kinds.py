"""What build_tools/mutants.py breaks, how often, and the tests that should see it, the fastest
first. The first pattern that a file matches counts."""

import fnmatch
import shlex
from dataclasses import dataclass
from pathlib import Path

from .sanitize import has
from .toolchain import x86_flags


@dataclass(frozen=True)
class Kind:
    name: str
    count: int
    tests: dict[str, str]  # pattern of files: arguments of pytest

    def paths(self, root: Path) -> list[str]:
        """Files of this kind that hold code which runs here, from `root`."""
        found = [
            path.relative_to(root).as_posix()
            for folder in ("fusedmlp", "csrc")
            for path in sorted((root / folder).rglob("*"))
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and has(x86_flags(path))
        ]
        return [path for path in found if any(fnmatch.fnmatch(path, p) for p in self.tests)]

    def tests_of(self, path: str) -> list[str]:
        words = next(t for pattern, t in self.tests.items() if fnmatch.fnmatch(path, pattern))
        return ["-m", "not slow and not gpu", *shlex.split(words)]


_B, _A, _T = "tests/backends/test_", "tests/autograd/test_", "tests/train/test_"
_STEP = f"{_T}native_step.py {_A}mlp_op.py -k 'not triton and not reference'"
_ELEMENTS = f"{_B}native.py {_B}native_calls.py {_A}corners.py"
_CHOICE = f"{_B}backends.py tests/tuning tests/test_context.py"
_CUDA = f"{_B}cuda_kernels.py -k"
_TRITON = f"{_B}triton.py -k"
_ONE_LAYER = f"{_TRITON} 'not dgrad and not cross_entropy'"
_TABLES = f"{_T}csv_table.py {_T}columns.py {_T}bad_tables.py {_T}preparation.py"
_FIT = f"{_T}train_inputs.py {_T}train.py {_T}run_end.py {_T}checkpoint.py"

KINDS = [
    Kind(
        "C++ kernels",
        20,
        {
            "csrc/common/philox.h": f"{_B}native.py",
            "csrc/common/activations.h": f"{_B}native.py {_B}native_calls.py",
            "csrc/cpu/vec/*": f"{_ELEMENTS} {_T}native_step.py",
            "csrc/cpu/bias_act_dropout.cpp": _ELEMENTS,
            "csrc/cpu/[fb]wd_impl.h": _ELEMENTS,
            "csrc/cpu/sweep.h": _ELEMENTS,
            "csrc/cpu/plan.cpp": _ELEMENTS,
            "csrc/cpu/gemm_bf16_impl.h": f"{_T}native_bf16.py",
            "csrc/cpu/isa_amx.cpp": f"{_T}native_bf16.py",
            "csrc/cpu/isa_avx512_bf16.cpp": f"{_T}native_bf16.py",
            "csrc/cpu/gemm*": _STEP,
            "csrc/cpu/step_many.cpp": f"{_T}ensemble.py {_T}native_evaluate.py",
            "csrc/cpu/step_numbers.cpp": f"{_T}native_step.py {_T}schedules.py",
            "csrc/cpu/step*": _STEP,
            "csrc/cpu/network*": _STEP,
            "csrc/cpu/mlp.cpp": _STEP,
            "csrc/cpu/pool.cpp": f"{_B}native_repeats.py {_T}native_step.py",
            "csrc/bind/cpu_train.cpp": f"{_B}native_refusals.py {_T}native_evaluate.py {_STEP}",
            "csrc/bind/train_args.h": f"{_B}native_refusals.py {_STEP}",
            "csrc/bind/ops_common.h": f"{_B}native.py {_B}native_calls.py {_A}ops.py",
            "csrc/bind/checks.h": f"{_B}native_calls.py {_B}native_refusals.py {_B}native.py",
            "csrc/bind/cpu_mlp.cpp": f"{_A}mlp_op.py {_B}native_refusals.py",
        },
    ),
    Kind(
        "CUDA kernels",
        18,
        {
            "csrc/cuda/cross_entropy.cu": f"{_CUDA} 'cross_entropy and not 120'",
            "csrc/cuda/linear_act.cu": f"{_CUDA} '(tensor_core or tiles) and not 120'",
            "csrc/cuda/*": f"{_CUDA} 'not 120'",
        },
    ),
    Kind(
        "Triton kernels",
        16,
        {
            "fusedmlp/backends/triton/activations.py": f"{_B}triton.py {_A}corners.py",
            "fusedmlp/backends/triton/bias_act_dropout.py": _ONE_LAYER,
            "fusedmlp/backends/triton/cross_entropy.py": f"{_A}cross_entropy.py -k triton",
            "fusedmlp/backends/triton/dgrad_act.py": f"{_TRITON} dgrad",
            "fusedmlp/backends/triton/epilogue.py": _TRITON.removesuffix(" -k"),
            "fusedmlp/backends/triton/gemm.py": f"{_B}triton.py {_B}triton_tune.py",
            "fusedmlp/backends/triton/layout.py": _TRITON.removesuffix(" -k"),
            "fusedmlp/backends/triton/linear_act.py": _ONE_LAYER,
            "fusedmlp/backends/triton/mlp.py": f"{_A}mlp_op.py -k triton",
            "fusedmlp/backends/triton/philox.py": _TRITON.removesuffix(" -k"),
            "fusedmlp/backends/triton/launch.py": f"{_B}triton_launch.py {_B}triton.py",
            "fusedmlp/backends/triton/tiles.py": f"{_B}triton_tune.py {_B}triton.py",
        },
    ),
    Kind(
        "rules",
        20,
        {
            "fusedmlp/spec/activations.py": f"{_B}reference.py {_A}ops.py",
            "fusedmlp/spec/philox.py": "tests/spec/test_rng.py tests/test_docs.py",
            "fusedmlp/spec/budget.py": f"{_A}ops.py tests/tuning/test_tuning.py",
            "fusedmlp/spec/layers.py": f"{_A}mlp_op.py tests/nn/test_mlp.py",
            "fusedmlp/spec/*": f"tests/spec/test_checks.py tests/nn/test_nn.py {_B}backends.py",
            "fusedmlp/functional.py": f"tests/spec/test_checks.py {_A}ops.py tests/nn/test_nn.py",
            "fusedmlp/ops.py": f"{_A}ops.py {_A}mlp_op.py tests/fusion/test_compile.py",
            "fusedmlp/autograd/cross_entropy.py": f"{_A}cross_entropy.py",
            "fusedmlp/autograd/linear_act.py": f"{_A}ops.py {_A}transforms.py {_A}corners.py",
            "fusedmlp/autograd/mlp.py": f"{_A}mlp_op.py tests/nn/test_mlp.py",
            "fusedmlp/backends/composite.py": f"{_A}ops.py {_A}transforms.py {_A}mlp_op.py",
            "fusedmlp/backends/reference.py": f"{_B}reference.py {_A}ops.py",
            "fusedmlp/backends/choice.py": _CHOICE,
            "fusedmlp/backends/measured.py": _CHOICE,
            "fusedmlp/backends/registry.py": _CHOICE,
            "fusedmlp/backends/native.py": f"{_B}backends.py {_B}extension_file.py",
            "fusedmlp/nn/groups.py": "tests/nn/test_sequential.py tests/nn/test_unfuse.py",
            "fusedmlp/nn/[!_]*.py": "tests/nn/test_nn.py tests/nn/test_sequential.py"
            " tests/nn/test_mlp.py tests/nn/test_unfuse.py",
            "fusedmlp/fusion/surgery.py": "tests/fusion/test_surgery.py tests/nn/test_unfuse.py"
            " tests/fusion/test_compile_graph.py",
            "fusedmlp/fusion/[!_]*.py": "tests/fusion/test_surgery.py"
            " tests/fusion/test_report_input.py tests/fusion/test_compile_graph.py"
            " tests/fusion/test_compile_backend.py",
            "fusedmlp/flops.py": "tests/test_flops.py",
        },
    ),
    Kind(
        "training",
        14,
        {
            "fusedmlp/train/schedule.py": f"{_T}schedules.py",
            "fusedmlp/train/losses.py": f"{_T}train.py {_T}defaults.py {_T}row_weights.py",
            "fusedmlp/train/optim.py": f"{_T}train.py {_T}native_step.py",
            "fusedmlp/train/best.py": f"{_T}best_epoch.py",
            "fusedmlp/train/many.py": f"{_T}ensemble.py {_T}equal_runs.py",
            "fusedmlp/train/ensemble.py": f"{_T}presets.py {_T}best_epoch.py",
            "fusedmlp/train/crossvalidation.py": f"{_T}crossval.py",
            "fusedmlp/train/importance.py": f"{_T}run_end.py {_T}table_runs.py",
            "fusedmlp/train/loop.py": _FIT,
            "fusedmlp/train/build.py": f"{_T}defaults.py {_FIT}",
            "fusedmlp/train/run_state.py": f"{_T}checkpoint.py {_FIT}",
            "fusedmlp/train/engines/native_many.py": f"{_T}equal_runs.py {_T}ensemble.py",
            "fusedmlp/train/engines/native_evaluate.py": f"{_T}native_evaluate.py",
            "fusedmlp/train/engines/native*.py": f"{_T}native_step.py {_B}native_repeats.py",
            "fusedmlp/train/engines/graph*.py": f"{_T}graph_step.py {_T}graph_evaluate.py"
            f" {_T}graph_triton.py",
            "fusedmlp/train/engines/[!_]*.py": f"{_T}train.py {_T}native_step.py {_T}tuned.py",
            "fusedmlp/sklearn/lbfgs.py": "tests/sklearn/test_lbfgs.py",
            "fusedmlp/sklearn/[!_]*.py": "tests/sklearn",
        },
    ),
    Kind(
        "readers",
        18,
        {
            "fusedmlp/train/data/images.py": f"{_T}data.py {_T}fetch.py",
            "fusedmlp/train/data/datasets.py": f"{_T}data.py {_T}tables.py",
            "fusedmlp/train/data/tables.py": f"{_T}tables.py {_T}data.py",
            "fusedmlp/train/data/scaling.py": f"{_T}data.py {_T}tables.py {_T}train.py",
            "fusedmlp/train/data/types.py": f"{_T}data.py {_T}best_epoch.py {_T}train_inputs.py",
            "fusedmlp/train/data/defaults.py": f"{_T}presets.py {_T}defaults.py",
            "fusedmlp/train/data/frame_target.py": f"{_T}frame_target.py {_TABLES}",
            "fusedmlp/train/data/loaders.py": f"{_T}loaders.py",
            "fusedmlp/train/data/weights.py": f"{_T}row_weights.py",
            "fusedmlp/train/data/inputs.py": f"{_T}train_inputs.py {_T}loaders.py",
            "fusedmlp/train/data/rows.py": f"{_T}train_inputs.py {_T}loaders.py",
            "fusedmlp/train/data/preparation.py": f"{_T}preparation.py {_TABLES}",
            "fusedmlp/train/data/[!_]*.py": _TABLES,
            "fusedmlp/train/table_files.py": f"{_T}table_runs.py",
            "fusedmlp/train/inference.py": f"{_T}run_end.py {_T}table_runs.py {_T}faults.py",
            "fusedmlp/train/run_folder.py": f"{_T}checkpoint.py {_T}run_end.py",
        },
    ),
    Kind(
        "command line",
        8,
        {
            "fusedmlp/cli.py": "tests/commands",
            "fusedmlp/environment.py": "tests/commands",
            "fusedmlp/commands/tune.py": "tests/tuning tests/commands",
            "fusedmlp/commands/info.py": f"{_B}extension_file.py tests/tuning tests/commands",
            "fusedmlp/commands/[!_]*.py": f"tests/commands {_B}extension_file.py",
            "fusedmlp/train/compare.py": f"{_T}compare.py",
            "fusedmlp/train/console.py": f"{_T}train.py {_T}run_end.py {_T}crossval.py",
            "fusedmlp/train/co[mn][mf]*.py": f"{_T}train_inputs.py {_T}defaults.py tests/commands",
        },
    ),
]
