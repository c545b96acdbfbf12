"""The same GPT under the schedules of torch.distributed.pipelining, to compare with."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

SCHEDULES = {
    "torch Schedule1F1B": (Schedule1F1B, 1),
    "torch ScheduleInterleaved1F1B": (ScheduleInterleaved1F1B, 2),
    "torch ScheduleInterleavedZeroBubble": (ScheduleInterleavedZeroBubble, 2),
}


class _Part(nn.Module):
    """A model chunk as torch wants it: a function of what the part before returned."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, received: Tensor) -> Tensor:
        """Take tokens ``[b, n]`` or hidden states ``[n, b, h]``; give hidden states or logits."""
        if self.model.pre_process:
            return self.model(received, None, None)
        self.model.set_input_tensor(received)
        return self.model(None, None, None)


class TorchTrainer:
    """One schedule of torch's over Megatron's layers, with their attention kernel."""

    def __init__(self, name: str, chunks: list[Any], batch: dict[str, Any], count: int) -> None:
        make, _ = SCHEDULES[name]
        self.chunks, self.batch, self.count = chunks, batch, count
        num_stages, stage = dist.get_world_size(), dist.get_rank()
        parts = [
            PipelineStage(
                _Part(chunk),
                stage + index * num_stages,
                num_stages * len(chunks),
                torch.device("cpu"),
            )
            for index, chunk in enumerate(chunks)
        ]
        self.schedule = make(
            parts if len(parts) > 1 else parts[0], n_microbatches=count, loss_fn=self._loss
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        model = self.chunks[-1]
        return model.compute_language_model_loss(labels, logits.transpose(0, 1)).mean()

    def step(self) -> dict[str, Any]:
        """Run one step; return its length in seconds and the loss."""
        for chunk in self.chunks:
            chunk.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        losses: list[Tensor] = []
        inputs = (self.batch["tokens"].repeat(self.count, 1),) if dist.get_rank() == 0 else ()
        is_last = dist.get_rank() == dist.get_world_size() - 1
        labels = self.batch["labels"].repeat(self.count, 1) if is_last else None
        self.schedule.step(*inputs, target=labels, losses=losses, return_outputs=False)
        seconds = time.perf_counter() - start
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (seconds, [loss.item() for loss in losses]))
        return {
            "seconds": max(seconds for seconds, _ in gathered),
            "loss": sum(gathered[-1][1]) / self.count,
        }
