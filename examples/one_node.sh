#!/usr/bin/env bash
# Pre-train a 7B GPT on 32k tokens on one machine with 8 GPUs: 4 stages, tensor parallelism 2.
#   DATA_PATH=data/codeparrot/codeparrot_content_document \
#   TOKENIZER=data/codeparrot/tokenizer bash examples/one_node.sh
# Further flags are passed on: bash examples/one_node.sh --seq1f1b-splits 8
set -euo pipefail

: "${DATA_PATH:?the prefix of the .bin and .idx files that tools/preprocess_data.py wrote}"
: "${TOKENIZER:?a folder with tokenizer.json}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Tensor parallelism overlaps best with one queue to the device.
export CUDA_DEVICE_MAX_CONNECTIONS=1

exec torchrun --standalone --nproc-per-node "${GPUS:-8}" "$root/pretrain_gpt.py" \
  --num-layers 32 --hidden-size 4096 --num-attention-heads 32 \
  --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \
  --untie-embeddings-and-output-weights \
  --seq-length 32768 --max-position-embeddings 32768 \
  --attention-dropout 0 --hidden-dropout 0 \
  --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 \
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
  --seq1f1b-splits 4 --seq1f1b-balance-method uniform_comp \
  --micro-batch-size 1 --global-batch-size 16 --train-iters 10000 \
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 200 --weight-decay 0.1 \
  --bf16 --data-path "$DATA_PATH" --split 99,1,0 \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --eval-interval 500 --eval-iters 10 --log-interval 10 \
  --save "${CHECKPOINTS:-checkpoints/7b}" --load "${CHECKPOINTS:-checkpoints/7b}" \
  --save-interval 500 --ckpt-format torch_dist \
  --seq1f1b-metrics-file "${CHECKPOINTS:-checkpoints/7b}/metrics.jsonl" "$@"
