"""What iterations measured is in TensorBoard and W&B, by Megatron's own writers."""

import importlib.util
import math

import pytest

from megatron.adaptor.reports.metrics import IterationMetrics
from megatron.adaptor.reports.writers import scalars
from tests.distributed.training_runs import ARGUMENTS, SCRIPTS, run_ranks

ENTRY = IterationMetrics(7, 4.5, 10.0, 100.0, 150.0, [2**20, 2**21], [0, 2**19], [0.5, 0.25])
NAMES = [
    "seq1f1b/tokens-per-second",
    "seq1f1b/tflops-per-device",
    "seq1f1b/bubble-ratio",
    *(
        f"seq1f1b-{name}/stage-{stage}"
        for name in ("bubble-ratio", "peak-activation-mib", "kv-carry-mib")
        for stage in (0, 1)
    ),
]


def test_each_stage_has_a_name_of_its_own():
    assert dict(scalars(ENTRY)) == dict(
        zip(NAMES, [100.0, 150.0, 0.375, 0.5, 0.25, 1.0, 2.0, 0.0, 0.5], strict=True)
    )


def test_mfu_is_the_share_of_what_the_device_could_do():
    assert dict(scalars(ENTRY, peak_tflops=600.0))["seq1f1b/mfu"] == 0.25


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_training_run_fills_them(tmp_path, monkeypatch):
    flags = ["--tensorboard-dir", tmp_path / "tensorboard"]
    has_wandb = importlib.util.find_spec("wandb") is not None
    if has_wandb:
        monkeypatch.setenv("WANDB_MODE", "offline")
        flags += ["--wandb-project", "seq1f1b", "--wandb-exp-name", "test"]
        flags += ["--wandb-save-dir", tmp_path / "wandb"]
    run = run_ranks(
        2,
        *("-m", "megatron.adaptor", SCRIPTS / "plain_gpt.py", *ARGUMENTS, *flags),
        *("--pipeline-model-parallel-size", 2, "--seq1f1b-splits", 2),
    )
    assert run.returncode == 0, run.stderr[-4000:]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert {*NAMES, "lm loss"} <= set(written.Tags()["scalars"])
    for name in NAMES:
        points = written.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3, 4]
        assert all(math.isfinite(point.value) and point.value >= 0 for point in points)
    assert all(0 < p.value < 1 for p in written.Scalars("seq1f1b/bubble-ratio"))
    if not has_wandb:
        return
    (kept,) = (tmp_path / "wandb").rglob("*.wandb")
    content = kept.read_bytes()
    assert all(name.encode() in content for name in NAMES)
