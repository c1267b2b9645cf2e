#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in three parts (make gpu PART="first measure"), or steps of them alone:
#   first    is it right?     build smoke tests sanitize steps layers
#   measure  what to take     build tune grid elementwise
#   deep     why              build counters compiled epochs memcheck
# Each part ends within 560 seconds and leaves what it has if it is cut off: its log PART.txt, the
# clocks in machine.json, a line for each step in summary.tsv, and at most five files more. Installs
# nothing, needs no network, and runs with $PYTHON as it is; a missing package or tool skips what needs
# it. What an earlier call left in $RESULTS stays. Fashion-MNIST is looked for in $FUSEDMLP_DATA and
# .data, else epochs are timed on noise. Exit status 1 if a step failed.
# REHEARSE=1: the same steps without a GPU, small and on the CPU, or only collected.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-bench/results/gpu}
REHEARSE=${REHEARSE:-}
PART_SECONDS=${PART_SECONDS:-550}
declare -A STEPS=(
    [first]="build smoke tests sanitize steps layers"
    [measure]="build tune grid elementwise"
    [deep]="build counters compiled epochs memcheck"
)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
[ -n "${FUSEDMLP_DATA:-}" ] || [ ! -d .data ] || export FUSEDMLP_DATA="$PWD/.data"

stop() { echo "gpu: $*" >&2; exit 1; }
python() { "$PYTHON" "$@"; }
has() { [[ " $FOUND " == *" $1 "* ]]; }
skip() { echo "gpu: $*: skipped"; return 3; }

within() {  # within SECONDS: so many, or what the part has left
    local left=$((UNTIL - SECONDS))
    echo $(($1 < left ? $1 : left))
}

limited() {  # limited SECONDS COMMAND...: a command that is cut off says so
    local seconds status
    seconds=$(within "$1"); shift
    [ "$seconds" -gt 0 ] || { echo "gpu: no time left for: $*"; return 1; }
    timeout --kill-after=5 "$seconds" "$@"
    status=$?
    [ $status -lt 124 ] || echo "gpu: cut off after $seconds s: $*"
    return $status
}

# --- steps: in a rehearsal each runs what a CPU can do of it ---------------------------------------

step_build() {  # for the present architecture only, in place; up to date in a second
    local toolkit="from build_tools.toolchain import *; print('nvcc', Nvcc(Torch()).version, find_ninja())"
    if [ "$REHEARSE" ]; then limited 60 "$PYTHON" -c "$toolkit"; return; fi
    has setuptools || { echo "gpu: $PYTHON has no setuptools: nothing is built"; return 1; }
    TORCH_CUDA_ARCH_LIST=$ARCH FUSEDMLP_BUILD=cuda \
        limited 200 "$PYTHON" setup.py -q build_native --editable-mode && return 0
    echo "gpu: without CUDA:"
    FUSEDMLP_BUILD=auto limited 60 "$PYTHON" setup.py -q build_native --editable-mode
    return 1
}

step_smoke() {
    if [ "$REHEARSE" ]; then
        TRITON_INTERPRET=1 limited 120 "$PYTHON" -m bench.smoke --device cpu --out "$RESULTS/machine.json"
    else
        limited 60 "$PYTHON" -m bench.smoke --out "$RESULTS/machine.json"
    fi
}

