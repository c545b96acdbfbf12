"""Why one setting is slower than another, in words."""

from collections.abc import Sequence

from seq1f1b.planner.problem import Row
from seq1f1b.planner.setting import Recompute, Setting

_SAME = 0.002


def why_slower(row: Row, best: Row) -> str:
    """Return what a row loses against the best one: the largest of its differences."""
    ours, theirs = _parts(row), _parts(best)
    slower = row.step.seconds / best.step.seconds - 1
    if slower < _SAME:
        more = row.peak_gib - best.peak_gib
        lead = "as fast" if slower > -_SAME else f"{-slower:.1%} less time"
        return f"{lead}, {more:.1f} GiB more" if more >= 0.05 else lead
    part = max(ours, key=lambda name: ours[name] - theirs[name])
    return f"{slower:.1%} slower: {_word(part, row, best)}"


def _parts(row: Row) -> dict[str, float]:
    """Return where a step's seconds go."""
    step = row.step
    number = step.setting.num_micro_batches
    mean, longest = _mean(step.stage_seconds), max(step.stage_seconds)
    return {
        "waiting": step.pipeline - longest * number,
        "imbalance": (longest - mean) * number,
        "work": mean * number,
        "reduction": step.reduction,
        "optimizer": step.optimizer,
    }


def _word(part: str, row: Row, best: Row) -> str:
    ours, theirs = row.setting, best.setting
    if part == "waiting":
        return f"bubble {row.step.bubble_ratio:.1%} instead of {best.step.bubble_ratio:.1%}"
    if part == "imbalance":
        excess = max(row.step.stage_seconds) / _mean(row.step.stage_seconds) - 1
        return f"its slowest stage computes {excess:.1%} longer than the mean"
    if part == "reduction":
        extra = row.step.reduction - best.step.reduction
        return f"gradient reduction takes {extra * 1e3:.0f} ms longer"
    if part == "optimizer":
        return "more parameters on a rank for the optimizer"
    if ours.recompute != theirs.recompute and ours.recompute != Recompute():
        return f"computes {recompute_word(ours.recompute)} anew"
    if ours.tensor * ours.context > theirs.tensor * theirs.context:
        return "more time in tensor- and context-parallel collectives"
    if _shortest(ours) < _shortest(theirs):
        return f"kernels of {_shortest(ours)} tokens run at a lower rate"
    return "its kernels and collectives take longer"


def _shortest(setting: Setting) -> int:
    """Return the fewest tokens that a rank's kernels get."""
    return min(setting.tokens(part) for part in range(setting.num_splits))


def _mean(seconds: Sequence[float]) -> float:
    return sum(seconds) / len(seconds)


def recompute_word(recompute: Recompute) -> str:
    """Return what is computed anew, as short as can be."""
    words = sorted(recompute.modules)
    if recompute.granularity == "full":
        words = ["whole layers" if recompute.method == "uniform" else "some layers"]
    if recompute.loss:
        words.append("loss")
    return " + ".join(words) or "nothing"
