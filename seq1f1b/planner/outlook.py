"""What would make a model fit that does not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from seq1f1b.planner.candidates import may_fit
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.gpu import gpu, gpus
from seq1f1b.planner.problem import Problem, Row

_MOST_GPUS, _SHORTEST = 8, 8


def ways_to_fit(problem: Problem, closest: Sequence[Row]) -> Iterator[str]:
    """Yield changes of the problem, each by itself, under which a setting fits in closed form."""
    fixed = closest[0].setting.arguments if closest else None
    if fixed is not None and fixed.recompute_granularity != "full" and _is_fixed(problem):
        yield "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    factor = 2
    while factor <= _MOST_GPUS:
        more = replace(problem, num_gpus=problem.num_gpus * factor)
        if _fits(more):
            yield f"--gpus {more.num_gpus}"
            break
        factor *= 2
    length = problem.values["seq_length"]
    for divisor in (2, 4, _SHORTEST):
        shorter = _with(problem, seq_length=length // divisor)
        if length % divisor == 0 and _fits(shorter):
            yield f"--seq-length {length // divisor}"
            break
    larger = [
        name
        for name in gpus()
        if gpu(name).usable_gib.value > problem.limit_gib and gpu(name).runtime == "current"
    ]
    for name in sorted(larger, key=lambda name: gpu(name).usable_gib.value):
        if _fits(replace(problem, gpu=gpu(name))):
            yield f"--gpu {name}, with {gpu(name).usable_gib.value:.0f} GiB usable"
            break


def _is_fixed(problem: Problem) -> bool:
    """Whether the recomputation was given, so that the search did not try more of it."""
    names = ("recompute_granularity", "recompute_activations")
    return any(problem.values.get(name) for name in names)


def _with(problem: Problem, **values: Any) -> Problem:
    changed = {**problem.values, **values}
    changed.pop("max_position_embeddings", None)
    return replace(problem, values=changed)


def _fits(problem: Problem) -> bool:
    try:
        return may_fit(problem)
    except SettingError:
        return False
