"""A tiny GPT of Megatron's on this worker's place, and the same model whole on one rank."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.distributed.layouts import Layout
from tests.distributed.packed_data import END, packed

VOCAB, HIDDEN, HEADS, GROUPS, LAYERS, BATCH = 40, 32, 8, 4, 4, 2

# Megatron's training loop hangs these on the configuration of models without latent attention.
YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 8,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}


@dataclass(frozen=True)
class Case:
    """One step to run: the shape of the pipeline and what the model is made of.

    tensor, context, experts_shared, replicas: ranks per stage that share weights, tokens, experts
    (among replicas) and micro-batches; num_micro_batches is per replica.
    rows: sequences in a micro-batch.
    attention: the kernel, by name; megatron leaves its layers alone. order: actions of a single
    stage in place of a generated schedule.
    against_one_split: compare with the same ranks in Megatron's own schedule, not the whole model.
    engine: whether the pipeline's layers keep gradients in transformer-engine's way.
    config, spec, model, ddp: further arguments of Megatron's configuration, layer spec, GPTModel
    and data parallelism.
    """

    num_stages: int
    num_micro_batches: int
    num_splits: int
    balance: str = "uniform_comp"
    kind: str = "1f1b"
    layers: int = LAYERS
    num_chunks: int = 1
    length: int = 30
    rows: int = BATCH
    vocabulary: int = VOCAB
    positions: str = "rope"
    tied: bool = False
    recompute: bool = False
    recompute_loss: bool = False
    loss: str = "sum"
    per_token: bool = False
    experts: str | None = None
    lengths: tuple[int, ...] = ()  # of the sequences in each micro-batch, if they differ
    documents: str | None = None  # the entry of a batch that tells packed documents apart
    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    experts_shared: int = 1
    replicas: int = 1
    against_one_split: bool = False
    engine: bool = False
    attention: str | None = None
    order: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The process groups that the case needs."""
        return Layout(self.num_stages, self.tensor, self.context, self.experts_shared)

    @property
    def num_ranks(self) -> int:
        """Number of processes that run the case."""
        return self.num_stages * self.tensor * self.context * self.replicas


def worst_gradient_error(case: Case) -> float:
    """Run one step of ``case`` and return the largest relative error of any gradient here."""
    from megatron.adaptor import install

    session = install()
    from megatron.core import parallel_state

    context = session.context
    data = micro_batches(case)
    settings = settings_of(case)
    session.settings = replace(settings, recompute_loss=False)
    Layout().enter()
    whole = whole_model(case)
    context.use_kernel("reference")
    losses = _run_whole(case, whole, data)
    expected_ahead = _logged_ahead()

    session.settings = settings
    context.use_kernel(None)
    chunks, reports = _run_step(case, whole, data)
    ahead = _logged_ahead()
    if ahead is not None and case.replicas == 1:
        torch.testing.assert_close(ahead, expected_ahead, rtol=1e-5, atol=0.0)
    replica = parallel_state.get_data_parallel_rank()
    if reports:
        assert len(reports) == case.num_micro_batches
        group = parallel_state.get_context_parallel_group()
        for report, loss in zip(reports, losses[replica :: case.replicas], strict=True):
            value = report["lm loss"].clone()
            torch.distributed.all_reduce(value, group=group)
            torch.testing.assert_close(_mean(value), loss, rtol=1e-5, atol=0.0)
    if not case.against_one_split:
        return max(_errors(case, chunks, whole))
    others, _ = _run_step(replace(case, num_splits=1, kind="1f1b"), whole, data)
    return max(
        _difference(parameter.main_grad, other.main_grad)
        for chunk, other_chunk in zip(chunks, others, strict=True)
        for parameter, other in zip(chunk.parameters(), other_chunk.parameters(), strict=True)
    )


