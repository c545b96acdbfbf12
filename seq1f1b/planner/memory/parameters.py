"""Parameters of every stage, and the bytes that they, their gradients and the optimizer take."""

from dataclasses import dataclass

from seq1f1b.planner.layout import ChunkLayers
from seq1f1b.planner.setting import Setting

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Parameters:
    """How many parameters a rank holds: those dealt to tensor-parallel ranks, and its experts'."""

    dense: float
    experts: float

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.dense + other.dense, self.experts + other.experts)


def stage_parameters(setting: Setting, stage: int) -> Parameters:
    """Return what one rank of a stage holds."""
    total = Parameters(0.0, 0.0)
    for chunk in setting.chunks[stage]:
        total += chunk_parameters(setting, chunk)
    if setting.num_stages == 1 and setting.model.tied:
        table = setting.vocabulary * setting.model.hidden / setting.tensor
        total += Parameters(-table, 0.0)
    return total


def chunk_parameters(setting: Setting, chunk: ChunkLayers) -> Parameters:
    """Return what one rank holds of a model chunk, with a table of its own for the output layer."""
    model = setting.model
    table = setting.vocabulary * model.hidden / setting.tensor
    norm = model.hidden * (1 if model.rms_norm else 2)
    dense = experts = 0.0
    layers = [*chunk.layers, *([bool(model.expert_layers[-1])] * chunk.mtp)]
    for has_experts in layers:
        held = layer_parameters(setting, experts=has_experts)
        dense, experts = dense + held.dense, experts + held.experts
    dense += chunk.mtp * (2 * model.hidden * model.hidden / setting.tensor + 3 * norm)
    if chunk.embedding or chunk.mtp:
        dense += table + (model.learned_positions * model.hidden if chunk.embedding else 0)
    if chunk.head:
        dense += table + norm
    return Parameters(dense, experts)


def layer_parameters(setting: Setting, *, experts: bool) -> Parameters:
    """Return what one rank holds of a transformer layer."""
    model = setting.model
    dense = _attention(setting) + 2 * model.hidden * (1 if model.rms_norm else 2)
    if not experts:
        return Parameters(dense + _mlp(setting, model.ffn), 0.0)
    return Parameters(dense + _router_and_shared(setting), _experts(setting))


def _attention(setting: Setting) -> float:
    model, tp = setting.model, setting.tensor
    if model.latent is not None:
        latent = model.latent
        down = model.hidden * (latent.kv_rank + latent.rotary) + latent.kv_rank
        if latent.query_rank is not None:
            down += (model.hidden + 1) * latent.query_rank
        # compressions are held whole by every tensor-parallel rank
        return down + (latent.weights(model.hidden, model.heads) - down) / tp
    query = model.query_width / tp
    keys = (model.key_width + model.value_width) / min(tp, model.groups)
    weights = model.hidden * (query + keys) + model.hidden * model.output_width / tp
    biases = (query + keys) * model.qkv_bias + model.hidden * model.bias
    return weights + biases + (2 * model.head if model.qk_norm else 0)


def _mlp(setting: Setting, width: int) -> float:
    model = setting.model
    matrices = 3 if model.gated else 2
    weights = matrices * model.hidden * width / setting.tensor
    if not model.bias:
        return weights
    return weights + (matrices - 1) * width / setting.tensor + model.hidden


def _router_and_shared(setting: Setting) -> float:
    model = setting.model
    assert model.experts is not None
    router = model.hidden * model.experts.count
    shared = model.experts.shared_ffn
    return router + (_mlp(setting, shared) if shared else 0)


def _experts(setting: Setting) -> float:
    model = setting.model
    assert model.experts is not None
    matrices = 3 if model.gated else 2
    one = matrices * model.hidden * model.experts.ffn / setting.expert_tensor
    return one * model.experts.count / setting.experts


def static_sizes(setting: Setting, stage: int) -> list[float]:
    """Return the bytes of a rank's parameters, gradients and optimizer states, a tensor each."""
    parameters = stage_parameters(setting, stage)
    sharded = setting.arguments.use_distributed_optimizer
    replicas = setting.data * setting.context if sharded else 1
    expert_replicas = setting.expert_data if sharded else 1
    held = parameters.dense + parameters.experts
    states = parameters.dense / replicas + parameters.experts / expert_replicas
    sizes = [held * setting.element_bytes, held * gradient_bytes(setting)]
    return [*sizes, *(states * width for width in _state_bytes(setting))]


def gradient_bytes(setting: Setting) -> int:
    """Return the bytes of one parameter's gradient: bf16 training accumulates in fp32."""
    a = setting.arguments
    if setting.element_bytes == 4:
        return 4
    if a.bf16:
        return 2 if a.grad_reduce_in_bf16 else 4
    return 4 if a.accumulate_allreduce_grads_in_fp32 else 2


def _state_bytes(setting: Setting) -> list[int]:
    """Return the bytes of every optimizer state of one parameter."""
    a = setting.arguments
    main = [4] if setting.element_bytes == 2 else []
    if a.optimizer == "sgd":
        return [*main, 4]
    if not a.use_precision_aware_optimizer:
        return [*main, 4, 4]
    # an fp16 main parameter keeps the rest of the bf16 one
    main = [_BYTES[a.main_params_dtype]] if main else []
    return [*main, _BYTES[a.exp_avg_dtype], _BYTES[a.exp_avg_sq_dtype]]
