"""Settings that may fit, each with its step time and memory in closed form."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from seq1f1b.planner.balance import balanced_layout, deal_layers
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.layout import write_layout
from seq1f1b.planner.memory import GIB, estimate_peak
from seq1f1b.planner.memory.parameters import static_sizes
from seq1f1b.planner.problem import Problem, with_defaults
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.setting import Setting, with_recomputed_loss
from seq1f1b.planner.space import recomputations, schedules, spreads
from seq1f1b.planner.time import action_costs, quick_seconds
from seq1f1b.schedule import Kind

ERROR = 1.1
"""How far the closed form of memory may be off before a setting is given up."""
_HOPELESS = 1.03
"""How much slower than the fastest a spread may be before its schedules are not looked at."""
_LAYOUTS = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_per_virtual_pipeline_stage",
)
_SPREAD = {
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "num_virtual_stages_per_pipeline_rank",
    "seq1f1b_splits",
    "global_batch_size",
    "micro_batch_size",
    *_LAYOUTS,
}

Values = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A setting in closed form: seconds of a step, and GiB of the fullest stage."""

    setting: Setting
    seconds: float
    gib: float


def candidates(problem: Problem) -> list[Candidate]:
    """Return for each spread, schedule and layout the fastest recomputation that may fit.

    Where none may, the one that needs least. Spreads that are slower without any bubble than the
    fastest that fits are left out. Raises SettingError when Megatron takes no setting.
    """
    found: list[Candidate] = []
    faults: list[SettingError] = []
    fastest = math.inf
    for bound, spread in _by_bound(problem, faults):
        if bound > fastest * _HOPELESS:
            break
        for one in _of_spread(problem, spread, faults):
            found.append(one)
            if one.gib <= problem.limit_gib / ERROR:
                fastest = min(fastest, one.seconds)
    if not found:
        nothing = SettingError([f"--gpus {problem.num_gpus}: no setting uses this many GPUs"])
        raise faults[0] if faults else nothing
    return found


def may_fit(problem: Problem) -> bool:
    """Whether any setting fits in closed form.

    None does where the devices together cannot keep one copy of weights, gradients and optimizer.
    """
    if sum(static_sizes(_on_one_device(with_defaults(problem)), 0)) > _bytes_of_all(problem):
        return False
    faults: list[SettingError] = []
    return any(
        one.gib <= problem.limit_gib
        for _, spread in _by_bound(problem, faults)
        for one in _of_spread(problem, spread, faults)
    )


def _bytes_of_all(problem: Problem) -> float:
    return problem.num_gpus * problem.limit_gib * GIB


def _on_one_device(values: Mapping[str, Any]) -> Setting:
    return resolve({name: value for name, value in values.items() if name not in _SPREAD})


def _by_bound(
    problem: Problem, faults: list[SettingError]
) -> list[tuple[float, Mapping[str, Any]]]:
    """Return spreads with the seconds of a step without any bubble, the fastest first."""
    values = with_defaults(problem)
    model = _on_one_device(values).model
    bounds: list[tuple[float, Mapping[str, Any]]] = []
    for spread in spreads(problem.values, model, problem.num_gpus, problem.gpus_per_node):
        plain = {name: value for name, value in values.items() if name not in _SPREAD}
        plain |= {"global_batch_size": values["global_batch_size"], **spread}
        try:
            setting = resolve(_even(plain), num_gpus=problem.num_gpus)
        except SettingError as error:
            faults.append(error)
            continue
        costs = action_costs(setting, problem.kernels, problem.runtime)
        work = costs.total(Kind.F) + costs.total(Kind.B)
        bounds.append((work * setting.num_micro_batches, spread))
    return sorted(bounds, key=lambda one: one[0])


def _of_spread(
    problem: Problem, spread: Mapping[str, Any], faults: list[SettingError]
) -> Iterator[Candidate]:
    values, given = {**with_defaults(problem), **spread}, problem.values
    model = _on_one_device(values).model
    for schedule in schedules(given, model, spread, values["seq_length"]):
        try:
            for dealt in _dealt(problem, _tiled(problem, values | schedule)):
                yield _least_recomputed(problem, model, dealt)
        except SettingError as error:
            faults.append(error)


def _tiled(problem: Problem, values: Values) -> Values:
    """Round lengths of sub-sequences to the rows that matrix products compute together."""
    tile = problem.gpu.kernel_curves.tile
    splits = values.get("seq1f1b_splits") or 1
    fits = values["seq_length"] % tile == 0 and values["seq_length"] >= 2 * tile * splits
    if splits > 1 and tile > 1 and fits:
        return {"seq1f1b_multiple": tile} | values
    return values


def _dealt(problem: Problem, values: Values) -> Iterator[Values]:
    """Yield the even layout, where there is one, and one that makes room for the output layer."""
    if any(problem.values.get(name) for name in _LAYOUTS):
        yield values
        return
    provisional = _even(values)
    if provisional is values:
        yield values
    if values["pipeline_model_parallel_size"] == 1:
        return
    setting = resolve(provisional, num_gpus=problem.num_gpus)
    layout = balanced_layout(setting, problem.kernels, problem.runtime)
    if layout is not None:
        yield _laid_out(values, layout)


def _even(values: Values) -> Values:
    """Return values with a layout where layers cannot be dealt evenly."""
    stages = values["pipeline_model_parallel_size"]
    chunks = values.get("num_virtual_stages_per_pipeline_rank") or 1
    if values["num_layers"] % (stages * chunks) == 0:
        return values
    counts = deal_layers(values["num_layers"], stages * chunks, 1.0, 0.0, 0.5)
    return _laid_out(values, write_layout(counts, values.get("mtp_num_layers") or 0))


def _laid_out(values: Values, layout: str) -> Values:
    return values | {
        "pipeline_model_parallel_layout": layout,
        "num_virtual_stages_per_pipeline_rank": None,
    }


def _least_recomputed(problem: Problem, model: Any, values: Mapping[str, Any]) -> Candidate:
    """Return the setting with the least recomputation that may fit, or the one that needs least.

    The loss is recomputed too where nothing fits otherwise.
    """
    tried = []
    for recompute in recomputations(problem.values, model):
        setting = resolve({**values, **recompute}, num_gpus=problem.num_gpus)
        gib = estimate_peak(setting, problem.runtime)
        tried.append((gib, setting))
        if gib <= problem.limit_gib:
            break
    gib, setting = min(tried, key=lambda one: one[0])
    if gib > problem.limit_gib and setting.num_splits > 1 and not setting.model.mtp:
        anew = with_recomputed_loss(setting)
        gib_anew = estimate_peak(anew, problem.runtime)
        if gib_anew <= problem.limit_gib:
            gib, setting = gib_anew, anew
    seconds = quick_seconds(setting, problem.kernels, problem.runtime)
    return Candidate(setting, seconds, gib)
