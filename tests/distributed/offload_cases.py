"""Steps of a tiny GPT whose model chunks visit the device, against the same steps resident."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tests.distributed.layouts import Layout
from tests.distributed.megatron_model import (
    Case,
    _forward_step,
    _reader,
    micro_batches,
    settings_of,
    stage_chunks,
    whole_model,
)


class Visits(NamedTuple):
    """What one rank's run was: hash of all weights, losses, norms, and what the copies counted."""

    weights: str
    losses: list[float]
    norms: list[float]
    loads: list[int]
    weights_in: int
    gradients_in: int
    gradients_out: int
    slot_bytes: int


def train(
    case: Case,
    *,
    slots: int = 0,
    prefetch: bool = False,
    turn: int | None = None,
    bf16: bool = False,
    steps: int = 3,
    evaluates: bool = False,
    moves: bool = False,
    pace: float | None = None,
    roots: tuple[int, ...] | None = None,
) -> Visits:
    """Run ``steps`` of AdamW on this rank's part of ``case``; slots: 0 keeps chunks resident.

    pace, roots: of the link, in GB/s.
    evaluates: whether forwards without backwards run between the steps. moves: whether slots are
    swapped between a chunk's forward and backward, which must not train the same.
    """
    from megatron.adaptor import install

    session = install()
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron.adaptor.offload import slots as module

    Layout().enter()
    whole = whole_model(case)
    session.settings = replace(
        settings_of(case),
        turn=turn,
        offload_chunks=slots,
        offload_prefetch=prefetch,
        offload_gb_per_second=pace,
        offload_roots=roots,
        poison=slots > 0,
    )
    case.layout.enter(case.num_chunks)
    dtype = torch.bfloat16 if bf16 else torch.float32
    ddp = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": bf16}
    chunks = stage_chunks(replace(case, ddp=ddp), whole, dtype)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=bf16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    data, losses, norms, loads = micro_batches(case), [], [], []
    traffic = module.Traffic()
    step = get_forward_backward_func()

    def run(*, forward_only: bool) -> Any:
        return step(
            forward_step_func=_forward_step(case),
            data_iterator=[_reader(case, data) for _ in chunks],
            model=chunks,
            num_microbatches=case.num_micro_batches,
            seq_length=case.length,
            micro_batch_size=case.rows,
            forward_only=forward_only,
        )

    with _moved(module.ChunkSlots) if moves else contextlib.nullcontext():
        for _ in range(steps):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            reports = run(forward_only=False)
            losses.append(float(sum(report["lm loss"][0] for report in reports)))
            assert session.meter.last is not None
            if session.meter.last.traffic is not None:
                traffic = session.meter.last.traffic
                loads.append(traffic.loads)
            _, norm, _ = optimizer.step()
            norms.append(float(norm))
            if evaluates:
                reports = run(forward_only=True)
                losses.append(float(sum(report["lm loss"][0] for report in reports)))
    own = session.loop._slots if slots else None
    return Visits(
        _hash(chunks),
        losses,
        norms,
        loads,
        traffic.weights_in,
        traffic.gradients_in,
        traffic.gradients_out,
        own.num_bytes if own else _resident_bytes(chunks),
    )


def _hash(chunks: list[Any]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        for parameter in chunk.parameters():
            flat = parameter.detach().clone().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resident_bytes(chunks: list[Any]) -> int:
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return sum(b.param_data.nbytes + b.grad_data.nbytes for b in buffers)


@contextlib.contextmanager
def _moved(slots: Any) -> Iterator[None]:
    """Let every chunk come back for its backward to another slot than its forward's."""
    load = slots.load

    def elsewhere(self: Any, action: Any) -> None:
        own = self._slot_of
        if action.kind.value == "LOAD_B":
            self._slot_of = [(slot + 1) % 2 for slot in own]
        load(self, action)
        self._slot_of = own

    slots.load = elsewhere
    try:
        yield
    finally:
        slots.load = load


def compare(case: Case, common: dict[str, Any], ways: list[dict[str, Any]]) -> list[Visits]:
    """Run ``case`` resident, then in each of ``ways``."""
    return [train(case, **common | way) for way in [{}, *ways]]
