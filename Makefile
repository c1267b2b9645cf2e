# `make` alone lists the targets. PYTHON= is what the environment is made with, VENV= where it is or goes.
# EXTRAS=all,test,integrations adds Lightning, skorch, ONNX and dask (about 200 MB) and so runs their tests too.
PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= all,test
WORKERS ?= auto
ARGS    ?=
RESULTS ?= bench/results/gpu
DATA    ?= $(FUSEDMLP_DATA)
PART    ?= all

PY     = $(VENV)/bin/python
CLANG  = $(shell PATH="$(VENV)/bin:$$PATH" command -v clang-format)
CSRC   = $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h tests/ptx/*.cpp tests/ptx/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup test sanitize mutants fuzz train lint format bench kernels evidence semantics numerics faults readme \
        figures release gpu verify info clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) ARGS="..." RESULTS=folder PART=first|measure|deep'

setup:  ## make the environment (torch: about 5 GB) and build the package and its extension into it
	@command -v "$(PYTHON)" >/dev/null || { echo 'setup: no $(PYTHON) here; give one: make PYTHON=...' >&2; exit 1; }
	@"$(PYTHON)" build_tools/environment.py --venv "$(VENV)" --extras "$(EXTRAS)"

test: setup lint  ## lint, then every test that this machine can run; ARGS go to pytest
	@# one OpenMP thread a worker: with as many threads as cores in each, two workers took twice as long
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

sanitize: setup  ## drive the C++ core from real threads under ThreadSanitizer, AddressSanitizer and UBSan; ARGS: --only, --seed, --rounds
	$(PY) -m build_tools.sanitize $(ARGS)

mutants: setup  ## break one line at a time, at random, and see that a test fails; ARGS: --seed, --kind, --count, --again
	$(PY) -m build_tools.mutants $(ARGS)

fuzz: setup  ## feed damaged files to every reader and words to the command; ARGS: --seconds, --seed, --only
	$(PY) -m build_tools.fuzz $(ARGS)

train: setup  ## train the first MLP on Fashion-MNIST, or on digits without a network; ARGS go to fusedmlp train
	$(VENV)/bin/fusedmlp train --dataset auto $(ARGS)

lint: setup  ## ruff, and the formats of Python and C++
	$(PY) -m ruff check -q .
	@$(PY) -m ruff format -q --check . || { echo 'lint: the files above are not formatted; run make format' >&2; exit 1; }
	@$(if $(and $(CLANG),$(CSRC)),$(CLANG) --dry-run -Werror $(CSRC),true)

format: setup  ## put Python and C++ into the project's format
	$(PY) -m ruff check -q --fix . ; $(PY) -m ruff format .
	@$(if $(and $(CLANG),$(CSRC)),$(CLANG) -i $(CSRC),true)

bench: setup  ## time the ops against eager and compiled PyTorch; ARGS replace --suite cpu --out FILE
	$(PY) -m bench.run $(or $(ARGS),--suite cpu --out bench/results/cpu.json)

kernels: setup  ## compile each GPU kernel and list registers, spills and tensor-core instructions
	@if [ -f fusedmlp/_native_cuda.so ]; then $(PY) -m bench.cuda_kernels; else echo 'kernels: the CUDA extension is not built; make info says why'; fi
	$(PY) -m bench.kernels $(ARGS)

evidence: setup  ## count what each GPU kernel did in the tests without a GPU, for docs/kernels.md
	$(PY) -m bench.evidence $(ARGS)

semantics: setup  ## run what Triton makes of each GPU kernel on the CPU, in .venv-semantics (Python 3.12, 5 GB)
	$(PY) -m bench.semantics $(ARGS)

numerics: setup  ## every case of the table on every backend and instruction set of this CPU, the same bits, and 2^31 elements
	$(PY) -m bench.numerics $(ARGS)

faults: setup  ## inject faults (kills, full disks, no memory, damaged files) and count what survives; ARGS: --few, --only, --seed
	$(PY) -m bench.faults $(or $(ARGS),--out bench/results/faults.json)

figures: setup  ## measure the times, sizes and accuracies that are shown, on a quiet machine, in some hours; DATA=folder of Fashion-MNIST
	@test -n "$(DATA)" || { echo 'figures: DATA must be a folder with Fashion-MNIST' >&2; exit 2; }
	$(PY) -m bench.saved_bytes
	$(PY) -m bench.kernels --dropout-instructions --out bench/results/dropout_instructions.json
	$(PY) -m bench.run --suite cpu --threads 2 --budget 0.4 --out bench/results/cpu.json
	$(PY) -m bench.steps --threads 2 --busy 0 1 2 --starts 8 --budget 1 --out bench/results/engine_step.json
	$(PY) -m bench.steps --group batch width depth threads ensemble --threads 1 2 --out bench/results/engine_scaling.json
	$(PY) -m bench.steps --group rivals --threads 2 --busy 0 1 2 --starts 8 --budget 2 --steps 32 --out bench/results/rivals.json
	rm -f bench/results/never_slower.json bench/results/tabular.json
	$(PY) -m bench.never_slower --threads 2 --nets 300 --seed 7 --out bench/results/never_slower.json
	$(PY) -m bench.crossval --data-dir "$(DATA)" --threads 2 --rounds 5
	$(PY) -m bench.train --data-dir "$(DATA)" --threads 2 --part time seeds parity --parity-seeds 3 --steps 1 50 500 5000
	$(PY) -m bench.tabular
	$(PY) -m bench.tabular --ways TabM_D --splits 1
	$(PY) -m bench.report

readme: setup  ## write the README's tables from the results files
	$(PY) -m bench.report $(ARGS)

release: setup  ## build the archives, check them, install them in fresh environments (20 GB); ARGS: --rows, --clang
	@$(PY) -m uv --version >/dev/null 2>&1 || $(PY) -m pip install -q uv
	$(PY) -m build_tools.release $(ARGS)

gpu:  ## on an NVIDIA GPU, with PYTHON as it is, into RESULTS: PART=first (right?), measure, deep; REHEARSE=1 on a CPU
	@PYTHON="$(PYTHON)" RESULTS="$(RESULTS)" REHEARSE="$(REHEARSE)" bash bench/gpu.sh $(PART)

verify: setup  ## check every backend of this machine against fp64, now
	$(VENV)/bin/fusedmlp verify $(ARGS)

info: setup  ## versions, devices, and what each op would run on
	$(VENV)/bin/fusedmlp info $(ARGS)

clean:  ## remove what was built; the environment and runs/ stay
	rm -rf build dist *.egg-info fusedmlp/_native_*.so fusedmlp/_build_info.json .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
