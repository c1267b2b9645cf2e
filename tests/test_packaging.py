"""What an install gives, with and without a compiler, nvcc, torch and setuptools.

Builds small stand-in sources in copies of the tree, against a stand-in torch (empty libraries, no
headers): what is tested is setup.py, and neither torch's version nor a CUDA toolkit matters.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from build_tools import environment
from build_tools.toolchain import CannotBuild, Compiler, Nvcc, Torch, find_ninja, x86_flags
from fusedmlp.backends import schemas

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".cpp", ".h", ".hpp", ".cu", ".cuh"}
STAND_IN = {
    "csrc/bind/cpu.cpp": "int plain(); int entry() { return plain(); }",
    "csrc/cpu/plain.cpp": "int plain() { return 1; }",
    "csrc/cpu/wide_avx2.cpp": "#ifndef __AVX2__\n#error not for AVX2\n#endif\n",
    "csrc/cpu/wide_avx512.cpp": "#ifndef __AVX512BW__\n#error not for AVX-512\n#endif\n",
    "csrc/bind/cuda.cpp": "#include <cuda_runtime.h>\n",
    "csrc/cuda/kernel.cu": "",
}
NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
    *--list-gpu-arch*) printf 'compute_%s\\n' {archs} ;;
    *--dryrun*) ;;
    *) echo "kernel.cu(1): error: injected" >&2; exit 1 ;;
esac
"""


def unusable_toolchain():
    try:
        Compiler(), find_ninja()
    except CannotBuild as reason:
        return str(reason)


needs_compiler = pytest.mark.skipif(
    unusable_toolchain() is not None, reason=str(unusable_toolchain())
)


def copy_tree(folder, csrc):
    """The files a build reads; csrc is the folder to take, or None for the stand-in."""
    for name in ("build_tools", "fusedmlp"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    if csrc is not None:
        shutil.copytree(csrc, folder / "csrc")
        return folder
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree", None)


@pytest.fixture(scope="module")
def stand_in_torch(tmp_path_factory):
    """A folder for PYTHONPATH with a torch that has a version and empty libraries."""
    root = tmp_path_factory.mktemp("site")
    libraries = root / "torch" / "lib"
    libraries.mkdir(parents=True)
    (root / "torch" / "__init__.py").write_text("")
    (root / "torch" / "version.py").write_text("__version__ = '2.12.0'\ncuda = '13.0'\n")
    empty = root / "empty.cpp"
    empty.write_text("")
    if unusable_toolchain() is None:
        for name in ("torch_cpu", "torch_cuda", "c10", "c10_cuda", "cudart"):
            command = [*Compiler().command, "-shared", empty, "-o", libraries / f"lib{name}.so"]
            subprocess.run(command, check=True)
    return root


@pytest.fixture
def cuda_home(tmp_path):
    """A toolkit folder whose nvcc answers questions and fails on every file."""

    def make(release="13.0", archs="75 80 86 90 100 120"):
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True)
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").write_text("")
        (home / "bin" / "nvcc").write_text(NVCC.format(release=release, archs=archs))
        (home / "bin" / "nvcc").chmod(0o755)
        return home

    return make


def run_python(code, *, cwd, options=(), **environ):
    """Runs code in a new Python; None as a value removes the variable."""
    names = ("FUSEDMLP_BUILD", "CXX", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {k: str(v) for k, v in environ.items() if v is not None}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def build(what, tree, **environ):
    """The file that the build backend makes, or what it said when it failed."""
    code = f"from build_tools import backend; print('made', backend.build_{what}('dist'))"
    run = run_python(code, cwd=tree, **environ)
    made = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("made ")]
    return (tree / "dist" / made[0]) if run.returncode == 0 else run.stdout + run.stderr


