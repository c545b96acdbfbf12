#!/usr/bin/env bash
# Makes every table that needs a GPU, on a machine with one, into benchmarks/results/gpu.
# Takes the device's name, versions and date along. It runs in the project's environment, or with
# PYTHON. Where a torch is installed and no network is there (see tools/wheels.sh):
#     SEQ1F1B_WHEELS=FOLDER bash benchmarks/gpu.sh
# Names of scripts beside it make only their tables: bash benchmarks/gpu.sh layer waiting
# SMALL=1 makes every table in miniature, on a CPU too; RESULTS names another folder for them.
set -euo pipefail
cd "$(dirname "$0")/.."
tables=" attention layer replay one_gpu segments offload_gpu host waiting "
for name; do
    [[ $tables == *" $name "* ]] || {
        echo "benchmarks/gpu.sh: $name is none of its tables:$tables" >&2
        exit 2
    }
done
wanted=" ${*:-$tables} plots "
if [[ -n ${SEQ1F1B_WHEELS:-}${SEQ1F1B_SYSTEM_TORCH:-} ]]; then
    python=$(bash tools/setup_env.sh) || exit 1
else
    python=${PYTHON:-.venv/bin/python}
    [ -x "$python" ] || python=python
fi
small=${SMALL:-0}
if [[ $small != 1 ]]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "benchmarks/gpu.sh: $python finds no CUDA device; SMALL=1 makes the tables in miniature" >&2
        exit 2
    }
fi
results=${RESULTS:-benchmarks/results/gpu}
mkdir -p "$results"
failed=0

# A table that fails, for want of memory say, does not take the others along.
table() {
    [[ $wanted == *" $(basename "$1" .py) "* ]] || return 0
    "$python" "$@" || { echo "benchmarks/gpu.sh: failed: $*" >&2; failed=1; }
}

# of FULL -- TINY: the one or the other, in the array sizes.
of() {
    sizes=()
    local is_tiny=0 word
    for word; do
        if [[ $word == -- ]]; then
            is_tiny=1
        elif [[ $is_tiny == "$small" ]]; then
            sizes+=("$word")
        fi
    done
}

# Attention of a 7B model: ours over one whole call and over concatenation, with peak memory.
of --lengths 8192 16384 32768 65536 131072 -- \
    --lengths 64 96 --heads 4 --groups 4 --head-size 16 --rounds 1
table benchmarks/attention.py "${sizes[@]}" --output "$results/attention"
# A quarter of the heads for keys and values, as Llama 3 has.
of --groups 8 --lengths 32768 -- --groups 2 --lengths 64 --heads 4 --head-size 16 --rounds 1
table benchmarks/attention.py "${sizes[@]}" --output "$results/attention-grouped"

# One layer of it, the same.
of --lengths 8192 16384 32768 65536 131072 --hidden-size 4096 --heads 32 --dtype bfloat16 -- \
    --lengths 64 96 --hidden-size 32 --splits 1 3 --rounds 1
table benchmarks/layer.py "${sizes[@]}" --output "$results/layer"

# A stage of a 7B model on 8 stages (4 layers, in up to 4 model chunks), timed and weighed alone and
# replayed for 8 stages.
of 16384 32768 65536 131072 -- 64
for length in "${sizes[@]}"; do
    of --hidden-size 4096 --heads 32 --vocab-size 32000 --dtype bfloat16 --shapes 8x8 8x16 \
        --rounds 3 -- --hidden-size 32 --shapes 4x8 --splits 1 4 --rounds 1
    table benchmarks/replay.py --layers 4 --length "$length" --chunks 1 2 4 "${sizes[@]}" \
        --output "$results/replay-$length"
done

# Real processes on the one device, and what the allocator loses between lengths that differ.
of --stages 2 4 -- --stages 2 --layers 2 --length 128 --micro-batches 2 --iterations 2
table benchmarks/one_gpu.py "${sizes[@]}" --output "$results/one_gpu"
of -- --layers 2 --length 64 --iterations 2 --micro-batches 2 --cuts 2:uniform_comp
table benchmarks/segments.py ${sizes[@]+"${sizes[@]}"} --output "$results/segments"

# Model chunks in host memory: the same losses and weights, step time, memory, and a trace of copies.
of --layers 16 --length 4096 -- --layers 8 --length 64 --iterations 3 --micro-batches 2 --rounds 1
table benchmarks/offload_gpu.py "${sizes[@]}" --traces "$results/traces" --output "$results/offload"

# What the executor costs the host, and whether the device ever waits for it.
of -- --micro-batches 4 --rounds 1
table benchmarks/host.py ${sizes[@]+"${sizes[@]}"} --output "$results/host"
of --lengths 512 1024 2048 4096 8192 --layers 4 --hidden-size 4096 --heads 32 --dtype bfloat16 -- \
    --lengths 32 --hidden-size 32 --splits 2 --warmup 1
table benchmarks/waiting.py "${sizes[@]}" --traces "$results/traces" --output "$results/waiting"

# Pictures of what has been made.
shopt -s nullglob
drawable=("$results"/attention*.json "$results"/layer*.json "$results"/replay-*.json)
((${#drawable[@]})) && table benchmarks/plots.py "${drawable[@]}" --output "$results/images"
exit $failed
