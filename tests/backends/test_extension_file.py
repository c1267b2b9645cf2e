"""Extensions that cannot be used: damaged, of another build, or asked for in words that do not
exist. Automatic choice passes them over with a reason; a choice by name raises it."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from fusedmlp import environment
from fusedmlp.backends import native, schemas
from fusedmlp.spec import activations

from ..made_data import ROOT
from ..native import needs_native


def python(code: str, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code.split()] if code.startswith("-m") else [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


# A process whose extension lies in another folder; `wide` is a call that would go to it.
IN_FOLDER = """
import logging, sys
from pathlib import Path
import torch, fusedmlp
from fusedmlp.functional import linear_act
from fusedmlp.backends import native as extension
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
extension._FOLDER = Path({folder!r})
x, w = torch.ones(512, 64), torch.ones(2048, 64)
def wide(**more):
    return linear_act(x, w, activation="gelu", p=0.5, **more).shape
net = fusedmlp.fuse(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(),
                                        torch.nn.Linear(32, 32), torch.nn.GELU()))
assert wide() == (512, 2048) and net(x).shape == (512, 32)
try:
    wide(backend="native")
except fusedmlp.BackendError as error:
    print("raised:", error)
"""


def assert_passed_over(folder, reason: str) -> None:
    done = python(IN_FOLDER.format(folder=str(folder)))
    assert done.returncode == 0, done.stderr
    assert "backend 'native' was passed over" in done.stdout
    assert done.stdout.count(reason) >= 2 and "raised: " in done.stdout
    assert "rebuild with FUSEDMLP_BUILD=cpu" in done.stdout


def write_info(folder, content: bytes, digest: str | None = "") -> None:
    """What a build notes of the library; digest "" is the right one."""
    info = {"torch": torch.__version__, "crc32": {"cpu": zlib.crc32(content)}}
    info["schemas"] = schemas.digest() if digest == "" else digest
    (folder / "_build_info.json").write_text(json.dumps(info))


def whole() -> bytes:
    return native.library("cpu").read_bytes()


DAMAGED = "_native_cpu.so is damaged: it is not the file that was built"


@needs_native
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_a_file_cut_short_is_a_reason_and_not_the_end_of_the_process(share, tmp_path):
    """The loader maps what the headers name: reading beyond the end of the file is a bus error."""
    content = whole()
    (tmp_path / "_native_cpu.so").write_bytes(content[: int(len(content) * share)])
    write_info(tmp_path, content)
    assert_passed_over(tmp_path, DAMAGED)


@needs_native
def test_a_turned_bit_is_told_by_the_checksum_of_the_build(tmp_path):
    """Else it may compute anything, or end the process."""
    content = bytearray(whole())
    write_info(tmp_path, content)
    content[len(content) // 2] ^= 4
    (tmp_path / "_native_cpu.so").write_bytes(content)
    assert_passed_over(tmp_path, DAMAGED)


def test_an_extension_without_ops_is_passed_over(tmp_path):
    compiler = shutil.which("cc") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    table = " ".join(f"{a.name}={a.id}" for a in activations.TABLE)
    source = tmp_path / "other.c"
    source.write_text(f'const char* fusedmlp_activations(void) {{ return "{table}"; }}\n')
    library = tmp_path / "_native_cpu.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    write_info(tmp_path, library.read_bytes())
    assert_passed_over(tmp_path, "was built from another version: it has no bias_act_dropout_bwd")


OTHER_SCHEMAS = "_native_cpu.so was built from another version, whose ops take other arguments"
TRAIN = """
import torch, fusedmlp
from pathlib import Path
from fusedmlp.backends import native as extension
from fusedmlp.train import TrainConfig, fit
extension._FOLDER = Path({folder!r})
data = torch.randn(64, 8), torch.randint(3, (64,)), torch.randn(8, 8), torch.randint(3, (8,))
def train(engine):
    config = TrainConfig(epochs=1, batch_size=32, engine=engine)
    return fit(fusedmlp.FusedMLP(8, [16], 3), data, config)
print("engine:", train("auto").summary["engine"])
try:
    train("native")
except Exception as error:
    print("raised:", error)
"""


@needs_native
@pytest.mark.parametrize("digest", ["0123456789abcdef", None], ids=["other", "unknown"])
def test_a_library_of_older_schemas_is_passed_over_before_it_is_opened(digest, tmp_path):
    """It used to be opened, and to end the first training in a raw error about a schema."""
    shutil.copy(native.library("cpu"), tmp_path)
    write_info(tmp_path, whole(), digest)
    assert_passed_over(tmp_path, OTHER_SCHEMAS)
    done = python(TRAIN.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "engine: autograd" in done.stdout
    raised = done.stdout.split("raised: ")[1]
    assert OTHER_SCHEMAS in raised and "rebuild with FUSEDMLP_BUILD=cpu" in raised


def test_the_digest_is_of_the_schemas_and_of_no_comment(tmp_path):
    package = Path(native.__file__).parents[1]
    for file in schemas._FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / file, tmp_path / file)
    assert schemas.digest(tmp_path) == schemas.digest()
    changed = tmp_path / schemas._FILES[1]
    changed.write_text("# A comment.\n" + changed.read_text())
    assert schemas.digest(tmp_path) == schemas.digest()
    assert "int loss, " in changed.read_text()
    changed.write_text(changed.read_text().replace("int loss, ", "int loss, Tensor? more, "))
    assert schemas.digest(tmp_path) != schemas.digest()


ISAS = environment.CHOICES["FUSEDMLP_CPU_ISA"]  # from the lowest up
WRONG = (
    "FUSEDMLP_CPU_ISA must be one of baseline, avx2, avx512, avx512_bf16, amx, got 'foo'; "
    "unset it for the default"
)


@needs_native
def test_an_instruction_set_that_does_not_exist_is_named():
    done = python("-m fusedmlp info", FUSEDMLP_CPU_ISA="foo")
    assert done.returncode == 0 and not done.stderr
    assert f"native     cpu   linear_act        {WRONG}" in done.stdout
    done = python(
        "import torch; from fusedmlp.functional import linear_act as f\n"
        "x = torch.ones(64, 64)\n"
        "for _ in range(2):\n"
        "    try: f(x, x, p=0.5)\n"
        "    except ValueError as error: print(error)",
        FUSEDMLP_CPU_ISA="foo",
    )
    assert done.stdout.splitlines() == [WRONG, WRONG], done.stderr


@needs_native
@pytest.mark.parametrize("name", ["", *ISAS])
def test_info_shows_the_instruction_set_in_use(name):
    done = python("-m fusedmlp info", FUSEDMLP_CPU_ISA=name)
    line = next(line for line in done.stdout.splitlines() if "the CPU kernels use" in line)
    used, bf16 = line.split("use ")[1].split(";")[0].split(", training in bf16 ")
    assert used in ISAS[:3] and bf16 in ("cannot", *ISAS[3:])
    best = used if bf16 == "cannot" else bf16
    if name and best != name:
        assert ISAS.index(best) < ISAS.index(name)
        assert line.endswith(f"this processor lacks {name}, which was asked for")
    else:
        assert ";" not in line
