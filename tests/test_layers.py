"""The import rule: one direction only, and `import fusedmlp` imports torch and nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fusedmlp"

LEAVES = {
    "activations",
    "rng",
    "dtypes",
    "checks",
    "nets",
    "policy",
    "context",
    "environment",
    "_version",
}
# module -> what it may import from the package, besides the leaves
ALLOWED = {
    "activations": set(),
    "rng": set(),
    "dtypes": set(),
    "policy": set(),
    "context": set(),
    "environment": set(),
    "checks": set(),
    "kernels": set(),
    "differentiable": set(),
    "dispatch": {"kernels"},
    "ops": {"dispatch"},
    "autograd": {"ops", "differentiable"},
    "autograd_mlp": {"autograd", "ops", "differentiable"},
    "loss": {"autograd", "ops", "dispatch"},
    "functional": {"autograd", "loss", "ops", "dispatch", "differentiable"},
    "surgery": {"functional", "dispatch", "nn", "ops", "tracing"},
    "nn": {"functional", "autograd_mlp", "dispatch", "surgery", "tracing", "measure"},
    "tracing": {"functional", "nn"},
    "measure": {"surgery"},
    "verify": {"functional", "autograd_mlp", "dispatch", "differentiable"},
    "info": {"dispatch", "kernels", "verify"},
    "tuning": {"dispatch", "kernels"},
}
CORE = set(ALLOWED) - {"info", "verify", "tuning"}


def _imports(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports, wherever the import stands."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fusedmlp.")}
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            if node.level == 0:
                if (node.module or "").split(".")[0] != "fusedmlp":
                    continue
                module = node.module.split(".")[1:]
            else:
                module = base + (node.module.split(".") if node.module else [])
            found |= {module[0]} if module else {a.name for a in node.names}
    return found


def _files(module: str) -> list[Path]:
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


@pytest.mark.parametrize("module", ALLOWED)
def test_a_layer_imports_only_layers_below_it(module):
    for path in _files(module):
        extra = _imports(path) - LEAVES - ALLOWED[module] - {module}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {extra}"


def test_no_backend_imports_another():
    for folder in (PACKAGE / "kernels").iterdir():
        others = {f.name for f in (PACKAGE / "kernels").iterdir() if f.is_dir()} - {folder.name}
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    assert node.module.split(".")[0] not in others, path


def test_the_core_imports_neither_trainer_nor_estimators():
    for module in CORE:
        for path in _files(module):
            assert not _imports(path) & {"train", "sklearn", "cli"}, path


def test_importing_the_package_loads_torch_and_nothing_else():
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import torch;"
        "before = set(sys.modules); import fusedmlp;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - {'fusedmlp'} - set(sys.stdlib_module_names)));"
        "print('torch._dynamo' in sys.modules, 'triton' in sys.modules)"
    )
    root = str(PACKAGE.parent)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert out.stdout.split("\n")[:2] == ["[]", "False False"], out.stdout


@pytest.mark.parametrize(
    "used", ["train.fit", "train.TrainConfig", "sklearn.FusedMLPClassifier", "train.explain"]
)
def test_what_needs_the_extras_is_reached_without_an_import_of_its_own(used):
    pytest.importorskip("sklearn")
    code = (
        "import sys, fusedmlp; name = 'fusedmlp." + used.split(".")[0] + "';"
        "assert name not in sys.modules and name.split('.')[1] in dir(fusedmlp);"
        "print(fusedmlp." + used + ".__name__); assert name in sys.modules;"
        "assert not hasattr(fusedmlp, 'trian')"
    )
    root = str(PACKAGE.parent)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert out.stdout.strip() == used.split(".")[1], out.stderr
