#!/usr/bin/env bash
# Pre-train a 7B GPT on 32k tokens on one machine with 8 GPUs: 4 stages, tensor parallelism 2.
#   bash examples/one_node.sh                  data are made up; common.sh lists the settings
#   DRY_RUN=1 bash examples/one_node.sh        check the flags and print each rank's command
#   DATA_PATH=data/codeparrot/codeparrot_content_document \
#   TOKENIZER=data/codeparrot/tokenizer bash examples/one_node.sh
# Further flags are passed on: bash examples/one_node.sh --seq1f1b-splits 8
set -euo pipefail
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags=(
  --num-layers 32 --hidden-size 4096 --num-attention-heads 32
  --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
  --untie-embeddings-and-output-weights
  --seq-length 32768 --max-position-embeddings 32768
  --attention-dropout 0 --hidden-dropout 0
  --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --seq1f1b-splits 4 --seq1f1b-balance-method uniform_comp
  --micro-batch-size 1 --global-batch-size 16 --train-iters 10000 --bf16
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 200 --weight-decay 0.1
  --eval-interval 500 --eval-iters 10 --log-interval 10
)
data_flags
checkpoint_flags "${CHECKPOINTS:-checkpoints/7b}"
run "${flags[@]}" "$@"
