"""The fastest way to train a model whose chunks visit a few GPUs, among those that fit."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from seq1f1b.offload.planning.case import Case
from seq1f1b.offload.planning.costs import action_costs, moved
from seq1f1b.offload.planning.machine import Machine
from seq1f1b.offload.planning.memory import estimated_bytes, traced_bytes
from seq1f1b.offload.planning.shape import Shape, arrange, batches, layouts
from seq1f1b.offload.planning.simulation import Adam
from seq1f1b.offload.planning.thresholds import bubble
from seq1f1b.offload.planning.ways import (
    Way,
    offloaded,
    resident,
    run_resident,
    time_visits,
    zero_offload,
)
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.layout import LayoutError
from seq1f1b.planner.memory import GIB, estimate_peak
from seq1f1b.planner.search import MARGIN
from seq1f1b.planner.setting import Setting, with_recomputed_loss
from seq1f1b.schedule import num_loads
from seq1f1b.sequence import PartitionError

_CHUNKS = (2, 3, 4, 6, 8)
_SLOTS = (1, 2, 3)
_TURNS = (1, 2, 4)
_SPLITS = (1, 2, 4, 8, 16)
_RESIDENT_CHUNKS = (1, 2, 4)
_SIMULATED, _TRACED, _MOST_ACTIONS, _MOST_OF_ONE = 24, 6, 60_000, 20_000
"""Ways that are simulated and traced, forwards and backwards of all of them and of one."""
_ESTIMATE = 1.1
"""What the estimate of memory may be off, either way."""


@dataclass(frozen=True)
class _Candidate:
    setting: Setting
    shape: Shape

    @cached_property
    def num_actions(self) -> int:
        shape = self.shape
        units = shape.num_micro_batches * shape.num_splits
        return 2 * self.setting.num_stages * shape.num_chunks * units


def best_offloaded(case: Case, adams: Iterable[Adam]) -> dict[Adam, Way | None]:
    """Return for each kind of Adam the fastest way that fits; None where none does.

    Estimates of time and memory prune; the rest is simulated, and traced tensor by tensor until one
    fits, if possible with as much to spare as the memory model may be off. Of ways within half a
    percent, the one with fewer bytes on the GPUs wins. Where none fits, backwards compute the
    output layer and the loss anew. Raises SettingError when there is no shape at all.
    """
    adams = tuple(adams)
    found = _of_each(case, adams)
    base = case.base
    if any(found.values()) or base.recompute.loss or base.arguments.mtp_num_layers:
        return found
    return _of_each(replace(case, base=with_recomputed_loss(base)), adams)


def _of_each(case: Case, adams: Iterable[Adam]) -> dict[Adam, Way | None]:
    candidates = list(_candidates(case))
    if not candidates:
        raise SettingError([_no_shape(case)])
    limit = case.machine.usable * _ESTIMATE
    fitting = [
        one for one in candidates if estimated_bytes(one.setting, case.runtime, one.shape) <= limit
    ]
    traced: dict[_Candidate, float] = {}
    return {adam: _best(case, fitting, adam, traced) for adam in adams}


def _best(
    case: Case, fitting: list[_Candidate], adam: Adam, traced: dict[_Candidate, float]
) -> Way | None:
    machine = case.machine
    ordered = sorted(fitting, key=lambda one: _estimated_seconds(one, machine, adam))
    timed: list[tuple[float, _Candidate]] = []
    actions = 0
    for one in ordered:
        if len(timed) >= _SIMULATED or (timed and actions > _MOST_ACTIONS):
            break
        actions += one.num_actions
        seconds = time_visits(one.setting, one.shape, machine, adam, num_steps=3).seconds
        timed.append((seconds, one))
    timed.sort(key=lambda entry: entry[0])
    fits: list[tuple[float, float, _Candidate]] = []
    for limit in (machine.usable * (1 - MARGIN), machine.usable):
        for seconds, one in timed:
            if fits and seconds > fits[0][0] * 1.005:
                break
            if one not in traced:
                schedule = one.shape.bare(case.num_stages)
                traced[one] = traced_bytes(
                    one.setting, case.runtime, schedule, num_slots=one.shape.num_slots
                )
            if traced[one] <= limit:
                fits.append((seconds, traced[one], one))
        if fits:
            break
    if not fits:
        return None
    _, held, chosen = min(fits, key=lambda entry: entry[1])
    return offloaded(chosen.setting, chosen.shape, machine, case.runtime, adam, gpu_bytes=held)


def _estimated_seconds(one: _Candidate, machine: Machine, adam: Adam) -> float:
    """Return about the seconds of a step, from its busiest stage, its copies and Adam."""
    setting, shape = one.setting, one.shape
    costs = action_costs(setting, machine.flops)
    busiest = max(map(_sum, costs.stages)) * shape.num_micro_batches
    sizes = setting.num_stages, shape.num_chunks, shape.num_micro_batches, shape.num_splits
    moves = moved(setting, machine)
    loads = num_loads(shape.num_chunks, shape.num_slots, shape.num_turns) / shape.num_chunks
    copies = max(map(sum, moves.weights)) * loads / machine.pcie_together
    update = sum(map(sum, moves.adam))
    computing = max(busiest * (1 + bubble(*sizes)), copies)
    if adam is Adam.SERIAL:
        return computing + update
    if adam is Adam.JUST_IN_TIME:
        return max(computing + update / shape.num_chunks, update)
    return max(computing, update)


def _sum(times: Mapping[Any, float]) -> float:
    return sum(times.values())


def _candidates(case: Case) -> Iterator[_Candidate]:
    for shape in _shapes(case):
        given = case.wanted.layout
        dealt = [given] if given else layouts(case.base, case.num_stages, shape.num_chunks)
        for layout in dealt:
            try:
                setting = arrange(case.base, case.num_stages, shape, case.rows, layout)
                shortest = min(setting.lengths)
            except LayoutError as error:  # of a layout that is given
                raise SettingError([str(error)]) from None
            except PartitionError:
                continue
            fills = shortest * setting.micro_batch_size >= case.min_tokens
            if fills or shape.num_splits == 1 or case.wanted.num_splits:
                yield _Candidate(setting, shape)


def _shapes(case: Case) -> Iterator[Shape]:
    wanted, stages = case.wanted, case.num_stages
    chunks = [wanted.num_chunks] if wanted.num_chunks else _CHUNKS
    chunks = [v for v in chunks if v * stages <= case.base.model.num_layers]
    splits = [wanted.num_splits] if wanted.num_splits else _SPLITS
    dealt = batches(case.rows)
    if wanted.num_micro_batches:
        dealt = [wanted.num_micro_batches]
    else:
        least = case.min_tokens
        dealt = [m for m in dealt if m == 1 or case.tokens / m >= least]
    for v, s, m in product(chunks, splits, dealt):
        if case.tokens / (m * s) < case.min_tokens and s > 1 and not wanted.num_splits:
            continue
        if 2 * stages * v * m * s > _MOST_OF_ONE:
            continue
        for k in [wanted.num_slots] if wanted.num_slots else {*_SLOTS, v}:
            for turns in [wanted.num_turns] if wanted.num_turns else _TURNS:
                whole = m % turns == 0 and (turns == 1 or m // turns * s >= stages)
                if k <= v and whole:
                    yield Shape(v, k, turns, s, m)


def _no_shape(case: Case) -> str:
    return (
        f"--gpus {case.num_stages}: no shape of {case.base.model.num_layers} layers, {case.rows} "
        f"sequences of {case.base.seq_length} tokens a step and what is given has at least 2 model "
        "chunks a stage with a layer each, whole micro-batches in a turn, and at most "
        f"{_MOST_OF_ONE:,} forwards and backwards"
    )


def best_resident(case: Case) -> Way | None:
    """Return the fastest (Seq)1F1B that fits with everything on the GPUs.

    Of one model chunk a stage, and of two or four. Where none fits, about the smallest; None where
    layers cannot be dealt to the stages.
    """
    machine = case.machine
    timed: list[tuple[float, Setting, Shape]] = []
    for shape in _resident_shapes(case):
        for layout in layouts(case.base, case.num_stages, shape.num_chunks):
            try:
                setting = arrange(case.base, case.num_stages, shape, case.rows, layout)
                seconds = run_resident(setting, shape, machine).step_time
            except PartitionError:
                continue
            timed.append((seconds, setting, shape))
    if not timed:
        return None
    timed.sort(key=lambda entry: entry[0])
    held = [estimate_peak(setting, case.runtime) * GIB for _, setting, _ in timed]
    limit = machine.usable * _ESTIMATE
    fitting = [one for one, estimate in zip(timed, held, strict=True) if estimate <= limit]
    tight: list[Way] = []
    for _, setting, shape in fitting[:_TRACED]:
        way = resident(setting, shape, machine, case.runtime)
        if way.gpu_bytes <= machine.usable * (1 - MARGIN):
            return way
        if way.gpu_bytes <= machine.usable:
            tight.append(way)
    if tight:
        return tight[0]
    _, setting, shape = timed[held.index(min(held))]
    return resident(setting, shape, machine, case.runtime)


def _resident_shapes(case: Case) -> Iterator[Shape]:
    stages = case.num_stages
    for v, s, m in product(_RESIDENT_CHUNKS, _SPLITS, batches(case.rows)):
        units = m * s
        fills = units == 1 or case.tokens / units >= case.min_tokens
        possible = v * stages <= case.base.model.num_layers and (v == 1 or units >= stages)
        if fills and possible and 2 * stages * v * units <= _MOST_OF_ONE:
            yield Shape(v, v, 1, s, m)


def best_zero_offload(case: Case) -> Way:
    """See ``zero_offload``."""
    return zero_offload(case.base, case.rows, case.machine, case.runtime)
