"""A GPT of Megatron's cut into this rank's stage, and one training step of it, measured."""

import argparse
import os
import sys
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from report import device_name, setting

from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.reports.metrics import bubble_ratios
from megatron.adaptor.session import Session
from seq1f1b.sequence import TokenCost

# Heads and vocabulary of a tiny model whose output layer hardly lengthens the last stage.
TINY = {"heads": 4, "query_groups": 1, "vocab_size": 384}


def add_model_arguments(parser: argparse.ArgumentParser, *, layers: int, hidden: int) -> None:
    """Add the flags that say what the model is."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden-size", type=int, default=hidden)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--query-groups", type=int, help="default: as many as heads")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def about_model(options: argparse.Namespace, **others: Any) -> dict[str, Any]:
    """Return what the model is, what the caller adds, and where and with what it ran."""
    return setting(
        layers=options.layers,
        hidden=options.hidden_size,
        heads=options.heads,
        query_groups=options.query_groups or options.heads,
        vocabulary=options.vocab_size,
        dtype=options.dtype,
        **others,
        device=device_name(),
    )


def be_a_stage() -> None:
    """Take a core and a thread for this rank, and make it a stage of the pipeline."""
    be_a_rank()
    make_groups()


def be_a_rank() -> None:
    """Take a core and a thread for this rank."""
    if "RANK" not in os.environ:
        raise SystemExit(
            "this benchmark has a process for each stage: start it with "
            f"python -m torch.distributed.run --standalone --nproc-per-node 2 {sys.argv[0]}"
        )
    os.sched_setaffinity(0, {int(os.environ["RANK"]) % os.cpu_count()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def make_groups() -> None:
    """Set Megatron's process groups up: every rank is a stage."""
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def token_cost(options: argparse.Namespace) -> TokenCost:
    """Return what a token of the model costs."""
    return TokenCost.of_transformer(
        num_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.heads,
        num_query_groups=options.query_groups,
        vocab_size=options.vocab_size,
    )


def make_batch(options: argparse.Namespace) -> dict[str, Any]:
    """Return one micro-batch of random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, options.vocab_size, (1, options.length + 1), generator=generator)
    tokens = tokens.cuda()  # of which the adaptor makes the CPU where there is no GPU
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones_like(tokens[:, 1:], dtype=torch.float32),
        "position_ids": torch.arange(options.length, device=tokens.device)[None],
        "attention_mask": None,
        "cu_seqlens": None,
    }


def make_chunks(
    options: argparse.Namespace, num_chunks: int = 1, *, accumulates: bool = True
) -> list[GPTModel]:
    """Build this rank's model chunks; ``accumulates``: weight gradients go to DDP's buffers."""
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    virtual = num_chunks if num_chunks > 1 else None
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    config = make_config(
        options,
        options.layers,
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=virtual,
        # As Megatron's training sets them: batched, two stages would mix up the two directions.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        gradient_accumulation_fusion=accumulates,
    )
    models = [
        make_part(
            options,
            config,
            first=stage == 0 and chunk == 0,
            last=stage == num_stages - 1 and chunk == num_chunks - 1,
            vp_stage=chunk if virtual else None,
        )
        for chunk in range(num_chunks)
    ]
    for model in models:
        _draw_weights(model)
    return models


def _draw_weights(model: GPTModel) -> None:
    """Give every layer weights that depend on its place in the whole model, however it is cut."""
    parts = {layer.layer_number: layer for layer in model.decoder.layers}
    if model.pre_process:
        parts[0] = model.embedding
    if model.post_process:
        parts[-1] = model.output_layer
    for number, part in parts.items():
        generator = torch.Generator().manual_seed(number + 1)
        for parameter in part.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=model.config.init_method_std, generator=generator)


def make_config(options: argparse.Namespace, num_layers: int, **others: Any) -> TransformerConfig:
    """Return Megatron's description of ``num_layers`` layers."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.heads,
        num_query_groups=options.query_groups,
        pipeline_dtype=getattr(torch, options.dtype),
        params_dtype=getattr(torch, options.dtype),
        bf16=options.dtype == "bfloat16",
        deallocate_pipeline_outputs=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **others,
    )


def make_part(
    options: argparse.Namespace,
    config: TransformerConfig,
    *,
    first: bool,
    last: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build one model chunk, with the embedding if ``first`` and the output layer if ``last``."""
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=options.vocab_size,
        max_sequence_length=options.length,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    return model.cuda().to(config.params_dtype)


def wrap(models: list[GPTModel], *, flat_buffers: bool = False) -> list[DistributedDataParallel]:
    """Put Megatron's data-parallel wrapper, which has the gradient buffers, around each.

    flat_buffers: whether weights lie in flat buffers too, as for the distributed optimizer.
    """
    config = DistributedDataParallelConfig(use_distributed_optimizer=flat_buffers)
    return [DistributedDataParallel(model.config, config, model) for model in models]


class Trainer:
    """This rank's chunks under Megatron's data-parallel wrapper, run by any schedule."""

    def __init__(
        self,
        options: argparse.Namespace,
        batch: dict[str, Any],
        session: Session,
        num_chunks: int,
        *,
        flat_buffers: bool = False,
    ) -> None:
        self.options, self.batch, self.session = options, batch, session
        self.cost = token_cost(options)
        models = make_chunks(options, num_chunks)
        self.config = models[0].config
        self.chunks = wrap(models, flat_buffers=flat_buffers)
        self.config.finalize_model_grads_func = finalize_model_grads
        no_sync = [chunk.no_sync for chunk in self.chunks]
        self.config.no_sync_func = no_sync if num_chunks > 1 else no_sync[0]

    def settings(
        self,
        kind: str,
        num_splits: int,
        balance: str,
        multiple: int = 1,
        lengths: tuple[int, ...] | None = None,
    ) -> Settings:
        """Return what the flags of Seq1F1B would say."""
        return Settings(
            num_splits=num_splits,
            balance_method=balance,
            sequence_length=self.options.length,
            length_multiple=multiple,
            cost=self.cost,
            schedule_name=kind,
            lengths=lengths,
        )

    def step(self, settings: Settings, num_micro_batches: int) -> dict[str, Any]:
        """Run one step; return its length, what each stage did in it, and the loss."""
        self.session.settings = settings
        num_chunks = len(self.chunks)
        virtual = num_chunks if num_chunks > 1 else None
        parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        dist.barrier()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[repeat(self.batch)] * num_chunks if virtual else repeat(self.batch),
            model=self.chunks if virtual else self.chunks[0],
            num_microbatches=num_micro_batches,
            seq_length=self.options.length,
            micro_batch_size=1,
        )
        total = sum(float(r["lm loss"][0] / r["lm loss"][1]) for r in reports) if reports else 0.0
        own = self.session.meter.last, total / num_micro_batches, self.session.meter.timed
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        figures = [figure for figure, _, _ in gathered]
        return {
            "seconds": max(figure.seconds for figure in figures),
            "bubble": bubble_ratios(figures),
            "busy": [figure.busy_seconds for figure in figures],
            "peak_bytes": [figure.peak_activation_bytes for figure in figures],
            "carry_bytes": [figure.kv_carry_bytes for figure in figures],
            "loss": gathered[-1][1],
            "timed": [timed for _, _, timed in gathered],
        }


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total, count = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data: Any, model: Any) -> Any:
    """Megatron's forward step function; it knows nothing of sub-sequences."""
    batch = get_batch_on_this_cp_rank(
        dict(next(data)),
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])
