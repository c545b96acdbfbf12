#!/usr/bin/env bash
# Makes every table that needs a GPU, on a machine with one, into benchmarks/results/gpu.
# Run it in the project's environment (.venv). Takes the device's name, versions and date along.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "benchmarks/gpu.sh: $python finds no CUDA device; the same scripts run on a CPU one by one" >&2
    exit 2
}
results=benchmarks/results/gpu
mkdir -p "$results"
failed=0

# A table that fails, for want of memory say, does not take the others along.
table() {
    "$python" "$@" || { echo "benchmarks/gpu.sh: failed: $*" >&2; failed=1; }
}

# Attention of a 7B model: ours over one whole call and over concatenation, with peak memory.
table benchmarks/attention.py --lengths 8192 16384 32768 65536 131072 \
    --output "$results/attention"
# A quarter of the heads for keys and values, as Llama 3 has.
table benchmarks/attention.py --groups 8 --lengths 32768 --output "$results/attention-grouped"

# One layer of it, the same.
table benchmarks/layer.py --lengths 8192 16384 32768 65536 131072 --hidden-size 4096 --heads 32 \
    --dtype bfloat16 --output "$results/layer"

# A stage of a 7B model on 8 stages (4 layers, in up to 4 model chunks), timed and weighed alone and
# replayed for 8 stages.
for length in 16384 32768 65536 131072; do
    table benchmarks/replay.py --layers 4 --hidden-size 4096 --heads 32 --vocab-size 32000 \
        --length "$length" --dtype bfloat16 --shapes 8x8 8x16 --chunks 1 2 4 --rounds 3 \
        --output "$results/replay-$length"
done

# Real processes on the one device, and what the allocator loses between lengths that differ.
table benchmarks/one_gpu.py --stages 2 4 --output "$results/one_gpu"
table benchmarks/segments.py --output "$results/segments"

# What the executor costs the host, and whether the device ever waits for it.
table benchmarks/host.py --output "$results/host"
table benchmarks/waiting.py --lengths 512 1024 2048 4096 8192 --layers 4 --hidden-size 4096 \
    --heads 32 --dtype bfloat16 --traces "$results/traces" --output "$results/waiting"

# Pictures of what has been made.
shopt -s nullglob
drawable=("$results"/attention*.json "$results"/layer*.json "$results"/replay-*.json)
((${#drawable[@]})) && table benchmarks/plots.py "${drawable[@]}" --output "$results/images"
exit $failed
