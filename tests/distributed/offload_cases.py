"""Steps of a tiny GPT whose model chunks visit the device, against the same steps resident."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch

from seq1f1b.runtime import ActionError
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
from tests.distributed.streams import Streams

_SECONDS_LATE = 0.004
_PATIENCE = 60.0  # seconds that the last backward of a step waits for updates to begin


class Visits(NamedTuple):
    """What one rank's run was: hashes, losses, norms, and what the copies counted.

    weights: a hash of all; states: of the optimizer's weights, moments and numbers of updates.
    buffer_bytes: weights and gradients of all chunks; largest_bytes: of the largest one, of each
    kind, and planned_bytes of a slot. device_bytes: what they took of the device outside of the
    steps and in the optimizer. host_bytes: of all tensors that stay, and estimated_bytes of those.
    norms: -1 for steps that overflowed. late: steps that ended with updates under way. early: for
    each step, chunks whose update had begun when the last backward did. reduced: chunks whose
    gradients were reduced before they left the device, in all steps. weights_normed: of the last
    step, the number of weights whose gradient's norm was taken there, and the number of all.
    """

    weights: str
    states: str
    losses: list[float]
    norms: list[float]
    loads: list[int]
    weights_in: int
    gradients_in: int
    gradients_out: int
    buffer_bytes: int
    largest_bytes: int
    planned_bytes: float
    device_bytes: set[int]
    host_bytes: int
    estimated_bytes: float
    late: int
    early: list[int]
    reduced: int
    weights_normed: tuple[int, int]


@dataclass(frozen=True)
class Way:
    """How a case is trained; with 0 slots its chunks are resident.

    just_in_time: updates are behind the next step, and slow. evaluates: whether forwards without
    backwards run between the steps. moves: whether slots are swapped between a chunk's forward and
    backward, which must not train the same. fails: whether updates behind the next step raise.
    breaks: whether the first stage's last backward raises, and the optimizer is to be saved then.
    gpu: whether all is as beside a GPU but for the device itself; copies are on streams that, with
    the thread of updates, tell of races. pace, roots: of the link, in GB/s. clip: the largest norm
    of gradients; 0 for any. fp16: with a loss scale at which the first steps overflow.
    """

    slots: int = 0
    prefetch: bool = False
    just_in_time: bool = False
    turn: int | None = None
    bf16: bool = False
    fp16: bool = False
    steps: int = 10
    evaluates: bool = False
    moves: bool = False
    fails: bool = False
    breaks: bool = False
    gpu: bool = False
    pace: float | None = None
    roots: tuple[int, ...] | None = None
    clip: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        if self.fp16:
            return torch.float16
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def is_half(self) -> bool:
        """Whether weights have 2 bytes."""
        return self.bf16 or self.fp16

    def settings(self, case: Case) -> Any:
        """Return what the flags would say."""
        return replace(
            settings_of(case),
            turn=self.turn,
            offload_chunks=self.slots,
            offload_prefetch=self.prefetch,
            offload_just_in_time=self.just_in_time,
            offload_gb_per_second=self.pace,
            offload_roots=self.roots,
            poison=self.slots > 0,
        )


def compare(case: Case, common: dict[str, Any], ways: list[dict[str, Any]]) -> list[Visits]:
    """Run ``case`` resident, then in each of ``ways``."""
    return [train(case, Way(**common | way)) for way in [{}, *ways]]


def train(case: Case, way: Way) -> Visits:
    """Run steps of AdamW on this rank's part of ``case``."""
    from megatron.adaptor import install

    session = install()
    from megatron.adaptor.offload.slots import ChunkSlots

    Layout().enter()
    whole = whole_model(case)
    session.settings = way.settings(case)
    case.layout.enter(case.num_chunks)
    with (
        _beside_a_gpu(session.updates) if way.gpu else contextlib.nullcontext(),
        _moved(ChunkSlots) if way.moves else contextlib.nullcontext(),
        _slow_updates(session.updates, fails=way.fails, breaks=way.breaks) as early,
        _noted_reductions(session.reductions) as reduced,
    ):
        training = _Training(case, way, session, whole)
        if way.breaks:
            with contextlib.suppress(ActionError):
                training.step()
            training.optimizer.state_dict()
        for number in range(way.steps):
            training.step()
            training.schedule_optimizer(number)
            if way.evaluates:
                training.evaluate()
        session.updates.settle_all()
    return training.visits(early, reduced)


