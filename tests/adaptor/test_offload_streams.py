"""Copies beside computations of a GPU: their order, and where gradients end up."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron.adaptor.offload.link import Copied, CudaLink
from megatron.adaptor.offload.reductions import Reductions
from megatron.adaptor.offload.slots import ChunkSlots
from megatron.adaptor.offload.updates import Updates
from seq1f1b.schedule import Action, Kind, Schedule, forward_only, interleaved, lower, visiting
from tests.distributed.streams import RaceError, Streams

SIZE = 6


@dataclass(eq=False)
class Buffer:
    """A flat buffer of Megatron's, as far as visits look at it."""

    param_data: torch.Tensor
    grad_data: torch.Tensor
    params: list[Any]
    param_index_map: dict[Any, Any]


class Chunk(torch.nn.Module):
    """One weight, with its flat buffer and the hook that Megatron's DDP has on its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Any = torch.nn.Parameter(torch.randn(2, SIZE // 2))
        data, gradient = torch.zeros(SIZE), torch.zeros(SIZE)
        data.copy_(self.weight.data.view(-1))
        self.weight.data, self.weight.main_grad = data.view(2, -1), gradient.view(2, -1)
        self.buffers = [  # type: ignore[assignment]
            Buffer(data, gradient, [self.weight], {self.weight: (0, SIZE, 0)})
        ]
        self.expert_parallel_buffers: list[Any] = []
        self._held = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]
        self._held.register_hook(self._make_backward_post_hook(self.weight))

    def _make_backward_post_hook(self, parameter: Any) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

        return hook


class OnArrival(Updates):
    """Descends by the gradients of each chunk in a thread of the host, as they arrive."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(lambda: None)
        self._streams, self._thread = streams, streams.Executor()
        self._done: dict[Any, Any] = {}

    def expect(self, chunk: Any, arrived: Callable[[], None]) -> None:
        done = self._done[chunk] = self._streams.Future()

        def update() -> None:
            arrived()
            descend(chunk)
            done.set_result(None)

        self._thread.submit(update)

    def settle(self, chunk: Any) -> None:
        if chunk in self._done:
            self._done.pop(chunk).result()


class Halved(Reductions):
    """Takes the mean of gradients and of as many zeros."""

    def begin(self, chunks: Any, optimizer: Any) -> None:
        pass

    def reduce(self, chunk: Any, gradients: Mapping[Any, Any]) -> None:
        for of_buffer in gradients.values():
            of_buffer.mul_(0.5)


def descend(chunk: Any) -> None:
    for buffer in chunk.buffers:
        buffer.param_data.sub_(buffer.grad_data, alpha=0.1)


class Stage:
    """Chunks of a stage that train by schedules of one row, beside streams that tell of races.

    on_arrival: whether chunks are updated as their gradients arrive, not after the step.
    """

    def __init__(
        self,
        num_chunks: int,
        num_slots: int,
        link: type[CudaLink] = CudaLink,
        *,
        on_arrival: bool = False,
    ) -> None:
        torch.manual_seed(1)
        self.chunks = [Chunk() for _ in range(num_chunks)]
        self.streams = Streams()
        self._on_arrival = on_arrival
        updates = OnArrival(self.streams) if on_arrival else Updates(lambda: None)
        self.slots = ChunkSlots(
            self.chunks, num_slots, updates, Halved(), link=link(self.streams), poison=True
        )
        buffers = [buffer for chunk in self.chunks for buffer in chunk.buffers]
        homes = [tensor for b in buffers for tensor in (b.param_data, b.grad_data)]
        self.streams.watch(self.slots.tensors, homes)

    def run(self, schedule: Schedule) -> None:
        """Run a step of the first stage, and between the steps let the host update the weights."""
        with self.streams:
            graphs: dict[Action, Any] = {}
            trains = Kind.B in {action.kind for action in schedule.stages[0]}
            self.slots.begin(schedule, 0, reduces=True)
            try:
                for action in schedule.stages[0]:
                    self._do(action, graphs, trains=trains)
            finally:
                self.slots.end()
            if not (trains and self._on_arrival):
                for chunk in self.chunks:
                    descend(chunk)

    def _do(self, action: Action, graphs: dict[Action, Any], *, trains: bool) -> None:
        chunk = self.chunks[action.chunk]
        if action.kind.is_load:
            self.slots.load(action)
        elif action.kind in (Kind.FREE_F, Kind.FREE_B):
            self.slots.free(action)
        elif action.kind is Kind.F:
            self.slots.wait(action)
            with torch.set_grad_enabled(trains):
                graphs[action] = (chunk.weight**2).sum() * (action.micro_batch + 1)
        elif action.kind is Kind.B:
            self.slots.wait(action)
            graphs.pop(action.of_kind(Kind.F)).backward()


