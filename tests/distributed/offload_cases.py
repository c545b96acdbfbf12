"""Steps of a tiny GPT whose model chunks visit the device, against the same steps resident."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tests.distributed.layouts import Layout
from tests.distributed.megatron_model import (
    GROUPS,
    HEADS,
    HIDDEN,
    VOCAB,
    Case,
    _forward_step,
    _reader,
    micro_batches,
    settings_of,
    stage_chunks,
    whole_model,
)

_SECONDS_LATE = 0.004


class Visits(NamedTuple):
    """What one rank's run was: hash of all weights, losses, norms, and what the copies counted.

    buffer_bytes: weights and gradients of all chunks; largest_bytes: of the largest one, of each
    kind. device_bytes: what they took of the device outside of the steps and in the optimizer.
    host_bytes: of all tensors that stay, and estimated_bytes of those. late: steps that ended with
    updates under way.
    """

    weights: str
    losses: list[float]
    norms: list[float]
    loads: list[int]
    weights_in: int
    gradients_in: int
    gradients_out: int
    buffer_bytes: int
    largest_bytes: int
    device_bytes: set[int]
    host_bytes: int
    estimated_bytes: float
    late: int


def train(
    case: Case,
    *,
    slots: int = 0,
    prefetch: bool = False,
    just_in_time: bool = False,
    turn: int | None = None,
    bf16: bool = False,
    steps: int = 10,
    evaluates: bool = False,
    moves: bool = False,
    fails: bool = False,
    pace: float | None = None,
    roots: tuple[int, ...] | None = None,
) -> Visits:
    """Run ``steps`` of AdamW on this rank's part of ``case``; slots: 0 keeps chunks resident.

    Learning rate and weight decay change with every step. just_in_time: updates are behind the next
    step, and slow. evaluates: whether forwards without backwards run between the steps. moves:
    whether slots are swapped between a chunk's forward and backward, which must not train the same.
    fails: whether updates behind the next step raise. pace, roots: of the link, in GB/s.
    """
    from megatron.adaptor import install

    session = install()
    from megatron.core import parallel_state
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
        offload_just_in_time=just_in_time,
        offload_gb_per_second=pace,
        offload_roots=roots,
        poison=slots > 0,
    )
    case.layout.enter(case.num_chunks)
    dtype = torch.bfloat16 if bf16 else torch.float32
    ddp = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": bf16} | case.ddp
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
    mine = micro_batches(case)[parallel_state.get_data_parallel_rank() :: case.replicas]
    losses, norms, loads, device_bytes, late = [], [], [], set(), 0
    traffic = module.Traffic()
    step = get_forward_backward_func()

    def run(*, forward_only: bool) -> Any:
        return step(
            forward_step_func=_forward_step(case),
            data_iterator=[_reader(case, mine) for _ in chunks],
            model=chunks,
            num_microbatches=case.num_micro_batches,
            seq_length=case.length,
            micro_batch_size=case.rows,
            forward_only=forward_only,
        )

    def weigh(*_: Any) -> None:
        if slots and session.loop._slots_of == (chunks, slots, pace, roots):
            device_bytes.add(_device_bytes(chunks, session.loop._slots))

    for one in optimizer.chained_optimizers:
        one.optimizer.register_step_pre_hook(weigh)
    with (
        _moved(module.ChunkSlots) if moves else contextlib.nullcontext(),
        _slow_updates(fails=fails),
    ):
        for number in range(steps):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            weigh()
            reports = run(forward_only=False)
            losses.append(float(sum(report["lm loss"][0] for report in reports)))
            assert session.meter.last is not None
            if session.meter.last.traffic is not None:
                traffic = session.meter.last.traffic
                loads.append(traffic.loads)
            _, norm, _ = optimizer.step()
            norms.append(float(norm))
            late += any(session.updates.are_under_way(chunk) for chunk in chunks)
            weigh()
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 1e-2 * 0.8**number, 0.01 * (number + 2)
            if evaluates:
                reports = run(forward_only=True)
                losses.append(float(sum(report["lm loss"][0] for report in reports)))
        session.updates.settle_all()
    return Visits(
        _hash(chunks),
        losses,
        norms,
        loads,
        traffic.weights_in,
        traffic.gradients_in,
        traffic.gradients_out,
        sum(_bytes(buffer) for chunk in chunks for buffer in _buffers(chunk)),
        sum(
            max((sum(map(_bytes, getattr(chunk, kind))) for chunk in chunks), default=0)
            for kind in ("buffers", "expert_parallel_buffers")
        ),
        device_bytes,
        _host_bytes(chunks, optimizer),
        _estimated_bytes(case, bf16=bf16),
        late,
    )


def _hash(chunks: list[Any]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        for parameter in chunk.parameters():
            flat = parameter.detach().clone().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _buffers(chunk: Any) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _bytes(buffer: Any) -> int:
    return buffer.param_data.nbytes + buffer.grad_data.nbytes


def _device_bytes(chunks: list[Any], slots: Any) -> int:
    """Weigh the slots and everything that a parameter points to outside of its home."""
    home = {
        tensor.untyped_storage().data_ptr()
        for chunk in chunks
        for buffer in _buffers(chunk)
        for tensor in (buffer.param_data, buffer.grad_data)
    }
    held = [t for chunk in chunks for p in chunk.parameters() for t in (p.data, p.main_grad)]
    storages = {t.untyped_storage().data_ptr(): t for t in (*held, *slots.tensors)}
    return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in home)


def _host_bytes(chunks: list[Any], optimizer: Any) -> int:
    """Weigh the home of all chunks, and what the optimizer keeps of them."""
    tensors = [t for c in chunks for b in _buffers(c) for t in (b.param_data, b.grad_data)]
    for one in optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            tensors += group["params"]
        for state in one.optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _estimated_bytes(case: Case, *, bf16: bool) -> float:
    from megatron.core import parallel_state

    from megatron.adaptor.offload.host_memory import host_bytes
    from seq1f1b.planner.resolve import resolve

    options = {
        "num_layers": case.layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "seq_length": case.length,
        "padded_vocab_size": VOCAB,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not case.tied,
        "pipeline_model_parallel_size": case.num_stages,
        "num_virtual_stages_per_pipeline_rank": case.num_chunks,
        "tensor_model_parallel_size": case.tensor,
        "global_batch_size": case.num_stages * case.replicas,
        "use_distributed_optimizer": True,
        "bf16": bf16,
    }
    if case.experts:
        options |= {"num_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}
    setting = resolve(options, num_gpus=case.num_ranks)
    return host_bytes(setting, [parallel_state.get_pipeline_model_parallel_rank()])


@contextlib.contextmanager
def _slow_updates(*, fails: bool) -> Iterator[None]:
    """Let updates that are behind the next step take longer than its first action, or raise."""
    from megatron.core.optimizer import DistributedOptimizer

    step = DistributedOptimizer.step_with_ready_grads

    def slowly(optimizer: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(_SECONDS_LATE)
            if fails:
                raise RuntimeError("cosmic ray")
        return step(optimizer)

    DistributedOptimizer.step_with_ready_grads = slowly
    try:
        yield
    finally:
        DistributedOptimizer.step_with_ready_grads = step


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