def _run_step(case: Case, whole: Any, data: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Train this rank's share of ``whole`` on its share of ``data``; return it and the reports."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron.adaptor import install

    install().settings = settings_of(case)
    case.layout.enter(case.num_chunks)
    chunks = stage_chunks(case, whole)
    has_chunks = case.num_chunks > 1
    mine = data[parallel_state.get_data_parallel_rank() :: case.replicas]
    reports = get_forward_backward_func()(
        forward_step_func=_forward_step(case),
        data_iterator=[_reader(case, mine) for _ in chunks] if has_chunks else _reader(case, mine),
        model=chunks if has_chunks else chunks[0],
        num_microbatches=case.num_micro_batches,
        seq_length=case.length,
        micro_batch_size=case.rows,
    )
    return chunks, reports


def _difference(value: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a part of the largest value that is expected."""
    return ((value - expected).abs().max() / expected.abs().max()).item()


def _reader(case: Case, data: list[dict[str, Any]]) -> Iterator[Any] | None:
    """Hand micro-batches out without their masks; of packed documents, middle stages get none."""
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    if case.documents and 0 < stage < case.num_stages - 1 and case.num_chunks == 1:
        return None
    return iter([{**batch, "attention_mask": None} for batch in data])


def _logged_ahead() -> Tensor | None:
    """Take what Megatron has logged of multi-token prediction: losses, right guesses, guesses."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    logged = dict(MTPLossLoggingHelper.tracker)
    MTPLossLoggingHelper.tracker.clear()
    names = ("loss_values", "correct_values", "total_values")
    return torch.stack([logged[name] for name in names]) if logged else None


def _mean(value: Tensor) -> Tensor:
    return (value[0] / value[1] if value.numel() == 2 else value.squeeze()).detach()


def _config(case: Case, *, is_whole: bool) -> Any:
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    is_latent = case.config.get("multi_latent_attention")
    arguments = dict(
        num_layers=case.layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=HEADS if is_latent else GROUPS,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=not is_whole,
        use_cpu_initialization=True,
        moe_token_dispatcher_type="alltoall",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=case.per_token,
        recompute_granularity="full" if case.recompute else None,
        recompute_method="uniform" if case.recompute else None,
        recompute_num_layers=1 if case.recompute else None,
        **_experts(case),
    )
    if not is_whole:
        arguments |= {
            "pipeline_model_parallel_size": case.num_stages,
            "variable_seq_lengths": bool(case.lengths),
            "virtual_pipeline_model_parallel_size": case.num_chunks
            if case.num_chunks > 1
            else None,
            # As Megatron's training sets them: batched, two stages mix up the two directions.
            "overlap_p2p_comm": case.num_chunks > 1,
            "batch_p2p_comm": case.num_chunks == 1,
            "tensor_model_parallel_size": case.tensor,
            "sequence_parallel": case.sequence_parallel,
            "context_parallel_size": case.context,
            "cp_comm_type": "a2a",
            "expert_model_parallel_size": case.experts_shared,
            "expert_tensor_parallel_size": 1,
        }
    config = (MLATransformerConfig if is_latent else TransformerConfig)(**arguments | case.config)
    if case.positions == "yarn":
        for name, value in YARN.items():
            setattr(config, name, value)
    return config


def _experts(case: Case) -> dict[str, Any]:
    """Return the settings of a mixture of experts, balanced by ``case.experts``."""
    if case.experts is None:
        return {}
    return {
        "add_bias_linear": False,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": case.experts,
        "moe_aux_loss_coeff": 0.0 if case.experts == "none" else 0.5,
        "moe_z_loss_coeff": None if case.experts == "none" else 0.1,
    }


def _model(
    case: Case, config: Any, first: bool, last: bool, *, engine: bool = False, **kwargs: Any
) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )

    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, **case.spec)
    if engine:
        from tests.distributed.engine_layers import engine_spec

        spec = engine_spec(spec)
    if config.mtp_num_layers:
        kwargs["mtp_block_spec"] = get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=False, vp_stage=kwargs.get("vp_stage")
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=case.vocabulary,
        max_sequence_length=case.length,
        pre_process=first,
        post_process=last,
        position_embedding_type=case.positions,
        share_embeddings_and_output_weights=case.tied,
        **case.model,
        **kwargs,
    )


def whole_model(case: Case) -> Any:
    """Build all layers on this rank, the same on every rank."""
    torch.manual_seed(3)
    return _model(case, _config(case, is_whole=True), True, True)


def stage_chunks(case: Case, whole: Any, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Build this rank's model chunks in ``dtype`` with the weights of ``whole``."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.transformer.module import Float16Module

    stage = parallel_state.get_pipeline_model_parallel_rank()
    config = _config(case, is_whole=False)
    config.params_dtype = config.pipeline_dtype = dtype
    config.bf16, config.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    chunks = []
    for chunk in range(case.num_chunks):
        first = stage == 0 and chunk == 0
        last = stage == case.num_stages - 1 and chunk == case.num_chunks - 1
        stage_of = {"vp_stage": chunk} if case.num_chunks > 1 else {}
        model = _model(case, config, first, last, engine=case.engine, **stage_of)
        ours = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            weight = ours[_whole_name(model, name, case)].data
            parameter.data.copy_(_share(parameter, name, weight, is_gated=config.gated_linear_unit))
        if config.bf16 or config.fp16:
            model = Float16Module(config, model.to(dtype))
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(**case.ddp), model)
        ddp.zero_grad_buffer()
        chunks.append(ddp)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def _share(parameter: Tensor, name: str, whole: Tensor, *, is_gated: bool) -> Tensor:
    """Return what this tensor-parallel rank has of a ``whole`` weight or gradient."""
    from megatron.core import parallel_state

    if parameter.shape == whole.shape:
        return whole
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    # A gated MLP's first weight is the gate's and the value's, one above the other.
    halves = whole.chunk(2, dim) if is_gated and "linear_fc1" in name else [whole]
    return torch.cat([half.chunk(size, dim)[rank] for half in halves], dim)


