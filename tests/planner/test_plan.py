"""The search, what it ranks first, and what it says of the rest."""

import json
import shlex
import subprocess
import time

import pytest
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.planner.advice import warnings
from seq1f1b.planner.balance import balanced_layout, deal_layers
from seq1f1b.planner.candidates import candidates, may_fit
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.gpu import gpu
from seq1f1b.planner.launch import Launcher, flags, script
from seq1f1b.planner.memory import estimate_peak, trace_memory
from seq1f1b.planner.outlook import ways_to_fit
from seq1f1b.planner.presets import model_options
from seq1f1b.planner.problem import Plan, Problem, with_defaults
from seq1f1b.planner.reasons import why_slower
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.search import evaluate, search
from seq1f1b.planner.setting import megatron_values

QUESTION = shlex.split(
    "plan --model llama-13b --gpus 32 --gpu a100-80g --seq-length 65536 --global-batch-size 32"
)


def problem(model: str, gpus: int, kind: str = "a100-80g", **values: object) -> Problem:
    options = {"seq_length": 32768, "global_batch_size": 64} | values
    return Problem(model_options(model) | options, gpus, gpu(kind), 8)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return search(problem("llama-13b", 32, seq_length=65536, global_batch_size=32))


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output
    return result.output


def test_rows_fit_and_the_first_is_fastest_within_half_a_percent(plan):
    assert len(plan.rows) >= 5
    limit = plan.problem.limit_gib
    roomy = [row for row in plan.rows if row.peak_gib <= 0.95 * limit]
    assert all(row.peak_gib <= limit for row in plan.rows)
    assert plan.rows[0] in roomy
    assert plan.rows[0].step.seconds <= 1.006 * min(row.step.seconds for row in roomy)


def test_every_rank_is_used(plan):
    for row in plan.rows:
        setting = row.setting
        assert setting.num_gpus == 32
        assert setting.num_micro_batches * setting.data * setting.micro_batch_size == 32
        assert sum(len(c.layers) for stage in setting.chunks for c in stage) == 40


def test_each_row_says_why_it_loses(plan):
    best = plan.rows[0]
    for row in plan.rows[1:]:
        text = why_slower(row, best)
        assert "slower: " in text or text.startswith("as fast")


@pytest.mark.long
def test_options_that_are_given_stay():
    fixed = {
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 8,
        "context_parallel_size": 1,
        "seq1f1b_splits": 4,
        "recompute_granularity": "selective",
    }
    for row in search(problem("llama-13b", 32, **fixed)).rows:
        setting = row.setting
        assert (setting.tensor, setting.num_stages, setting.context) == (4, 8, 1)
        assert setting.num_splits == 4
        assert setting.recompute.granularity == "selective"


@pytest.mark.parametrize("kind", ["a100-80g", "h100"])
def test_over_splitting_is_ranked_below_and_warned_of(kind):
    options = {
        "num_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "seq_length": 16384,
        "global_batch_size": 8,
        "pipeline_model_parallel_size": 8,
        "position_embedding_type": "rope",
        "attention_dropout": 0.0,
    }
    given = Problem(options, 8, gpu(kind), 8)
    four, eight = (
        evaluate(given, resolve(options | {"seq1f1b_splits": splits}, num_gpus=8))
        for splits in (4, 8)
    )
    assert four.step.seconds < eight.step.seconds
    assert any("too short to pay" in text for text in warnings(given, eight.step))
    assert not any("too short" in text for text in warnings(given, four.step))


def test_the_layout_saves_the_share_of_the_head():
    values = {"pipeline_model_parallel_size": 8, "seq1f1b_splits": 4}
    given = problem("llama-3-8b", 8, "h100", seq_length=8192, **values)
    even = resolve(with_defaults(given), num_gpus=8)
    layout = balanced_layout(even, given.kernels, given.runtime)
    assert layout is not None
    laid_out = resolve(
        with_defaults(given) | {"pipeline_model_parallel_layout": layout}, num_gpus=8
    )
    before, after = evaluate(given, even).step, evaluate(given, laid_out).step
    share = max(before.stage_seconds) / (sum(before.stage_seconds) / 8)
    longest = max(after.stage_seconds) / max(before.stage_seconds)
    assert share > 1.2
    assert longest < 1 / (0.9 * share) + 0.05
    assert after.seconds < before.seconds
    assert any("last stage" in text and layout in text for text in warnings(given, before))
    assert not any("last stage" in text for text in warnings(given, after))


def test_layers_are_dealt_around_the_ends():
    assert deal_layers(8, 4, 1.0, 0.0, 0.0) == [2, 2, 2, 2]
    assert deal_layers(30, 4, 1.0, 0.0, 2.0) == [8, 8, 8, 6]
    assert deal_layers(4, 2, 1.0, 3.0, 3.0) == [2, 2]
    assert sum(deal_layers(7, 1, 1.0, 1.0, 1.0)) == 7


def test_splits_without_a_pipeline_are_warned_of():
    values = {"seq1f1b_splits": 4, "pipeline_model_parallel_size": 1}
    given = problem("gpt-2.7b", 8, tensor_model_parallel_size=8, sequence_parallel=True, **values)
    row = evaluate(given, resolve(with_defaults(given), num_gpus=8))
    assert any("without pipeline stages" in text for text in warnings(given, row.step))


