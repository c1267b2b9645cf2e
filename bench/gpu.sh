#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: bash bench/gpu.sh [all|build|test|sanitize|bench|tune] (make gpu).
# Runs with $PYTHON as it is: installs nothing and needs no network; a missing package skips what
# needs it. Leaves 9 files in $RESULTS: machine.json, build.txt, test.txt, junit.xml, sanitize.txt,
# bench.txt, steps.json, ops.json and summary.tsv, which the closing table is made from; what an
# earlier call left stays. Each part ends within 8 minutes and can be called alone; 1 is returned when
# one of those called failed. Not in `all`, as it takes several calls: `tune` times tiles for the
# layers that bench.run times, which then takes them; each call goes on where the last was cut off.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-bench/results/gpu}
PARTS=(build test sanitize bench)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

stop() { echo "gpu: $*" >&2; exit 1; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

limited() {  # limited SECONDS COMMAND...: a command that is cut off says so
    local seconds=$1; shift
    timeout --kill-after=10 "$seconds" "$@"
    local status=$?
    [ $status -lt 124 ] || echo "gpu: cut off after $seconds s: $*"
    return $status
}

part_build() {  # for the present architecture only, in place
    local arch
    arch=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability(0))") || return 1
    has setuptools || { echo "gpu: $PYTHON has no setuptools: nothing is built"; return 1; }
    TORCH_CUDA_ARCH_LIST=$arch FUSEDMLP_BUILD=cuda \
        limited 400 "$PYTHON" setup.py -q build_native --editable-mode && return 0
    echo "gpu: without CUDA:"
    FUSEDMLP_BUILD=auto limited 60 "$PYTHON" setup.py -q build_native --editable-mode
    return 1
}

part_test() {  # first what needs the GPU, the most important files first, then the rest
    has pytest || { echo "gpu: $PYTHON has no pytest: no test was run"; return 1; }
    local status=0 name file files=() options=(--continue-on-collection-errors --tb=line -q)
    local workers=$(($(nproc) < 12 ? $(nproc) : 12))
    has xdist && options+=(-n "$workers" --dist worksteal)
    has pytest_timeout && options+=(--timeout 60)
    for name in cuda_extension triton "graph_*" ops mlp_op corners cross_entropy "*"; do
        for file in tests/*/test_$name.py tests/test_$name.py; do
            [[ ! -e $file || " ${files[*]} " == *" $file "* ]] || files+=("$file")
        done
    done
    limited 280 "$PYTHON" -m pytest -m gpu "${options[@]}" -rfE --junitxml "$RESULTS/junit.xml" \
        "${files[@]}" || status=1
    limited 180 "$PYTHON" -m pytest -m "not gpu and not slow" "${options[@]}" -rfE || status=1
    return $status
}

part_sanitize() {  # the tests marked sanitize: one small case a kernel
    local tool status=0
    has pytest || { echo "gpu: $PYTHON has no pytest: nothing was sanitized"; return 1; }
    PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
    command -v compute-sanitizer >/dev/null || { echo "gpu: no compute-sanitizer"; return 3; }
    for tool in memcheck racecheck initcheck synccheck; do
        echo "== $tool"
        # without torch's caching, so that each tensor has bounds of its own
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 110 compute-sanitizer --tool "$tool" \
            --target-processes all --error-exitcode 9 "$PYTHON" -m pytest -m sanitize -q \
            --continue-on-collection-errors -p no:cacheprovider || status=1
    done
    return $status
}

part_bench() {  # whole training steps and epochs, then ops and networks
    local status=0
    limited 180 "$PYTHON" -m bench.steps --device cuda --seconds 150 --out "$RESULTS/steps.json" || status=1
    limited 290 "$PYTHON" -m bench.run --suite gpu --seconds 250 --resume --out "$RESULTS/ops.json" ||
        status=1
    return $status
}

part_tune() {
    limited 470 "$PYTHON" -m fusedmlp tune --missing --dtype bf16 \
        256x784x256 256x256x10 4096x784x256 4096x256x10 16384x784x256 16384x256x10 \
        8192x1024x4096 8192x4096x1024 8192x4096x16384 8192x16384x4096
}

run_part() {
    local part=$1 log=$RESULTS/$1.txt start=$SECONDS status word note
    echo "== gpu: $part"
    "$PYTHON" -m bench.record "$RESULTS/machine.json" "$part before"
    "part_$part" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    "$PYTHON" -m bench.record "$RESULTS/machine.json" "$part after"
    case $status in 0) word=ok ;; 3) word=skipped ;; *) word=FAILED ;; esac
    note=$(grep -aE '^gpu: |^fusedmlp: | (passed|failed|error).* in [0-9.]+s' "$log" | tail -n 1)
    [ -n "$note" ] || note=$(tail -n 1 "$log")
    touch "$RESULTS/summary.tsv"
    grep -v "^$part	" "$RESULTS/summary.tsv" >"$RESULTS/summary.new"
    printf '%s\t%s\t%d\t%s\n' "$part" "$word" $((SECONDS - start)) "${note//	/ }" >>"$RESULTS/summary.new"
    mv "$RESULTS/summary.new" "$RESULTS/summary.tsv"
    [ $word != FAILED ]
}

case ${1:-all} in
    all) wanted=("${PARTS[@]}") ;;
    build | test | sanitize | bench | tune) wanted=("$1") ;;
    *) stop "unknown part '$1'; known: all ${PARTS[*]} tune" ;;
esac
command -v "$PYTHON" >/dev/null || stop "no $PYTHON here; give one: PYTHON=..."
has torch || stop "$PYTHON has no torch"
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available() or bool(torch.version.hip))" ||
    stop "no NVIDIA GPU that torch can use"
mkdir -p "$RESULTS" || stop "cannot write to $RESULTS"

failed=0
for part in "${wanted[@]}"; do run_part "$part" || failed=1; done
echo
awk -F '\t' 'BEGIN { printf "%-9s %-8s %8s  %s\n", "part", "result", "seconds", "" }
             { printf "%-9s %-8s %8d  %s\n", $1, $2, $3, substr($4, 1, 100) }' "$RESULTS/summary.tsv"
exit $failed
