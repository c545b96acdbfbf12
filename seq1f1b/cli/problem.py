"""From flags to what is to be simulated; every combination that makes no sense has its error."""

from dataclasses import dataclass
from pathlib import Path

from seq1f1b.cli.options import BalanceName, flag_error
from seq1f1b.cli.source import EqualCosts, ModelCosts, Source, TraceCosts
from seq1f1b.planner.catalogue import ScheduleName, by_shape, make
from seq1f1b.schedule import Schedule
from seq1f1b.simulate import CostError, Simulation, greedy, memory_over_time, simulate
from seq1f1b.timeline import Span, Timeline


@dataclass(frozen=True)
class Shape:
    """How many stages, model chunks, micro-batches and sub-sequences there are."""

    stages: int
    chunks: int
    micro_batches: int
    splits: int

    def generate(
        self, source: Source, name: ScheduleName, group: int | None, max_live: int | None
    ) -> Schedule:
        """Make the schedule, with a message that names the flag where it has no such shape."""
        if name is not ScheduleName.GREEDY:
            self._check(name)
        if group is not None and not name.has_chunks:
            raise flag_error("--group", f"{name} takes no turns; only interleaved schedules do")
        if max_live is not None and name is not ScheduleName.GREEDY:
            raise flag_error("--max-live", f"{name} holds what it holds; only greedy takes a cap")
        if self.chunks > 1 and self.stages == 1:
            raise flag_error("--stages", f"{name} needs at least 2 stages")
        if name is ScheduleName.GREEDY:
            return self._greedy(source, max_live)
        try:
            return make(name, self.stages, self.chunks, self.micro_batches, self.splits, group)
        except ValueError as error:
            raise flag_error("--group", str(error)) from None

    def _check(self, name: ScheduleName) -> None:
        if not name.has_chunks and self.chunks > 1:
            raise flag_error("--chunks", f"{name} has 1 model chunk a stage, not {self.chunks}")
        if name.has_chunks and self.chunks == 1:
            raise flag_error("--chunks", f"{name} needs at least 2 model chunks a stage")
        if name is not ScheduleName.GPIPE and not name.has_splits and self.splits > 1:
            raise flag_error("--splits", f"{name} has 1 sub-sequence, not {self.splits}")
        if name.has_splits and self.splits == 1:
            raise flag_error("--splits", f"{name} needs at least 2 sub-sequences")

    def _greedy(self, source: Source, max_live: int | None) -> Schedule:
        sizes = self.stages, self.chunks, self.micro_batches, self.splits
        like = make(by_shape(self.chunks, self.splits), *sizes)
        costs, link = source.costs(like), source.link(like)
        try:
            return greedy(*sizes, costs, link, max_live=max_live)
        except CostError as error:
            raise flag_error("--trace", str(error)) from None
        except ValueError as error:
            raise flag_error("--max-live", str(error)) from None


def make_source(
    *,
    trace: Path | None,
    seq_length: int | None,
    hidden_size: int | None,
    layers: int | None,
    heads: int | None,
    query_groups: int | None,
    ffn_hidden_size: int | None,
    micro_batch_size: int,
    balance_method: BalanceName,
    multiple: int,
    backward_ratio: float,
    tflops: float,
    latency: float,
    bandwidth: float | None,
) -> Source:
    """Choose where costs come from by which flags are given."""
    model = {
        "--seq-length": seq_length,
        "--hidden-size": hidden_size,
        "--layers": layers,
        "--heads": heads,
    }
    given = [flag for flag, value in model.items() if value is not None]
    if trace is not None:
        if given:
            raise flag_error(given[0], "a trace has its own costs; leave out the model or --trace")
        if bandwidth is not None:
            raise flag_error("--bandwidth", "the size of a trace's tensors is not known")
        return TraceCosts.read(trace, latency)
    if seq_length and hidden_size and layers and heads:
        return ModelCosts(
            seq_length=seq_length,
            hidden_size=hidden_size,
            layers=layers,
            heads=heads,
            query_groups=query_groups,
            ffn_hidden_size=ffn_hidden_size,
            micro_batch_size=micro_batch_size,
            balance_method=balance_method,
            multiple=multiple,
            backward_ratio=backward_ratio,
            tflops=tflops,
            latency=latency,
            bandwidth=bandwidth,
        )
    if given:
        missing = [flag for flag, value in model.items() if value is None]
        raise flag_error(given[0], f"a model needs {', '.join(missing)} too")
    if bandwidth is not None:
        raise flag_error("--bandwidth", f"needs a model: {', '.join(model)}")
    if balance_method is BalanceName.uniform_comp:
        raise flag_error("--balance-method", f"uniform_comp needs a model: {', '.join(model)}")
    return EqualCosts(backward_ratio, latency)


def make_shape(
    source: Source,
    stages: int | None,
    chunks: int | None,
    micro_batches: int | None,
    splits: int | None,
) -> Shape:
    """Take what is given, from the trace what is not, and 1 for chunks and splits without one."""
    own = source.schedule if isinstance(source, TraceCosts) else None
    if own is not None:
        if stages not in (None, own.num_stages):
            raise flag_error("--stages", f"{stages}, but the trace has {own.num_stages}")
        return Shape(
            own.num_stages,
            chunks or own.num_chunks,
            micro_batches or own.num_micro_batches,
            splits or own.num_splits,
        )
    if stages is None:
        raise flag_error("--stages", "how many pipeline stages? Give it, or a --trace")
    if micro_batches is None:
        raise flag_error("--microbatches", "how many micro-batches? Give it, or a --trace")
    return Shape(stages, chunks or 1, micro_batches, splits or 1)


def make_schedule(
    source: Source,
    shape: Shape,
    name: ScheduleName | None,
    group: int | None,
    max_live: int | None,
) -> Schedule:
    """Generate what is named, or what the shape asks for; from a trace its own order of actions."""
    if isinstance(source, TraceCosts) and not (name or group or max_live):
        own = source.schedule
        if shape == Shape(own.num_stages, own.num_chunks, own.num_micro_batches, own.num_splits):
            return own
    return shape.generate(source, name or by_shape(shape.chunks, shape.splits), group, max_live)


def run(source: Source, schedule: Schedule) -> Simulation:
    """Simulate, with the costs of ``source``."""
    try:
        return simulate(schedule, source.costs(schedule), source.link(schedule))
    except CostError as error:
        raise flag_error("--trace", str(error)) from None


def as_timeline(source: Source, result: Simulation) -> Timeline:
    """Return what the pictures draw of a simulation."""
    stages = zip(result.schedule.stages, result.starts, result.ends, strict=True)
    return Timeline(
        result.schedule.name,
        tuple(
            tuple(Span(*entry) for entry in zip(actions, starts, ends, strict=True))
            for actions, starts, ends in stages
        ),
        seconds=source.seconds,
        memory=memory_over_time(result, source.memory(result.schedule)),
        memory_unit=source.memory_unit,
    )