class _Training:
    """Chunks of a rank with their optimizer, and what their steps were."""

    def __init__(self, case: Case, way: Way, session: Any, whole: Any) -> None:
        from megatron.core import parallel_state

        from megatron.adaptor.offload.slots import Traffic

        self.case, self.way, self.session = case, way, session
        ddp = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": way.is_half} | case.ddp
        self.chunks = stage_chunks(replace(case, ddp=ddp), whole, way.dtype)
        self.optimizer = _adamw(self.chunks, way)
        if way.fp16:
            for chunk in self.chunks:
                chunk.config.grad_scale_func = self.optimizer.scale_loss
        for one in self.optimizer.chained_optimizers:
            one.optimizer.register_step_pre_hook(self.weigh)
        self.mine = micro_batches(case)[parallel_state.get_data_parallel_rank() :: case.replicas]
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.loads: list[int] = []
        self.traffic = Traffic()
        self.device_bytes: set[int] = set()
        self.late = 0
        self.num_normed = 0

    def step(self) -> None:
        """Run forwards and backwards, and update the weights."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.weigh()
        self.run(forward_only=False)
        last = self.session.meter.last
        assert last is not None
        if last.traffic is not None:
            self.traffic = last.traffic
            self.loads.append(last.traffic.loads)
        _, norm, _ = self.optimizer.step()
        self.norms.append(-1.0 if norm is None else float(norm))
        self.num_normed = len(self.session.reductions._norms)
        self.late += any(self.session.updates.are_under_way(chunk) for chunk in self.chunks)
        self.weigh()

    def schedule_optimizer(self, number: int) -> None:
        """Change learning rate and weight decay, as they do with every step."""
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-2 * 0.8**number, 0.01 * (number + 2)

    def evaluate(self) -> None:
        """Run forwards without backwards."""
        self.run(forward_only=True)

    def run(self, *, forward_only: bool) -> None:
        """Run all micro-batches of this replica and note their loss."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        case = self.case
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step(case),
            data_iterator=[_reader(case, self.mine) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=case.num_micro_batches,
            seq_length=case.length,
            micro_batch_size=case.rows,
            forward_only=forward_only,
        )
        self.losses.append(float(sum(report["lm loss"][0] for report in reports)))

    def weigh(self, *_: Any) -> None:
        """Note what the device holds of weights and gradients, now that no step runs."""
        way, loop = self.way, self.session.loop
        if way.slots and loop._slots_of == (self.chunks, way.slots, way.pace, way.roots):
            self.device_bytes.add(_device_bytes(self.chunks, loop._slots))

    def visits(self, early: list[int], reduced: list[Any]) -> Visits:
        """Return what all steps were."""
        from megatron.core import parallel_state

        from megatron.adaptor.offload.host_memory import host_bytes
        from seq1f1b.offload.planning.memory import slot_sizes

        chunks, traffic, optimizer = self.chunks, self.traffic, self.optimizer
        stage = parallel_state.get_pipeline_model_parallel_rank()
        setting = _setting(self.case, self.way)
        return Visits(
            weights=_hash(p for chunk in chunks for p in chunk.parameters()),
            states=_hash(_states(optimizer)),
            losses=self.losses,
            norms=self.norms,
            loads=self.loads,
            weights_in=traffic.weights_in,
            gradients_in=traffic.gradients_in,
            gradients_out=traffic.gradients_out,
            buffer_bytes=sum(_bytes(buffer) for chunk in chunks for buffer in _buffers(chunk)),
            largest_bytes=_largest_bytes(chunks),
            planned_bytes=sum(slot_sizes(setting, stage, num_slots=1)),
            device_bytes=self.device_bytes,
            host_bytes=_host_bytes(chunks, optimizer),
            estimated_bytes=host_bytes(setting, [stage]),
            late=self.late,
            early=early,
            reduced=len(reduced),
            weights_normed=(self.num_normed, len(list(_weights(optimizer)))),
        )


def _adamw(chunks: list[Any], way: Way) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.01,
        clip_grad=way.clip,
        bf16=way.bf16,
        fp16=way.fp16,
        initial_loss_scale=2.0**20,
        hysteresis=1,
        params_dtype=way.dtype,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def _largest_bytes(chunks: list[Any]) -> int:
    """Weigh the largest chunk's buffers of each kind."""
    return sum(
        max((sum(map(_bytes, getattr(chunk, kind))) for chunk in chunks), default=0)
        for kind in ("buffers", "expert_parallel_buffers")
    )


