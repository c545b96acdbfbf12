"""From a model and a cluster to ranked settings."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from seq1f1b.planner.candidates import ERROR, Candidate, candidates
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.cuts import capped_cuts, fastest_cut
from seq1f1b.planner.memory import GIB, estimate_peak, trace_fullest
from seq1f1b.planner.problem import Plan, Problem, Row
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time import StepTime, num_actions, step_time

_SIMULATED, _REFINED, _KEPT, _MOST_TRACED = 40, 4, 6, 12
_MOST_ACTIONS, _ACTIONS_OF_A_LONG_STEP = 1_500_000, 150_000
_MOST_ACTIONS_OF_GREEDY = 3000
_MOST_ACTIONS_OF_CUTS = 3000
_CUTS = {"seq1f1b_balance_method", "seq1f1b_lengths"}
_SAME_TIME = 0.005
MARGIN = 0.05
"""Share of the limit that a recommended setting leaves free."""
Progress = Callable[[str], None]


def _silent(text: str) -> None:
    del text


def search(problem: Problem, report: Progress = _silent) -> Plan:
    """Rank settings by their simulated step time; those whose traced memory fits come first.

    A closed form prunes; the rest are simulated, and the fastest traced tensor by tensor. The best
    few that fit are simulated and traced with other cuts and orders too. ``report`` is told how far
    the search is. Raises SettingError when Megatron takes no setting at all.
    """
    looked_at = candidates(problem)
    fitting = [one for one in looked_at if one.gib <= problem.limit_gib * ERROR]
    report(f"{len(looked_at)} settings looked at, {len(fitting)} may fit")
    steps = _simulated(problem, _affordable(sorted(fitting, key=_seconds)))
    report(f"{len(steps)} settings simulated")
    rows, overfull = _traced(problem, sorted(steps, key=_seconds))
    if not rows:
        least = _simulated(problem, sorted(looked_at, key=lambda one: one.gib)[:2])
        rows, others = _traced(problem, least)
        overfull = sorted(others, key=lambda row: row.peak_gib)
    rows = _ranked(problem, rows)
    rows = _ranked(problem, [*rows, *_refined(problem, rows[:_REFINED])])
    return Plan(problem, tuple(rows), tuple(overfull), len(looked_at))


def evaluate(problem: Problem, setting: Setting) -> Row:
    """Simulate and trace one setting."""
    return _row(problem, step_time(setting, problem.kernels, problem.runtime))


def is_tight(problem: Problem, row: Row) -> bool:
    """Whether a setting leaves less free than the memory model may be off."""
    return row.peak_gib > problem.limit_gib * (1 - MARGIN)


def _seconds(one: Candidate | StepTime) -> float:
    return one.seconds


def _simulated(problem: Problem, chosen: Iterable[Candidate]) -> list[StepTime]:
    return [step_time(one.setting, problem.kernels, problem.runtime) for one in chosen]


def _pipeline(problem: Problem, setting: Setting) -> float:
    return step_time(setting, problem.kernels, problem.runtime).pipeline


def _affordable(ordered: Sequence[Candidate]) -> list[Candidate]:
    """Return the first few, as many as can be simulated in some seconds."""
    chosen, actions = [], 0
    for one in ordered[:_SIMULATED]:
        chosen.append(one)
        actions += min(num_actions(one.setting), _ACTIONS_OF_A_LONG_STEP)
        if actions > _MOST_ACTIONS and len(chosen) >= _REFINED:
            break
    return chosen


def _variants(problem: Problem, setting: Setting) -> Iterator[Setting]:
    """Yield the same setting with other cuts and orders of actions, of those that nothing fixes."""
    a, given = setting.arguments, problem.values
    if setting.num_splits > 1 and setting.cuts is None and not _CUTS.intersection(given):
        yield replace(setting, arguments=replace(a, seq1f1b_balance_method="average"))
        if num_actions(setting) <= _MOST_ACTIONS_OF_CUTS:
            yield fastest_cut(setting, partial(_pipeline, problem))
    heads = setting.model.heads if setting.model.latent else setting.model.groups
    if heads % (setting.tensor * setting.context):
        return  # the executor exchanges tokens for heads
    if setting.context > 1 and a.mtp_num_layers:
        return  # which it does not predict ahead with
    has_biases = a.add_bias_linear or a.add_qkv_bias
    if has_biases or setting.num_stages == 1 or "seq1f1b_schedule" in given:
        return  # Transformer Engine's layers cannot defer the gradients of biases
    if setting.num_chunks == 1:
        split = setting.num_splits > 1
        name = ScheduleName.SEQ_ZERO_BUBBLE if split else ScheduleName.ZERO_BUBBLE
        yield replace(setting, schedule_name=name)
    parts = setting.num_chunks * setting.num_splits
    if 3 * setting.num_stages * setting.num_micro_batches * parts <= _MOST_ACTIONS_OF_GREEDY:
        yield replace(setting, schedule_name=ScheduleName.GREEDY)


def _traced(problem: Problem, steps: list[StepTime]) -> tuple[list[Row], list[Row]]:
    """Trace the fastest until enough of them fit; return those that fit, and the others."""
    rows: list[Row] = []
    overfull: list[Row] = []
    for step in steps[:_MOST_TRACED]:
        row = _row(problem, step)
        (rows if row.peak_gib <= problem.limit_gib else overfull).append(row)
        if sum(not is_tight(problem, one) for one in rows) == _KEPT:
            break
    rows += _capped(problem, overfull)
    return rows, overfull


def _refined(problem: Problem, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield those of ``rows`` with other cuts and orders that fit."""
    for row in rows:
        for setting in _variants(problem, row.setting):
            other = evaluate(problem, setting)
            if other.peak_gib <= problem.limit_gib:
                yield other


def _ranked(problem: Problem, rows: list[Row]) -> list[Row]:
    fastest = min((row.step.seconds for row in rows), default=0.0)
    return sorted(rows, key=lambda row: _rank(problem, row, fastest))


def _capped(problem: Problem, overfull: list[Row]) -> Iterator[Row]:
    """Yield the fastest of those that do not fit, cut into more similar lengths that do.

    Unequal lengths fragment memory and make the first sub-sequence the largest.
    """
    if _CUTS.intersection(problem.values):
        return
    for row in overfull[:_REFINED]:
        if row.setting.num_splits == 1:
            continue
        for lengths in capped_cuts(row.setting):
            setting = row.setting.with_cuts(lengths)
            if estimate_peak(setting, problem.runtime) > problem.limit_gib * ERROR:
                continue
            capped = evaluate(problem, setting)
            if capped.peak_gib <= problem.limit_gib:
                yield capped
                break


def _rank(problem: Problem, row: Row, fastest: float) -> tuple[bool, int, float]:
    """Order by time in steps of half a percent, and within a step by memory."""
    slower = round(math.log(row.step.seconds / fastest) / _SAME_TIME)
    return is_tight(problem, row), slower, row.peak_gib


def _row(problem: Problem, step: StepTime) -> Row:
    searched = step.setting.schedule_name is ScheduleName.GREEDY
    schedule = step.simulation.schedule if searched else None
    stage, memory = trace_fullest(step.setting, problem.runtime, schedule)
    return Row(step.setting, step, memory.reserved / GIB, stage)
