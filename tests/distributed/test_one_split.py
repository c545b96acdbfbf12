"""One split is Megatron's own loop: bit for bit, if its attention is left alone as well."""

import json
import shlex

import pytest

from tests.distributed.training_runs import ARGUMENTS, SCRIPTS, run_ranks
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

_STAGES = "--pipeline-model-parallel-size 2"
MODELS = {
    "GPT": _STAGES,
    "GQA, gated MLP": f"{_STAGES} --group-query-attention --num-query-groups 2 --swiglu",
    "experts": (
        f"{_STAGES} --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
        "--moe-aux-loss-coeff 0.01 --disable-bias-linear"
    ),
    "virtual stages": f"{_STAGES} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4",
}
_LOCAL = shlex.split(
    "--train-iters 5 --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion "
    "--no-rope-fusion --no-gradient-accumulation-fusion"
)


def records(monkeypatch, folder, flags, *others, device_only=False):
    monkeypatch.setenv("DEVICE_ONLY", "1" if device_only else "")
    monkeypatch.setenv("RECORDS", str(folder))
    files = [folder / f"rank_{rank}.json" for rank in range(2)]
    for file in files:
        file.unlink(missing_ok=True)
    run = run_ranks(
        *(2, SCRIPTS / "recorded_gpt.py", *ARGUMENTS, *_LOCAL, *flags, *others),
        with_megatron=not device_only,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", mostly_long(MODELS, default=["GPT"]))
def test_one_split_is_megatrons_own(monkeypatch, tmp_path, name):
    flags = shlex.split(MODELS[name])
    alone = records(monkeypatch, tmp_path, flags, device_only=True)
    assert [len(record["norms"]) for record in alone] == [5, 5]
    assert alone == records(monkeypatch, tmp_path, flags, "--seq1f1b-attention", "megatron")
    ours = records(monkeypatch, tmp_path, flags)
    assert ours[1]["losses"] == [
        {key: pytest.approx(value, rel=1e-6) for key, value in losses.items()}
        for losses in alone[1]["losses"]
    ]
    assert ours[0]["norms"] == pytest.approx(alone[0]["norms"], rel=1e-5)