def build_wheel(tree, **environ):
    """(file name, names inside, build info)"""
    path = build("wheel", tree, **environ)
    assert isinstance(path, Path), path
    with zipfile.ZipFile(path) as wheel:
        info = json.loads(wheel.read("fusedmlp/_build_info.json"))
        for target, number in info["crc32"].items():  # which an archive holds too
            assert wheel.getinfo(f"fusedmlp/_native_{target}.so").CRC == number
        return path.name, wheel.namelist(), info


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    csrc = ROOT / "csrc" if (ROOT / "csrc").exists() else None
    tree = copy_tree(tmp_path, csrc)
    for name in ("tests", "bench", ".ci"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = build("sdist", tree, FUSEDMLP_BUILD="none")
    assert isinstance(path, Path), path
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [tree / name for name in ("csrc", "tests", "bench", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    wanted = {path.relative_to(tree).as_posix() for path in files}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "fusedmlp/py.typed", "fusedmlp/_version.py"}
    wanted |= {"build_tools/backend.py", "build_tools/toolchain.py"}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


@needs_compiler
def test_wheel_holds_the_libraries_and_no_source(tree, stand_in_torch):
    name, inside, info = build_wheel(tree, PYTHONPATH=stand_in_torch, FUSEDMLP_BUILD="cpu")
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert {"fusedmlp/_native_cpu.so", "fusedmlp/py.typed", "fusedmlp/_version.py"} <= set(inside)
    assert not [member for member in inside if Path(member).suffix in SOURCES]
    assert not [member for member in inside if member.startswith(("tests", "bench", "build_tools"))]
    assert info["built"] == ["cpu"] and info["torch"] == "2.12.0"
    assert info["left_out"] == {"cuda": "FUSEDMLP_BUILD=cpu"}
    assert info["compiler"] and info["schemas"] == schemas.digest()
    assert list(info["crc32"]) == ["cpu"]


def test_build_none_gives_a_pure_wheel(tree):
    (tree / "fusedmlp" / "_native_cpu.so").write_text("of an earlier build")
    name, inside, info = build_wheel(tree, FUSEDMLP_BUILD="none")
    assert name.endswith("-py3-none-any.whl")
    assert not [member for member in inside if member.endswith(".so")]
    assert info["built"] == [] and set(info["left_out"]) == {"cpu", "cuda"}


def test_unknown_build_mode_is_refused(tree):
    said = build("wheel", tree, FUSEDMLP_BUILD="gpu")
    assert "FUSEDMLP_BUILD must be one of auto, cpu, cuda, none, got 'gpu'" in said


@pytest.mark.parametrize("environ", [{"CXX": "false"}, {"PATH": ""}], ids=["CXX=false", "no PATH"])
def test_without_a_compiler_auto_is_pure_and_cpu_fails(tree, stand_in_torch, environ):
    reason = "compiler (false)" if "CXX" in environ else "no C++ compiler"
    name, _, info = build_wheel(tree, PYTHONPATH=stand_in_torch, **environ)
    assert name.endswith("-any.whl")
    assert reason in info["left_out"]["cpu"] and reason in info["left_out"]["cuda"]
    said = build("wheel", tree, PYTHONPATH=stand_in_torch, FUSEDMLP_BUILD="cpu", **environ)
    assert "fusedmlp: FUSEDMLP_BUILD=cpu: cpu:" in said and reason in said


@needs_compiler
def test_without_nvcc_auto_builds_the_cpu_part(tree, stand_in_torch, tmp_path):
    environ = {"PYTHONPATH": stand_in_torch, "CUDA_HOME": tmp_path / "none"}
    _, inside, info = build_wheel(tree, **environ)
    assert info["built"] == ["cpu"] and "fusedmlp/_native_cpu.so" in inside
    assert info["left_out"]["cuda"].startswith("no nvcc at ")
    assert "no nvcc at " in build("wheel", tree, FUSEDMLP_BUILD="cuda", **environ)


@needs_compiler
def test_failing_nvcc_under_auto_leaves_the_cpu_part(tree, stand_in_torch, cuda_home):
    environ = {"PYTHONPATH": stand_in_torch, "CUDA_HOME": cuda_home()}
    _, inside, info = build_wheel(tree, **environ)
    assert info["built"] == ["cpu"] and "fusedmlp/_native_cuda.so" not in inside
    assert info["left_out"]["cuda"] == "build failed: kernel.cu(1): error: injected"
    said = build("wheel", tree, FUSEDMLP_BUILD="cuda", **environ)
    assert "FUSEDMLP_BUILD=cuda: cuda: build failed: kernel.cu(1): error: injected" in said


@needs_compiler
def test_unchanged_sources_are_not_built_again(tree, stand_in_torch):
    def build_in_place():
        code = "import sys, runpy; sys.argv[1:] = ['-q', 'build_native', '--editable-mode']; "
        code += "runpy.run_path('setup.py', run_name='__main__')"
        run = run_python(code, cwd=tree, PYTHONPATH=stand_in_torch, FUSEDMLP_BUILD="cpu")
        assert run.returncode == 0, run.stdout + run.stderr
        return (tree / "fusedmlp" / "_native_cpu.so").stat().st_mtime_ns

    first = build_in_place()
    assert build_in_place() == first
    (tree / "csrc" / "cpu" / "plain.cpp").write_text("int plain() { return 2; }")
    assert build_in_place() != first


@pytest.fixture
def without_packages(tmp_path):
    """Options and PYTHONPATH for a Python that sees these packages of this one and no other."""

    def make(*patterns):
        import setuptools

        site = Path(setuptools.__file__).parent.parent
        folder = tmp_path / "packages"
        folder.mkdir()
        for path in (path for pattern in patterns for path in site.glob(pattern)):
            (folder / path.name).symlink_to(path)
        return {"options": ["-S"], "PYTHONPATH": folder}

    return make


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_without_torch_auto_is_pure_and_cpu_fails(tree, without_packages, mode):
    python = without_packages("setuptools", "setuptools-*", "_distutils_hack")
    code = "from build_tools import backend; print(backend.build_wheel('dist'))"
    run = run_python(code, cwd=tree, FUSEDMLP_BUILD=mode, **python)
    said = run.stdout + run.stderr
    assert "torch is not installed where the build runs" in said
    assert (run.returncode == 0) is (mode == "auto"), said
    assert ("py3-none-any.whl" in said) is (mode == "auto"), said


def test_without_setuptools_the_build_says_so(tree, without_packages):
    run = run_python("import build_tools.backend", cwd=tree, **without_packages())
    assert run.returncode != 0
    assert "fusedmlp: setuptools is not installed" in run.stderr and "Traceback" not in run.stderr


def torch_for(cuda):
    torch = object.__new__(Torch)
    torch.version, torch.cuda = "2.12.0", cuda
    return torch


def test_nvcc_of_another_major_version_is_refused(cuda_home, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home(release="12.8")))
    with pytest.raises(CannotBuild, match="nvcc is CUDA 12.8 .* the major versions must be equal"):
        Nvcc(torch_for("13.2"))
    with pytest.raises(CannotBuild, match="torch 2.12.0 is not a CUDA build"):
        Nvcc(torch_for(None))


@pytest.mark.parametrize(
    "known, named, archs",
    [
        ("75 80 86 90 100 120", "", ["7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX"]),
        ("75 80 86 89 90", "", ["7.5", "8.0", "8.6", "9.0+PTX"]),
        ("75 80 90", "6.1;8.0 9.0a", ["8.0", "9.0a"]),
    ],
    ids=["default", "older-nvcc", "named"],
)
def test_architectures_are_those_that_nvcc_knows(cuda_home, monkeypatch, known, named, archs):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home(archs=known)))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    nvcc = Nvcc(torch_for("13.2"))
    assert nvcc.archs == archs
    assert sum("code=compute_" in code for code in nvcc.codes) == sum("PTX" in a for a in archs)
    assert len(nvcc.codes) == len(archs) + sum("PTX" in a for a in archs)


