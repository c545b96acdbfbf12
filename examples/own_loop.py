"""Seq1F1B in a training loop of your own on Megatron-Core, without ``megatron.training``.

    torchrun --nproc-per-node 2 examples/own_loop.py --splits 4

In the manner of Megatron-Bridge, ms-swift, verl and NeMo-RL: the loop calls Megatron's
``get_forward_backward_func`` itself, which it imported by name. Its data are dictionaries, and its
loss weighs whole sequences. What is new in it is the call of ``enable``.
"""

# ruff: noqa: E402

import argparse
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.adaptor.cpu import device

device.install()  # Nothing happens where there is a GPU. Without one, it comes before Megatron.

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from megatron.adaptor import enable

VOCAB, LAYERS = 64, 4


def configuration(dtype: torch.dtype = torch.float32) -> TransformerConfig:
    """Return the model's configuration, which is all that Seq1F1B reads of it."""
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=64,
        num_attention_heads=4,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def build(config: TransformerConfig, length: int) -> Any:
    """Return this stage's part of a GPT, with gradients summed over replicas."""
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCAB,
        max_sequence_length=length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(torch.cuda.current_device())
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    config.finalize_model_grads_func = finalize_model_grads
    return model


def sequences(length: int, rows: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield micro-batches without end: counting text, and how much each sequence matters."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(VOCAB, (rows, 1), generator=generator)
        step = torch.randint(1, 4, (rows, 1), generator=generator)
        text = (start + step * torch.arange(length + 1)) % VOCAB
        batch = {
            "input_ids": text[:, :-1],
            "position_ids": torch.arange(length).expand(rows, -1),
            "labels": text[:, 1:],
            "weights": torch.rand(rows, generator=generator),
        }
        yield {name: tensor.to(torch.cuda.current_device()) for name, tensor in batch.items()}


def weighted_loss(weights: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Average each sequence's losses ``[b, s]``, and weigh the sequences."""
    loss = (losses.mean(dim=1) * weights).sum() / weights.sum()
    return loss, {"loss": loss.detach().clone()}  # Megatron divides the loss in place


def forward_step(data: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """Return the losses of all tokens, and what makes one loss of them."""
    batch = next(data)
    losses = model(batch["input_ids"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(weighted_loss, batch["weights"])


def step(model: Any, data: Iterator[Any], *, length: int, rows: int, number: int) -> list[Any]:
    """Compute the gradients of ``number`` micro-batches; return their reports on the last stage."""
    model.zero_grad_buffer()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=model,
        num_microbatches=number,
        seq_length=length,
        micro_batch_size=rows,
    )


def join() -> None:
    """Meet the other ranks, all of which are stages of one pipeline."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=torch.distributed.get_world_size()
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def main() -> None:
    """Train, and print the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--balance-method", default="uniform_comp")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    enable(splits=args.splits, balance_method=args.balance_method)
    join()
    torch.manual_seed(1)
    model = build(configuration(), args.length)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3), [model])
    data = sequences(args.length, args.micro_batch_size)
    for number in range(args.steps):
        optimizer.zero_grad()
        reports = step(
            model,
            data,
            length=args.length,
            rows=args.micro_batch_size,
            number=args.micro_batches,
        )
        optimizer.step()
        if reports:
            loss = torch.stack([report["loss"] for report in reports]).mean()
            print(f"step {number + 1}: loss {loss.item():.6f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
