# shellcheck shell=bash
# What the scripts for clusters share. They source this file, then call `run FLAGS...`.
#
#   DRY_RUN=1            check every flag, on any machine, and print each rank's command
#   DATA_PATH TOKENIZER  prefix of what tools/preprocess_data.py wrote, and a folder with
#                        tokenizer.json; without them the data are made up
#   CHECKPOINTS          where to save, and to go on from if something is there
#   NODES GPUS           machines, and GPUs of each
#   NODE_RANK MASTER_ADDR MASTER_PORT   of many machines: this one, and where all meet
#   IFACE                network interface between machines, where NCCL guesses wrong

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=python3
: "${NODES:=1}" "${GPUS:=8}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"

# Tensor parallelism overlaps best with one queue to the device.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Sub-sequences differ in length, so blocks of many sizes come and go.
export PYTORCH_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# NCCL: say what went wrong, and leave a dead peer after the flag's minutes, not never.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=1
if [[ -n ${IFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=$IFACE GLOO_SOCKET_IFNAME=$IFACE
fi

data_flags() {
  if [[ -n ${DATA_PATH:-} ]]; then
    : "${TOKENIZER:?a folder with tokenizer.json, to go with DATA_PATH}"
    flags+=(--data-path "$DATA_PATH" --split "99,1,0"
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
  else
    flags+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 32000)
  fi
}

# Save, go on from what is there, and save once more when the scheduler sends SIGTERM.
checkpoint_flags() {
  flags+=(--save "$1" --load "$1" --save-interval 500 --ckpt-format torch_dist
    --exit-signal-handler --distributed-timeout-minutes 20
    --tensorboard-dir "$1/tensorboard" --seq1f1b-metrics-file "$1/metrics.jsonl")
}

# Run the training script on this machine's GPUs, as one of NODES machines.
run() {
  if [[ ${DRY_RUN:-0} != 0 ]]; then
    dry_run "$@"
    return
  fi
  local meet=(--nnodes "$NODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  ((NODES > 1)) || meet=(--standalone)
  exec "$python" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$GPUS" \
    "$root/pretrain_gpt.py" "$@"
}

# Check the flags, and print the environment and the command of every rank.
dry_run() {
  local rank command
  "$python" -W ignore -m megatron.adaptor --check-flags $((NODES * GPUS)) \
    "$root/pretrain_gpt.py" "$@" || return
  printf -v command ' %q' "$python" "$root/pretrain_gpt.py" "$@"
  for ((rank = 0; rank < NODES * GPUS; rank++)); do
    printf 'node %d: RANK=%d LOCAL_RANK=%d WORLD_SIZE=%d MASTER_ADDR=%s MASTER_PORT=%s%s\n' \
      $((rank / GPUS)) "$rank" $((rank % GPUS)) $((NODES * GPUS)) \
      "$MASTER_ADDR" "$MASTER_PORT" "$command"
  done
}
