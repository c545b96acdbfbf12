#!/usr/bin/env bash
# Pre-train a 30B GPT on 64k tokens on 8 machines with 8 GPUs each: tensor parallelism 8, 8 stages.
# On every machine, with its own NODE_RANK from 0:
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/many_nodes.sh
#   DRY_RUN=1 bash examples/many_nodes.sh      check the flags and print each rank's command
# The data and the checkpoints lie on a file system that all machines share. The same command goes
# on from the last checkpoint. Settings: common.sh. Further flags are passed on.
set -euo pipefail
: "${NODES:=8}"
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags=(
  --num-layers 64 --hidden-size 6144 --num-attention-heads 64
  --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
  --untie-embeddings-and-output-weights
  --seq-length 65536 --max-position-embeddings 65536
  --attention-dropout 0 --hidden-dropout 0
  --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 8
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --seq1f1b-splits 4 --seq1f1b-balance-method uniform_comp
  --micro-batch-size 1 --global-batch-size 16 --train-iters "${TRAIN_ITERS:-10000}" --bf16
  --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 500 --weight-decay 0.1
  --eval-interval 500 --eval-iters 10 --log-interval 10
)
data_flags
checkpoint_flags "${CHECKPOINTS:-checkpoints/30b}"
if [[ -n ${RANK:-} ]]; then
  # The scheduler has started a process per GPU: be this one.
  exec "$python" "$root/pretrain_gpt.py" "${flags[@]}" "$@"
fi
run "${flags[@]}" "$@"
