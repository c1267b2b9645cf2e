"""The import rule, the circles that break it, and that `import fusedmlp` imports only torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fusedmlp"

# Each layer may import those above it in this list, wherever the import stands.
LAYERS = (
    ("_version", "compat"),
    ("context", "environment", "whole_file"),
    ("spec",),
    ("backends", "flops"),
    ("ops",),
    ("autograd",),
    ("functional",),
    ("tuning",),
    ("nn",),
    ("trial",),
    ("fusion",),
    ("commands", "train"),
    ("sklearn",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Files that import each other, imports inside functions counted. The list may only shrink.
CIRCLES: list[set[str]] = []


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


def test_a_layer_imports_only_layers_above_it_in_the_list():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module in ("__init__", "__main__"):
            continue
        for other in _imports(path) - {module, "__version__"}:
            assert LEVEL[other] < LEVEL[module], f"{path} imports {other}"


def _graph() -> dict[str, set[str]]:
    """File -> the files it imports, each as its dotted name below the package."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        above = ["fusedmlp", *name.split(".")]
        above = above if path.name == "__init__.py" else above[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = above[: len(above) - node.level + 1] if node.level else []
                base = [*base, *filter(None, [node.module])]
                targets = [".".join([*base, a.name]) for a in node.names]
            elif isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            else:
                continue
            for target in targets:
                target = target.removeprefix("fusedmlp.") if "fusedmlp." in target else ""
                while target and target not in files:
                    target = target.rpartition(".")[0]
                re_exports = target in files and files[target].name == "__init__.py"
                if target and target != name and not (re_exports and name.startswith(f"{target}.")):
                    graph[name].add(target)
    return graph


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found, to_see = set(), [start]
    while to_see:
        for target in graph[to_see.pop()] - found:
            found.add(target)
            to_see.append(target)
    return found


def test_no_circle_of_imports_is_new():
    graph = _graph()
    reached = {name: _reached(graph, name) for name in graph}
    circles = []
    for name in graph:
        circle = {other for other in reached[name] if name in reached[other]}
        if circle and circle not in circles:
            circles.append(circle)
    assert sorted(map(sorted, circles)) == sorted(map(sorted, CIRCLES))


def test_no_backend_imports_another():
    backends = {"native", "reference", "triton"}
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = path.relative_to(PACKAGE / "backends").with_suffix("").parts[0]
        if own not in backends:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in backends - {own}, path


def test_importing_the_package_loads_torch_and_nothing_else():
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import torch;"
        "before = set(sys.modules); import fusedmlp;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - {'fusedmlp'} - set(sys.stdlib_module_names)));"
        "print('torch._dynamo' in sys.modules, 'triton' in sys.modules);"
        "print('torch.utils.flop_counter' in sys.modules)"
    )
    root = str(PACKAGE.parent)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert out.stdout.split() == ["[]", "False", "False", "False"], out.stdout


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
