"""Megatron's flags that change memory or time in a way that the planner does not model."""

_RECURRENT = "layers other than attention and MLP are not modelled"
_SHARDED = "sharded weights are not modelled; --use-distributed-optimizer is"
_PRECISION = "only bf16, fp16 and fp32 are modelled"
_OFFLOADED = "offloading is not modelled; recomputation is"
_DELAYED = "delayed weight gradients are not modelled; --seq1f1b-schedule zb-h1 is"
_GRAPHS = "CUDA graphs are not modelled: leave it out"

REFUSED: dict[str, str] = {
    "--fp8-format": _PRECISION,
    "--fp4-format": _PRECISION,
    "--fp8-param-gather": _PRECISION,
    "--fp4-param-gather": _PRECISION,
    "--fp32-residual-connection": "residual connections in fp32 are not modelled",
    "--use-megatron-fsdp": _SHARDED,
    "--use-torch-fsdp2": _SHARDED,
    "--tensor-parallel-num-weight-shards": _SHARDED,
    "--expert-tensor-parallel-num-weight-shards": _SHARDED,
    "--num-distributed-optimizer-instances": "one instance is modelled",
    "--cpu-offloading-num-layers": _OFFLOADED,
    "--fine-grained-activation-offloading": _OFFLOADED,
    "--optimizer-cpu-offload": _OFFLOADED,
    "--moe-paged-stash": _OFFLOADED,
    "--delay-wgrad-compute": _DELAYED,
    "--defer-embedding-wgrad-compute": _DELAYED,
    "--cuda-graph-impl": _GRAPHS,
    "--enable-cuda-graph": _GRAPHS,
    "--external-cuda-graph": _GRAPHS,
    "--seq1f1b-turn": "turns of whole micro-batches are modelled: give "
    "--microbatch-group-size-per-virtual-pipeline-stage",
    "--mlp-chunks-for-training": "MLPs in chunks are not modelled; recomputation is",
    "--freeze-all-layers": "frozen weights are not modelled",
    "--no-position-embedding": "Megatron has replaced it by --position-embedding-type",
    "--hybrid-layer-pattern": _RECURRENT,
    "--hybrid-override-pattern": _RECURRENT,
    "--mtp-hybrid-override-pattern": _RECURRENT,
    "--experimental-attention-variant": "attention other than causal is not modelled",
    "--window-size": "windowed attention is not modelled",
    "--spec": "layers of another specification are not modelled",
    "--heterogeneous-layers-config-path": "layers that differ from each other are not modelled",
    "--heterogeneous-layers-config-encoded-json": "layers that differ from each other are not "
    "modelled",
    "--yaml-cfg": "give the options themselves",
    "--encoder-num-layers": "give --num-layers",
    "--decoder-num-layers": "give --num-layers",
    "--encoder-seq-length": "give --seq-length",
    "--decoder-seq-length": "give --seq-length",
    "--batch-size": "Megatron has replaced it by --micro-batch-size",
    "--model-parallel-size": "Megatron has replaced it by --tensor-model-parallel-size",
    "--checkpoint-activations": "Megatron has replaced it by --recompute-activations",
    "--rampup-batch-size": "one batch size is modelled: give --global-batch-size",
    "--step-batch-size-schedule": "one batch size is modelled: give --global-batch-size",
    "--moe-layer-recompute": "give --recompute-granularity selective --recompute-modules moe",
    "--moe-latent-size": "experts of another width than the hidden size are not modelled",
    "--moe-expert-capacity-factor": "experts that drop tokens are not modelled",
    "--moe-expert-rank-capacity-factor": "experts that drop tokens are not modelled",
    "--moe-pad-expert-input-to-capacity": "experts that drop tokens are not modelled",
    "--mtp-use-repeated-layer": "each layer of multi-token prediction has weights of its own",
    "--hybrid-context-parallel": "context-parallel groups of different sizes are not modelled",
    "--hierarchical-context-parallel-sizes": "one level of context parallelism is modelled",
    "--tp-comm-overlap": "overlapped tensor-parallel collectives are not modelled",
    "--overlap-moe-expert-parallel-comm": "overlapped expert-parallel collectives are not modelled",
    "--distribute-saved-activations": "recomputation keeps whole inputs: leave it out",
    "--num-microbatches-with-partial-activation-checkpoints": "every micro-batch is recomputed "
    "alike: leave it out",
    "--attention-output-gate": "gated attention outputs are not modelled",
}
"""Flag and what to do instead."""

VISITING: dict[str, str] = {
    "--offload-model-chunks": "seq1f1b plan-offload plans model chunks that are kept in host memory"
}
"""Flag and what to do instead, of those that only ``seq1f1b plan-offload`` models."""