def _hash(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().clone().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _states(optimizer: Any) -> Iterator[torch.Tensor]:
    for one, parameter in _weights(optimizer):
        state = one.optimizer.state[parameter]
        yield from (parameter, state["exp_avg"], state["exp_avg_sq"], state["step"])


def _weights(optimizer: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield the weights of each optimizer of a chain."""
    for one in optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            yield from ((one, parameter) for parameter in group["params"])


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
    for one, parameter in _weights(optimizer):
        state = one.optimizer.state[parameter]
        tensors += [parameter, state["exp_avg"], state["exp_avg_sq"]]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _setting(case: Case, way: Way) -> Any:
    """Return what the planner knows of a case."""
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
        "bf16": way.bf16,
        "fp16": way.fp16,
    }
    if case.experts:
        options |= {"num_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}
        options |= {"expert_model_parallel_size": case.experts_shared}
    return resolve(options, num_gpus=case.num_ranks)


@contextlib.contextmanager
def _slow_updates(updates: Any, *, fails: bool, breaks: bool) -> Iterator[list[int]]:
    """Let updates in a thread take longer than an action, or raise; tell of those on arrival.

    The last backward of a step waits for them to begin, so that their order does not hang on time.
    """
    from megatron.core.optimizer import DistributedOptimizer

    from megatron.adaptor.step.step import Step

    step, expect, backward = (
        DistributedOptimizer.step_with_ready_grads,
        updates.expect,
        Step.backward,
    )
    begun: set[Any] = set()
    early: list[int] = []

    def slowly(optimizer: Any) -> Any:
        begun.add(optimizer.model_chunks[0])
        if threading.current_thread() is not threading.main_thread():
            time.sleep(_SECONDS_LATE)
            if fails:
                raise RuntimeError("cosmic ray")
        return step(optimizer)

    def expect_anew(chunk: Any, arrived: Any) -> None:
        begun.discard(chunk)
        expect(chunk, arrived)

    def backward_after(self: Any, action: Any, *arguments: Any) -> Any:
        actions = self.plan.schedule.stages[self.stage]
        if action == [one for one in actions if one.kind.is_backward][-1]:
            deadline = time.monotonic() + _PATIENCE
            while not begun.issuperset(updates._begun):
                assert time.monotonic() < deadline, "no update begins while the step computes"
                time.sleep(1e-3)
            early.append(len(updates._begun))
            if breaks and self.stage == 0:
                raise RuntimeError("cosmic ray")
        return backward(self, action, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedOptimizer, "step_with_ready_grads", slowly)
        patch.setattr(updates, "expect", expect_anew)
        patch.setattr(Step, "backward", backward_after)
        yield early


@contextlib.contextmanager
def _noted_reductions(reductions: Any) -> Iterator[list[Any]]:
    """Tell of model chunks whose gradients are reduced before they leave the device."""
    reduced: list[Any] = []
    reduce = reductions.reduce

    def note(chunk: Any, gradients: Any) -> None:
        reduced.append(chunk)
        reduce(chunk, gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "reduce", note)
        yield reduced


@contextlib.contextmanager
def _beside_a_gpu(updates: Any) -> Iterator[None]:
    """Take the CPU for a GPU that has memory of its own, and look for races with its copies."""
    from megatron.adaptor.cpu import device
    from megatron.adaptor.offload import updates as module
    from megatron.adaptor.offload.link import CudaLink
    from megatron.adaptor.offload.slots import ChunkSlots
    from megatron.adaptor.step import loop

    streams, begin = Streams(), ChunkSlots.begin

    def watched(self: Any, *arguments: Any, **options: Any) -> None:
        buffers = [buffer for chunk in self._chunks for buffer in _buffers(chunk)]
        streams.watch(self.tensors, [t for b in buffers for t in (b.param_data, b.grad_data)])
        begin(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, streams:
        patch.setattr(device, "has_gpu", lambda: True)
        patch.setattr(loop, "link_of", lambda *_: CudaLink(streams))
        patch.setattr(ChunkSlots, "begin", watched)
        patch.setattr(module, "ThreadPoolExecutor", streams.Executor)
        patch.setattr(module, "Future", streams.Future)
        patch.setattr(updates, "_worker", None)
        yield
    assert streams.num_operations > 0


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