def _whole_name(model: Any, name: str, case: Case) -> str:
    """Name of a stage's parameter in the whole model, whose layers count from the first stage."""
    if case.tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    if not name.startswith("decoder.layers."):
        return name
    _, _, index, *rest = name.split(".")
    layer = model.decoder.layers[int(index)]
    if "local_experts" in rest:
        place = rest.index("local_experts") + 1
        rest[place] = str(layer.mlp.local_expert_indices[int(rest[place])])
    return ".".join(["decoder.layers", str(layer.layer_number - 1), *rest])


def micro_batches(case: Case, seed: int = 11) -> list[dict[str, Any]]:
    """Make the data of all replicas of ``case``, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def batch(length: int) -> dict[str, Any]:
        tokens = torch.randint(0, VOCAB, (case.rows, length + 1), generator=generator)
        mask = (torch.rand(case.rows, length, generator=generator) < 0.7).float()
        mask[:, :8] = 0.0  # early sub-sequences may have no token that counts
        whole = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": mask,
            "position_ids": torch.arange(length).expand(case.rows, -1),
            "attention_mask": None,
            "cu_seqlens": None,
        }
        if case.documents is None:
            return whole
        whole, whole["attention_mask"] = packed(whole, case.documents, generator)
        return whole

    lengths = case.lengths or [case.length] * case.num_micro_batches * case.replicas
    return [batch(length) for length in lengths]


def _forward_step(case: Case) -> Callable[..., Any]:
    """Return a forward step in Megatron's manner, which knows nothing of sub-sequences."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    def sum_loss(mask: Tensor, losses: Tensor) -> Any:
        loss = (losses.float() * mask).sum()
        count = mask.sum().to(torch.int)
        return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}

    def mean_loss(mask: Tensor, losses: Tensor) -> Any:
        total = torch.stack([(losses.float() * mask).sum(), mask.sum()])
        torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
        loss = total[0] / total[1].clamp(min=1)
        return loss, {"lm loss": loss.detach()[None] / case.context}

    def forward_step(data: Iterator[Any] | None, model: Any) -> Any:
        if data is None:
            return model(None, None, None), None
        batch = get_batch_on_this_cp_rank(
            next(data), is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        of_output = sum_loss if case.loss == "sum" else mean_loss
        return output, lambda losses: of_output(batch["loss_mask"], losses)

    return forward_step


def settings_of(case: Case) -> Any:
    """Return what the flags of ``case`` would have set."""
    from megatron.adaptor.command_line.settings import Settings
    from megatron.adaptor.step.read_ahead import Packing
    from seq1f1b.sequence import TokenCost

    return Settings(
        num_splits=case.num_splits,
        balance_method=case.balance,
        sequence_length=case.length,
        length_multiple=_multiple(case),
        cost=TokenCost.of_transformer(
            num_layers=case.layers, hidden_size=HIDDEN, num_attention_heads=HEADS
        ),
        schedule_name=case.kind,
        attention=case.attention,
        recompute_loss=case.recompute_loss,
        given=_given(case),
        packing=Packing("--some-flag", case.documents, lambda: END) if case.documents else None,
    )


def _given(case: Case) -> Any:
    from seq1f1b.schedule import Action, Schedule

    if not case.order:
        return None
    actions = tuple(map(Action.parse, case.order.split()))
    return Schedule("given", 1, 1, case.num_micro_batches, case.num_splits, (actions,))


def _multiple(case: Case) -> int:
    tensor = case.tensor if case.sequence_parallel else 1
    return case.context * math.lcm(2, tensor) if case.context > 1 else tensor


def _run_whole(case: Case, model: Any, data: list[dict[str, Any]]) -> list[Tensor]:
    """Backpropagate whole micro-batches on one rank; return the mean loss of each."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    losses = []
    scale = 1.0 if case.per_token else 1 / len(data)
    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
        scaler.set_loss_scale(torch.tensor([scale]))
    for batch in data:
        mask = batch["attention_mask"]
        output = model(
            batch["tokens"],
            batch["position_ids"],
            mask,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        total, count = (output.float() * batch["loss_mask"]).sum(), batch["loss_mask"].sum()
        if case.per_token:
            total.backward()
        else:
            (total / count / len(data)).backward()
        losses.append((total / count).detach())
    if case.per_token:
        for parameter in model.parameters():
            parameter.grad /= sum(batch["loss_mask"].sum() for batch in data)
    return losses


def _errors(case: Case, chunks: list[Any], whole: Any) -> Iterator[float]:
    wanted = dict(whole.named_parameters())
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            if case.tied and name == "output_layer.weight" and chunk.module.mtp_process:
                continue  # Megatron allocates it, and uses its copy of the embedding
            gradient = wanted[_whole_name(chunk.module, name, case)].grad
            is_gated = chunk.module.config.gated_linear_unit
            expected = _share(parameter, name, gradient, is_gated=is_gated)
            yield _difference(parameter.main_grad, expected)