step_tests() {  # of the GPU, side by side, the most important files first
    has pytest || { echo "gpu: $PYTHON has no pytest: no test was run"; return 1; }
    local name file files=() options=(-m gpu --continue-on-collection-errors --tb=line -q -rfE)
    local workers=$(($(nproc) < 12 ? $(nproc) : 12))
    for name in cuda_extension triton "graph_*" ops mlp_op corners cross_entropy "*"; do
        for file in tests/*/test_$name.py tests/test_$name.py; do
            [[ ! -e $file || " ${files[*]} " == *" $file "* ]] || files+=("$file")
        done
    done
    has pytest_timeout && options+=(--timeout 60)
    if [ "$REHEARSE" ]; then
        limited 120 "$PYTHON" -m pytest "${options[@]}" --collect-only "${files[@]}" | tail -n 20
        return "${PIPESTATUS[0]}"
    fi
    options+=(--junitxml "$RESULTS/junit.xml")
    has xdist && options+=(-n "$workers" --dist worksteal)
    limited 230 "$PYTHON" -m pytest "${options[@]}" "${files[@]}"
}

step_sanitize() {  # each CUDA kernel, launched without torch
    local tool status=0
    if [ "$REHEARSE" ]; then limited 300 "$PYTHON" -m tests.ptx.harness --machine; return; fi
    command -v compute-sanitizer >/dev/null || { skip "no compute-sanitizer"; return; }
    for tool in memcheck racecheck synccheck initcheck; do
        echo "== $tool"
        limited 40 compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
            "$PYTHON" -m tests.ptx.harness || status=1
    done
    return $status
}

step_steps() {  # training steps of the graph engine, of eager and of a graph of eager
    local small=(--device cpu --dims 12-16-3 --rows 512 --steps 4 --budget 0.2 --precision fp32)
    [ "$REHEARSE" ] || small=(--device cuda --seconds "$(within 60)")
    limited 75 "$PYTHON" -m bench.steps --group ways --ways eager "${small[@]}" --out "$RESULTS/steps.json"
}

run_ops() {  # run_ops SECONDS FILE SMALL CASES...: SMALL is what of it a rehearsal times
    local seconds file=$RESULTS/$2 small=$3
    seconds=$(within "$1")
    if [ "$REHEARSE" ]; then
        # shellcheck disable=SC2086
        limited "$seconds" "$PYTHON" -m bench.run $small --budget 0.02 --out "$file"
    else
        limited $((seconds + 20)) "$PYTHON" -m bench.run "${@:4}" --seconds "$seconds" --resume --out "$file"
    fi
}

step_layers() {
    run_ops 90 ops.json "--op linear_act --m 64 --dims 32-16 --mode fwd+bwd --p 0.1" \
        --suite gpu --group block step narrow \
        --providers eager auto native triton graph "auto graph" floor
}

step_tune() {  # the table of measured choices for this card
    local layers=(256x784x256 256x256x10 4096x784x256 4096x256x10 16384x784x256 16384x256x10
        8192x1024x4096 8192x4096x1024 8192x4096x16384 8192x16384x4096)
    if [ "$REHEARSE" ]; then limited 60 "$PYTHON" -m fusedmlp tune --help; return; fi
    limited 240 "$PYTHON" -m fusedmlp tune --missing --dtype bf16 "${layers[@]}"
    local status=$?
    cp "${XDG_CACHE_HOME:-$HOME/.cache}"/fusedmlp/*.json "$RESULTS" || status=1
    return $status
}

step_grid() {
    run_ops 170 grid.json "--op layer --m 64 --dims 32-16 --mode fwd+bwd" \
        --suite gpu-grid --providers eager auto native triton
}

step_elementwise() {
    run_ops 60 elementwise.json "--op bias_act_dropout --m 64 --dims 64 --mode fwd+bwd --p 0.5" \
        --suite gpu --group elementwise --providers eager auto native triton floor
}

step_counters() {  # shares of the memory's and of the tensor cores' rate, and occupancy
    local calls=(-m bench.smoke --large) ncu
    if [ "$REHEARSE" ]; then
        limited 120 "$PYTHON" "${calls[@]}" --device cpu --backend reference --scale 64; return
    fi
    command -v ncu >/dev/null || { skip "no ncu"; return; }
    ncu=(--clock-control none --csv --log-file "$RESULTS/counters.csv")
    ncu+=(--section SpeedOfLight --section Occupancy --section ComputeWorkloadAnalysis)
    ncu+=(--kernel-name 'regex:linear_act|dgrad_act|bias_act|cross_entropy|column_sum')
    limited 100 ncu "${ncu[@]}" "$PYTHON" "${calls[@]}"
}

step_compiled() {  # beside torch.compile: steps, then two blocks and whole networks
    local status=0 small=(--device cpu --dims 12-16-3 --rows 512 --steps 4 --budget 0.2 --precision fp32)
    [ "$REHEARSE" ] || small=(--device cuda --precision bf16 --seconds "$(within 80)")
    limited 100 "$PYTHON" -m bench.steps --group ways --ways compile "${small[@]}" \
        --out "$RESULTS/compiled_steps.json" || status=1
    run_ops 110 compiled.json "--op net --m 64 --dims 12-16-3 --providers eager auto" \
        --suite gpu --group block step --providers eager compile max-autotune auto floor || status=1
    return $status
}

step_epochs() {  # ten epochs by ten seeds
    local small=(--device cpu --rows 512 --epochs 1 --seeds 1 --precision fp32)
    [ "$REHEARSE" ] || small=(--device cuda --precision bf16 --seeds 10 --seconds "$(within 110)")
    limited 130 "$PYTHON" -m bench.steps --group epochs "${small[@]}" --out "$RESULTS/epochs.json"
}

step_memcheck() {  # the ops through torch, Triton's kernels among them
    if [ "$REHEARSE" ]; then
        limited 120 "$PYTHON" -m bench.smoke --device cpu --backend reference; return
    fi
    command -v compute-sanitizer >/dev/null || { skip "no compute-sanitizer"; return; }
    # without torch's caching, so that each tensor has bounds of its own
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 90 compute-sanitizer --tool memcheck \
        --kernel-name kernel_substring=_act_ --error-exitcode 9 "$PYTHON" -m bench.smoke
}

# --- what runs them --------------------------------------------------------------------------------

run_step() {  # run_step PART STEP: adds its line to the summary
    local part=$1 step=$2 start=$SECONDS log=$RESULTS/$1.txt from status word note
    echo "== gpu: $step" | tee -a "$log"
    from=$(wc -l <"$log")
    "step_$step" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in 0) word=ok ;; 3) word=skipped ;; *) word=FAILED ;; esac
    note=$(tail -n +$((from + 1)) "$log" |
        grep -aE '^gpu: |^fusedmlp: |^smoke: | (passed|failed|error|wrong|collected)' | tail -n 1)
    [ -n "$note" ] || note=$(tail -n 1 "$log")
    touch "$RESULTS/summary.tsv"
    grep -v "^$part	$step	" "$RESULTS/summary.tsv" >"$RESULTS/summary.new"
    printf '%s\t%s\t%s\t%d\t%s\n' "$part" "$step" "$word" $((SECONDS - start)) "${note//	/ }" \
        >>"$RESULTS/summary.new"
    mv "$RESULTS/summary.new" "$RESULTS/summary.tsv"
    [ $word != FAILED ]
}

clocks() { [ "$REHEARSE" ] || "$PYTHON" -m bench.record "$RESULTS/machine.json" "$1"; }

run_part() {  # run_part PART STEP...
    local part=$1 step failed=0
    shift
    : >"$RESULTS/$part.txt"
    UNTIL=$((SECONDS + PART_SECONDS))
    clocks "$part before"
    for step in "$@"; do run_step "$part" "$step" || failed=1; done
    clocks "$part after"
    return $failed
}

wanted=("$@")
[ ${#wanted[@]} -gt 0 ] && [ "${wanted[0]}" != all ] || wanted=(first measure deep)
for name in "${wanted[@]}"; do
    [[ " ${!STEPS[*]} ${STEPS[*]} " == *" $name "* ]] ||
        stop "unknown part or step '$name'; known: all, first (${STEPS[first]}), measure" \
            "(${STEPS[measure]}), deep (${STEPS[deep]})"
done
command -v "$PYTHON" >/dev/null || stop "no $PYTHON here; give one: PYTHON=..."
# What is there of the packages, then the GPU's architecture.
FOUND=$(python - <<'END'
import importlib.util as u
print(*(n for n in ("torch", "setuptools", "pytest", "xdist", "pytest_timeout") if u.find_spec(n)))
END
)
has torch || stop "$PYTHON has no torch"
if [ "$REHEARSE" ]; then ARCH=9.0; else
    ARCH=$(python -c "import torch; assert torch.cuda.is_available() and not torch.version.hip
print('%d.%d' % torch.cuda.get_device_capability(0))" 2>/dev/null) ||
        stop "no NVIDIA GPU that torch can use; REHEARSE=1 runs the steps without one"
fi
mkdir -p "$RESULTS" || stop "cannot write to $RESULTS"
[ -z "$REHEARSE" ] || export TORCH_CUDA_ARCH_LIST=$ARCH CUDA_VISIBLE_DEVICES=""

failed=0
for name in "${wanted[@]}"; do
    # shellcheck disable=SC2086
    if [ -n "${STEPS[$name]:-}" ]; then run_part "$name" ${STEPS[$name]} || failed=1
    else run_part "$name" "$name" || failed=1; fi
done
echo
awk -F '\t' '{ printf "%-9s %-12s %-8s %5d s  %s\n", $1, $2, $3, $4, substr($5, 1, 90) }' "$RESULTS/summary.tsv"
exit $failed
