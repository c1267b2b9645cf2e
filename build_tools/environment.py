"""Makes the environment that `make` works in, and builds the package into it.

Venv, torch and torchvision, setuptools and ninja, the package with its extras (editable, no build
isolation, so that the extension is built against this torch), then the extension's changed files.
Looks at what is installed and does only what is missing, so an environment made by hand serves too.
Must stay readable to Python 3.6 and need nothing installed: it is what says that Python is too old.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_AT_LEAST = (3, 11)
TORCH_BYTES = 7e9  # the archives and what they unpack to; 5 GB stay
QUERY = """
import importlib.metadata, json
found = {}
for dist in importlib.metadata.distributions():  # in the order of sys.path: the first one counts
    found.setdefault(str(dist.metadata["Name"]).lower(), dist.version)
print(json.dumps(found))
"""
NO_INDEX = re.compile(
    r"NewConnectionError|NameResolution|Max retries|ReadTimeout|ConnectTimeout|SSLError|ProxyError"
    r"|Connection (refused|broken|reset|aborted)|No matching distribution"
)


def say(text):
    print("setup:", text, flush=True)


def stop(text):
    sys.exit("setup: " + text)


def make_venv(venv):
    try:
        import ensurepip  # noqa: F401
        import venv as _  # noqa: F401
    except ImportError:
        stop(
            "this Python has no venv module; install it (Debian, Ubuntu: apt install "
            "python3-venv), or give VENV= an environment that exists"
        )
    say(f"making the environment {venv}")
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)])
    if made.returncode:
        stop(f"the environment {venv} could not be made (see above)")


def packages(python):
    """Name -> version of all that the environment holds, or None when it does not work."""
    try:
        run = subprocess.run([str(python), "-c", QUERY], stdout=subprocess.PIPE, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return json.loads(run.stdout.decode())


def check_space(folder):
    free = shutil.disk_usage(str(folder)).free
    if free < TORCH_BYTES:
        stop(
            f"not enough disk space: installing torch takes about {TORCH_BYTES / 1e9:.0f} GB and "
            f"{folder} has {free / 1e9:.1f} GB free; give VENV= a folder on a larger disk"
        )


def pip_install(python, *what):
    """Shows what pip says as it comes, and turns its failures into one line."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2"]
    command += [] if sys.stdout.isatty() else ["-qq", "--progress-bar", "off"]
    run = subprocess.Popen(command + list(what), cwd=str(ROOT), stderr=subprocess.PIPE)
    log = []
    for line in run.stderr:
        log.append(line.decode(errors="replace"))
        sys.stderr.write(log[-1])
    if run.wait():
        name = " ".join(w for w in what if not w.startswith("--"))
        why = next((line.strip() for line in log if NO_INDEX.search(line)), None)
        if why:
            stop(
                f"could not install {name}: the package index cannot be reached or does not have "
                "it; check the network, or set PIP_INDEX_URL"
            )
        stop(f"could not install {name} (see above)")


def fingerprint(extras):
    text = (ROOT / "pyproject.toml").read_bytes()
    return {"root": str(ROOT), "extras": extras, "pyproject": hashlib.sha256(text).hexdigest()}


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="all,test")
    arguments = parser.parse_args()
    venv, extras = arguments.venv.absolute(), arguments.extras
    python, record = venv / "bin" / "python", venv / "fusedmlp-setup.json"

    have = packages(python)
    if have is None or "pip" not in have:
        if sys.version_info < PYTHON_AT_LEAST:
            stop(
                f"Python 3.11 or newer is needed, {sys.executable} is "
                f"{sys.version_info[0]}.{sys.version_info[1]}; give another one: make PYTHON=..."
            )
        make_venv(venv)
        have = packages(python)
    if "torch" not in have:
        check_space(venv)
        say("installing torch and torchvision, about 5 GB on disk")
        pip_install(python, "torch", "torchvision")
    elif "torchvision" not in have:
        pip_install(python, "torch==" + have["torch"], "torchvision")
    if int(have.get("setuptools", "0").split(".")[0]) < 71 or "ninja" not in have:
        pip_install(python, "--upgrade", "setuptools", "ninja")
    wanted = fingerprint(extras)
    if "fusedmlp" not in have or read_json(record) != wanted:
        say(f"installing the package with its extension, and the extras {extras}")
        pip_install(python, "--no-build-isolation", "-e", f".[{extras}]")
        record.write_text(json.dumps(wanted))
    build = [str(python), "setup.py", "-q", "build_native", "--editable-mode"]
    if subprocess.run(build, cwd=str(ROOT)).returncode:
        stop("the extension could not be built (see above)")


if __name__ == "__main__":
    os.environ.setdefault("PIP_NO_INPUT", "1")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