def schedule(num_slots: int, *, turn: int, prefetch: bool) -> Schedule:
    return visiting(lower(interleaved(2, 4, 4, 1, turn)), num_slots, prefetch=prefetch)


def evaluation(num_slots: int) -> Schedule:
    return visiting(lower(forward_only(2, 4, 4, 1, 4)), num_slots, prefetch=True)


@pytest.mark.parametrize("on_arrival", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("turn, num_slots", [(4, 1), (4, 2), (4, 3), (4, 4), (2, 2), (2, 3)])
def test_nothing_races_and_weights_are_those_of_resident_chunks(
    num_slots, prefetch, turn, on_arrival
):
    visits, resident = Stage(4, num_slots, on_arrival=on_arrival), Stage(4, 4)
    for _ in range(2):
        visits.run(evaluation(num_slots))
        visits.run(schedule(num_slots, turn=turn, prefetch=prefetch))
        resident.run(evaluation(4))
        resident.run(schedule(4, turn=turn, prefetch=False))
    assert visits.streams.num_operations > 50
    for one, other in zip(visits.chunks, resident.chunks, strict=True):
        assert torch.equal(one.weight, other.weight)


# Each leaves out one thing that a copy, a computation or the host waits for.


class NotAfterComputations(CudaLink):
    @contextlib.contextmanager
    def _lane(self, direction: Any) -> Iterator[Any]:
        with self._cuda.stream(self._lanes[direction]):
            yield self._lanes[direction]


class NotAfterCopies(CudaLink):
    def start(self, direction: Any, num_bytes: int, copy: Any, after: Any = ()) -> Any:
        return super().start(direction, num_bytes, copy)


class NotWaitedFor(CudaLink):
    def _order(self, event: Any) -> None:
        pass


class NotFinished(CudaLink):
    def finish(self) -> None:
        pass


@pytest.mark.parametrize("link", [NotAfterComputations, NotAfterCopies, NotWaitedFor, NotFinished])
def test_each_wait_is_needed(link):
    stage = Stage(4, 2, link)
    steps = schedule(2, turn=4, prefetch=True)
    with pytest.raises(RaceError):
        [stage.run(steps) for _ in range(2)]


class NotArrived(CudaLink):
    def _copied(self, lane: Any) -> Copied:
        return super()._copied(lane)._replace(synchronize=lambda: None)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_an_update_waits_until_its_gradients_have_arrived(num_slots):
    with pytest.raises(RaceError, match="home"):
        Stage(4, num_slots, NotArrived, on_arrival=True).run(
            schedule(num_slots, turn=4, prefetch=True)
        )


def test_a_load_waits_for_the_update_of_its_chunk(monkeypatch):
    monkeypatch.setattr(OnArrival, "settle", lambda *_: None)
    stage = Stage(4, 2, on_arrival=True)
    stage.run(schedule(2, turn=4, prefetch=True))
    with pytest.raises(RaceError, match="home"):
        stage.run(schedule(2, turn=4, prefetch=True))


def test_the_host_changes_weights_when_an_evaluation_has_loaded_them():
    with pytest.raises(RaceError, match="home"):
        Stage(4, 2, NotFinished).run(evaluation(2))


def drop_accumulator(parameter: torch.Tensor) -> None:
    """Have autograd forget a parameter's accumulator, as it does where the device changes."""
    data = parameter.data
    parameter.data = torch.empty(data.shape, dtype=torch.float64)
    parameter.data = data


@pytest.mark.parametrize("is_kept", [True, False])
def test_gradients_reach_the_buffers_of_a_parameter_that_moves_between_devices(
    monkeypatch, is_kept
):
    moved, resident = Stage(4, 2), Stage(4, 4)
    keep = ChunkSlots._keep_hook

    def keep_after_move(slots: ChunkSlots, chunk: int, parameter: Any) -> None:
        if slots is moved.slots:
            drop_accumulator(parameter)
        if is_kept or slots is not moved.slots:
            keep(slots, chunk, parameter)

    monkeypatch.setattr(ChunkSlots, "_keep_hook", keep_after_move)
    steps = schedule(2, turn=4, prefetch=True)
    if not is_kept:
        with pytest.raises(AssertionError, match="have not been added to main_grad"):
            moved.run(steps)
        return
    for _ in range(2):
        moved.run(steps)
        resident.run(schedule(4, turn=4, prefetch=False))
    for one, other in zip(moved.chunks, resident.chunks, strict=True):
        assert torch.equal(one.weight, other.weight)
