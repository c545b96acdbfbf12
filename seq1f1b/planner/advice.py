"""What is worth a warning about a setting."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from seq1f1b.planner.balance import balanced_layout, deal_layers
from seq1f1b.planner.catalogue import by_shape
from seq1f1b.planner.chunks import chunk_operations
from seq1f1b.planner.layout import parse_layout, write_layout
from seq1f1b.planner.memory import estimate_peak
from seq1f1b.planner.problem import Problem
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting, with_recomputed_loss
from seq1f1b.planner.time import StepTime, step_time
from seq1f1b.sequence import PartitionError, imbalance

_IMBALANCE, _LATE, _SLOWER, _LOGITS = 0.10, 0.05, 0.005, 0.15


def warnings(problem: Problem, step: StepTime) -> Iterator[str]:
    """Yield a sentence for each setting that costs time or memory, with the flag that avoids it."""
    setting = step.setting
    yield from _too_short(problem, step)
    yield from _unbalanced(setting)
    yield from _without_pipeline(setting, problem.runtime)
    yield from _keeps_logits(setting, problem.runtime)
    layout = None
    if setting.num_stages > 1:
        layout = balanced_layout(setting, problem.kernels, problem.runtime)
    yield from _late(setting, step.stage_seconds, layout)


def warnings_by_operations(setting: Setting, runtime: Runtime) -> Iterator[str]:
    """Yield the warnings that need no device: those that follow from operations and memory."""
    yield from _unbalanced(setting)
    yield from _without_pipeline(setting, runtime)
    yield from _keeps_logits(setting, runtime)
    work = [
        sum(cost.of_first(setting.seq_length) for cost in chunks)
        for chunks in chunk_operations(setting)
    ]
    whole = setting.model.token_cost(0).of_first(setting.seq_length)
    layer = whole / setting.model.num_layers
    end = setting.model.token_cost(setting.vocabulary).of_first(setting.seq_length) - whole
    parts = setting.num_stages * setting.num_chunks
    counts = deal_layers(setting.model.num_layers, parts, layer, 0.0, end)
    layout = write_layout(counts, setting.model.mtp)
    yield from _late(setting, work, layout)


def _too_short(problem: Problem, step: StepTime) -> Iterator[str]:
    setting = step.setting
    if setting.num_splits == 1 or not setting.schedule_name.is_one_f_one_b:
        return
    fewer = setting.num_splits // 2
    faster: StepTime | None = None
    while fewer >= 1:
        other = step_time(with_splits(setting, fewer), problem.kernels, problem.runtime)
        fits = estimate_peak(other.setting, problem.runtime) <= problem.limit_gib
        if fits and (faster is None or other.seconds < faster.seconds):
            faster = other
        fewer //= 2
    if faster is not None and faster.seconds < step.seconds * (1 - _SLOWER):
        yield (
            f"--seq1f1b-splits {setting.num_splits}: sub-sequences of {min(setting.lengths)} "
            f"tokens are too short to pay; with {faster.setting.num_splits} a step takes "
            f"{1 - faster.seconds / step.seconds:.1%} less time"
        )


def with_splits(setting: Setting, num_splits: int) -> Setting:
    """Return the setting with another number of sub-sequences, cut by its balance method."""
    return replace(
        setting,
        num_splits=num_splits,
        cuts=None,
        arguments=replace(setting.arguments, seq1f1b_lengths=None),
        schedule_name=by_shape(setting.num_chunks, num_splits),
    )


def _unbalanced(setting: Setting) -> Iterator[str]:
    if setting.num_splits == 1:
        return
    cost = setting.model.token_cost(setting.vocabulary)
    excess = imbalance(setting.lengths, cost)
    if excess <= _IMBALANCE:
        return
    method = setting.arguments.seq1f1b_balance_method
    flag = f"--seq1f1b-balance-method {method}"
    advice = "uniform_comp balances it"
    if method == "uniform_comp":
        flag, advice = f"--seq1f1b-multiple {setting.multiple}", "use a smaller multiple"
    yield f"{flag}: the longest sub-sequence takes {excess:.0%} longer than the mean; {advice}"


def _without_pipeline(setting: Setting, runtime: Runtime) -> Iterator[str]:
    if setting.num_splits == 1 or setting.num_stages > 1:
        return
    try:
        whole = estimate_peak(with_splits(setting, 1), runtime)
    except PartitionError:
        return
    cut = estimate_peak(setting, runtime)
    yield (
        f"--seq1f1b-splits {setting.num_splits}: without pipeline stages sub-sequences save no "
        f"time and cost memory, about {cut:.1f} instead of {whole:.1f} GiB"
    )


def _keeps_logits(setting: Setting, runtime: Runtime) -> Iterator[str]:
    """Warn of a last stage that is the fullest by its logits, and name the flag against it."""
    if setting.num_splits == 1 or setting.recompute.loss or setting.model.mtp:
        return
    kept = estimate_peak(setting, runtime)
    computed = estimate_peak(with_recomputed_loss(setting), runtime)
    if computed < kept * (1 - _LOGITS):
        yield (
            f"the logits of all sub-sequences make the last stage the fullest, about {kept:.1f} "
            f"GiB; --seq1f1b-recompute-loss makes it {computed:.1f} and computes the output layer "
            "twice"
        )


def _late(setting: Setting, work: Sequence[float], layout: str | None) -> Iterator[str]:
    """Warn of a last stage that computes longer than the others, and name a layout against it."""
    if len(work) == 1:
        return
    excess = work[-1] * (len(work) - 1) / sum(work[:-1]) - 1
    is_in_use = layout == setting.arguments.pipeline_model_parallel_layout
    if excess <= _LATE or work[-1] < max(work) or layout is None or is_in_use:
        return
    if parse_layout(layout) == _current(setting):
        return
    yield (
        f"the output layer makes the last stage {excess:.0%} longer than the others; "
        f"--pipeline-model-parallel-layout '{layout}' makes room for it"
    )


def _current(setting: Setting) -> list[str]:
    """Return the layers of every model chunk, in the order of the model, as a layout has them."""
    return [
        "E" * chunk.embedding + "t" * len(chunk.layers) + "m" * chunk.mtp + "L" * chunk.head
        for chunks in zip(*setting.chunks, strict=True)
        for chunk in chunks
    ]