def test_logits_that_fill_the_last_stage_are_warned_of():
    values = {
        "seq1f1b_splits": 8,
        "pipeline_model_parallel_size": 4,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }

    def warned(**changes: object) -> bool:
        given = problem("llama-3-8b", 4, seq_length=65536, **values | changes)
        row = evaluate(given, resolve(with_defaults(given), num_gpus=4))
        return any(
            "--seq1f1b-recompute-loss makes it" in text for text in warnings(given, row.step)
        )

    assert warned()
    assert not warned(seq1f1b_recompute_loss=True)
    assert not warned(recompute_granularity=None, recompute_method=None, recompute_num_layers=None)
    assert not warned(seq1f1b_splits=1)


def test_unequal_work_is_warned_of_with_the_flag():
    values = {"seq1f1b_splits": 4, "seq1f1b_balance_method": "average"}
    given = problem("gpt-2.7b", 8, seq_length=131072, pipeline_model_parallel_size=8, **values)
    row = evaluate(given, resolve(with_defaults(given), num_gpus=8))
    assert any("--seq1f1b-balance-method average" in text for text in warnings(given, row.step))


@pytest.mark.long
def test_nothing_fits_says_by_how_much_and_what_would_help():
    given = problem("llama-3-70b", 8, "rtx-4090")
    plan = search(given)
    assert not plan.rows
    assert plan.overfull[0].peak_gib > given.limit_gib
    ways = list(ways_to_fit(given, plan.overfull))
    assert any(way.startswith("--gpu ") for way in ways)
    assert not may_fit(given)


def test_a_loss_is_recomputed_where_nothing_else_is_left():
    given = problem("llama-3-8b", 8, "rtx-4090", seq_length=65536, global_batch_size=8)
    plan = search(given)
    best = plan.rows[0]
    assert best.setting.recompute.loss
    assert best.setting.recompute.granularity == "full"
    assert best.peak_gib <= given.limit_gib
    without = resolve(megatron_values(best.setting) | {"seq1f1b_recompute_loss": False}, num_gpus=8)
    assert estimate_peak(without, given.runtime) > given.limit_gib


def test_a_problem_without_a_setting_is_refused():
    alone = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
    }
    with pytest.raises(SettingError, match="--global-batch-size 7"):
        candidates(problem("gpt-7b", 8, global_batch_size=7, **alone))


def test_thirty_billion_at_64k_without_recomputation():
    options = model_options("gpt-30b") | {
        "seq_length": 65536,
        "global_batch_size": 16,
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 8,
        "sequence_parallel": True,
    }
    words = shlex.split(
        "--model gpt-30b --gpus 64 --gpu a100-80g --seq-length 65536 --global-batch-size 16 "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --sequence-parallel "
        "--explain --json"
    )
    refused = json.loads(run("plan", *words, status=1))
    assert refused["do_not_fit"][0]["spare_gib"] < -20
    cut = json.loads(run("plan", *words, "--seq1f1b-splits", "4"))["settings"][0]
    assert cut["spare_gib"] > 20
    given = Problem(options, 64, gpu("a100-80g"), 8)
    full = trace_memory(resolve(options | {"seq1f1b_splits": 4}, num_gpus=64), given.runtime)
    assert full.peak_gib == pytest.approx(cut["peak_reserved_gib"], rel=0.03)


def test_the_question_is_answered_by_one_command():
    start = time.process_time()
    output = run(*QUESTION)
    assert time.process_time() - start < 30
    assert "tokens/s" in output
    assert "settings looked at" in output
    assert "--pipeline-model-parallel-size" in output
    assert "…" not in output
    table = output.splitlines()[1:8]
    assert max(map(len, table)) <= 80


@pytest.mark.long
def test_json_is_json_alone():
    answer = json.loads(run(*QUESTION, "--json", "--rows", "3", "--lr", "1"))
    assert len(answer["settings"]) == 3
    assert answer["without_effect"] == ["--lr"]
    best = answer["settings"][0]
    assert best["tensor"] * best["context"] * best["pipeline"] * best["data"] == 32
    assert 0.2 < best["mfu"] < 0.7


def test_a_setting_is_explained(tmp_path):
    path = tmp_path / "step.svg"
    output = run(
        *QUESTION,
        *shlex.split("--explain --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4"),
        *("--sequence-parallel", "--seq1f1b-splits", "4", "--timeline", str(path)),
    )
    assert "slowest stage computes" in output
    assert "ms a micro-batch" in output
    assert path.read_text().startswith("<?xml")


@pytest.mark.parametrize("launcher", list(Launcher))
def test_scripts_are_sound_bash_and_hold_the_flags(launcher, plan, tmp_path):
    setting = plan.rows[0].setting
    text = script(plan.problem, setting, launcher, "seq1f1b plan ...")
    path = tmp_path / "start.sh"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    for word in flags(setting):
        assert word in words or f"({word}" in words or word in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["plan", "--gpus", "8"], "Missing option"),
        (["plan", "--gpus", "8", "--gpu", "h100", "--model", "gpt-7b"], "--seq-length"),
        ([*QUESTION, "--timeline", "plan.gif"], "must end in one of"),
        ([*QUESTION, "--schedule", "1f1b"], "goes with --explain"),
        ([*QUESTION, "--gpu", "gtx"], "there is no such description"),
        ([*QUESTION, "--offload-model-chunks", "1"], "seq1f1b plan-offload plans model chunks"),
        ([*QUESTION, "--num-layer", "4"], "did you mean --num-layers?"),
    ],
)
def test_bad_input_names_the_flag(arguments, message):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_models_and_gpus_are_listed():
    assert "llama-3-8b" in run("models")
    assert "a100-80g" in run("gpus")