@pytest.mark.parametrize("named, said", [("Hopper", "not understood"), ("5.0", "build none of")])
def test_bad_architectures_are_refused(cuda_home, monkeypatch, named, said):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home()))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    with pytest.raises(CannotBuild, match=said):
        Nvcc(torch_for("13.2"))


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
def test_clang_takes_the_sources_as_well_as_gcc():
    compiler = Compiler()
    defines = ["-DFUSEDMLP_X86"] if compiler.x86 else []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        flags = x86_flags(source)
        if flags and not compiler.x86:
            continue
        command = ["clang++", "-fsyntax-only", "-std=c++20", "-Icsrc", *defines, *flags, source]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_extension_of_this_environment_did_not_fail_to_build():
    """Otherwise a mistake in csrc/ would only show as skipped tests."""
    path = ROOT / "fusedmlp" / "_build_info.json"
    if not path.exists():
        pytest.skip("no fusedmlp/_build_info.json: the package was not installed from this tree")
    left_out = json.loads(path.read_text())["left_out"]
    assert not [why for why in left_out.values() if why.startswith("build failed")]


def test_import_loads_torch_and_nothing_else():
    code = """
import sys, warnings, torch
before = {name.partition(".")[0] for name in sys.modules}
warnings.simplefilter("error")
import fusedmlp
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names)))
print("triton" in after, "native" in str(sorted(torch.ops.loaded_libraries)))
"""
    run = run_python(code, cwd=ROOT, PYTHONPATH=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["['fusedmlp']", "False False"]


def test_extras_and_version_are_stated_once():
    import fusedmlp

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["all"] == ["fusedmlp[train,bench]"]
    assert "version" in project["dynamic"]
    text = (ROOT / "fusedmlp" / "_version.py").read_text()
    assert text.strip() == f'__version__ = "{fusedmlp.__version__}"'


def test_setup_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "TORCH_BYTES", 1e18)
    with pytest.raises(SystemExit, match="not enough disk space.*VENV="):
        environment.check_space(tmp_path)
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match="no venv module.*python3-venv"):
        environment.make_venv(tmp_path / "venv")


def test_setup_reports_an_unreachable_index_in_one_line(monkeypatch, capfd):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SystemExit, match="could not install .*: the package index cannot be"):
        environment.pip_install(Path(sys.executable), "fusedmlp-stand-in-that-is-nowhere")
    capfd.readouterr()


@pytest.mark.parametrize("status", [0, 2])
def test_ci_shows_the_closing_line_last_and_passes_the_status(tmp_path, status):
    closing = "===== 3 passed, 1 skipped in 61.02s (0:01:01) ====="
    make = tmp_path / "make"
    make.write_text(f"#!/bin/sh\necho '{closing}'\necho after\nexit {status}\n")
    make.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    assert run.returncode == status
    assert run.stdout.splitlines()[-1] == closing
