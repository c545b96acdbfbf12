"""The command line, as a person types it."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.schedule import interleaved, num_loads, one_f_one_b
from seq1f1b.simulate import formulas
from seq1f1b.timeline import write_trace
from tests.timeline.drawn import planned

SHAPE = ["--stages", "4", "--microbatches", "8"]
MODEL = shlex.split(
    "--seq-length 32768 --hidden-size 4096 --num-layers 32 --num-attention-heads 32 "
    "--vocab-size 128 --position-embedding-type rope --hidden-dropout 0 --tflops 100"
)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str) -> str:
    """Return the error without the frame and line ends that a terminal gets."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    with path.open("w") as stream:
        for stage, spans in enumerate(planned(one_f_one_b(2, 3, 2)).stages):
            write_trace(stream, stage, spans)
    return str(path)


def test_version():
    assert run("--version") == f"seq1f1b {version('seq1f1b')}\n"


def test_compare_agrees_with_the_formulas():
    rows = json.loads(
        run("compare", "--stages", "8", "--microbatches", "8", "--splits", "4", "--json")
    )
    assert [row["step_time"] for row in rows] == sorted(row["step_time"] for row in rows)
    assert {(row["schedule"], row["splits"], row["chunks"]) for row in rows} == {
        ("gpipe", 1, 1),
        ("1f1b", 1, 1),
        ("1f1b-interleaved", 1, 2),
        ("zb-h1", 1, 1),
        ("greedy", 1, 1),
        ("greedy", 1, 2),
        ("seq1f1b", 4, 1),
        ("seq1f1b-interleaved", 4, 2),
        ("seq1f1b-zb-h1", 4, 1),
        ("greedy", 4, 1),
        ("greedy", 4, 2),
    }
    by_name = {row["schedule"]: row for row in rows}
    for name, s in (("zb-h1", 1), ("seq1f1b-zb-h1", 4)):
        row = by_name[name]
        assert row["step_time"] == pytest.approx(24 + formulas.zb_h1_bubble(8, s))
        assert row["bubble_ratio"] == pytest.approx(formulas.zb_h1_bubble_ratio(8, 8, s))
        assert row["bubble_ratio_in_theory"] == pytest.approx(row["bubble_ratio"])
        assert row["peak_live"] == [8 + s - 1] * 8
    for row in (row for row in rows if row["schedule"] == "greedy"):
        assert row["bubble_ratio_in_theory"] is None
        # only the wait for the first forward is left
        parts = row["chunks"] * row["splits"]
        assert row["step_time"] == pytest.approx(24 + 7 / parts)
    shapes = {"gpipe": (1, 1), "1f1b": (1, 1), "1f1b-interleaved": (2, 1), "seq1f1b": (1, 4)}
    shapes["seq1f1b-interleaved"] = (2, 4)
    for name, (v, s) in shapes.items():
        row = by_name[name]
        assert (row["chunks"], row["splits"]) == (v, s)
        assert row["bubble_ratio"] == pytest.approx(formulas.bubble_ratio(8, v, 8, s), abs=1e-12)
        assert row["step_time"] == pytest.approx(formulas.step_time(8, v, 8, s))
        assert row["bubble_ratio_in_theory"] == pytest.approx(row["bubble_ratio"])
        live = [
            formulas.live_micro_batches(8, 8, s, stage, num_chunks=v) * v * s for stage in range(8)
        ]
        assert row["peak_live"] == pytest.approx([8] * 8 if name == "gpipe" else live)
        held = [number / (v * s) for number in row["peak_live"]]
        assert row["peak_memory"] == pytest.approx(held)


def test_compare_takes_several_numbers_of_splits():
    rows = json.loads(run("compare", *SHAPE, "--splits", "1,2,8", "--chunks", "1", "--json"))
    shapes = [(row["schedule"], row["splits"]) for row in rows]
    assert sorted(shapes) == sorted(
        [
            ("gpipe", 1),
            *((name, 1) for name in ("1f1b", "zb-h1", "greedy")),
            *((name, 2) for name in ("seq1f1b", "seq1f1b-zb-h1", "greedy")),
            *((name, 8) for name in ("seq1f1b", "seq1f1b-zb-h1", "greedy")),
        ]
    )


def test_compare_prints_a_table_that_fits_a_terminal():
    output = run("compare", *SHAPE)
    table = [line for line in output.splitlines() if "x " in line]
    assert len(table) == 11
    assert max(map(len, table)) <= 80
    assert "seq1f1b-interleaved" in output
    assert "1.257x" in output
    assert "…" not in output


def test_compare_on_one_stage_leaves_interleaving_out():
    rows = json.loads(run("compare", "--stages", "1", "--microbatches", "2", "--json"))
    whole, parts = ["gpipe", "1f1b", "zb-h1", "greedy"], ["seq1f1b", "seq1f1b-zb-h1", "greedy"]
    assert sorted(row["schedule"] for row in rows) == sorted(whole + parts)
    assert all(row["bubble_ratio"] == pytest.approx(0.0) for row in rows)


def test_compare_from_a_trace_sums_the_measured_parts(trace):
    found = json.loads(run("compare", "--trace", trace, "--json"))
    assert len(found) == 7
    rows = {(row["schedule"], row["splits"]): row for row in found}
    assert rows["seq1f1b", 2]["step_time"] == pytest.approx(formulas.step_time(2, 1, 3, 2))
    assert rows["1f1b", 1]["step_time"] == pytest.approx(formulas.step_time(2, 1, 3, 1))
    # the halves of a backward that ran whole count half of it each
    bubble = formulas.zb_h1_bubble(2, 2)
    assert rows["seq1f1b-zb-h1", 2]["step_time"] == pytest.approx(9 + bubble)
    assert rows["greedy", 2]["step_time"] <= rows["seq1f1b-zb-h1", 2]["step_time"] + 1e-9


def test_compare_takes_a_cap_for_the_greedy_schedule():
    arguments = ["compare", *SHAPE, "--splits", "4", "--chunks", "1", "--json"]
    tight, roomy = (
        next(
            row
            for row in json.loads(run(*arguments, *MODEL, "--max-live", cap))
            if row["schedule"] == "greedy" and row["splits"] == 4
        )
        for cap in ("5", "12")
    )
    assert max(tight["peak_live"]) <= 5
    assert max(roomy["peak_live"]) <= 12
    assert roomy["step_time"] < tight["step_time"]


def test_no_theory_is_given_where_the_formula_does_not_apply():
    arguments = ["simulate", "--stages", "4", "--microbatches", "3", "--schedule", "zb-h1"]
    assert json.loads(run(*arguments, "--json"))["bubble_ratio_in_theory"] is None
    assert "equal actions" not in run(*arguments)


@pytest.mark.parametrize(
    "name, splits, step",
    [("zb-h1", "1", 27.0), ("seq1f1b-zb-h1", "2", 25.5), ("greedy", "2", 25.5)],
)
def test_every_schedule_can_be_simulated_and_drawn(name, splits, step, tmp_path):
    arguments = [*SHAPE, "--splits", splits, "--schedule", name]
    figures = json.loads(run("simulate", *arguments, "--json"))
    assert figures["schedule"] == name
    assert figures["step_time"] == pytest.approx(step)
    assert f"{name}: step {step:g}, bubble ratio" in run("timeline", *arguments)
    for ending, text in (("svg", "weight gradient"), ("html", '"W"'), ("json", '"0W7.0"')):
        path = tmp_path / f"plan.{ending}"
        run("timeline", *arguments, "--output", str(path))
        assert text in path.read_text()


def test_simulate_with_equal_costs():
    figures = json.loads(run("simulate", *SHAPE, "--splits", "2", "--chunks", "2", "--json"))
    assert figures["schedule"] == "seq1f1b-interleaved"
    assert figures["step_time"] == pytest.approx(formulas.step_time(4, 2, 8, 2))
    assert figures["peak_live"] == list(figures["peak_live"])
    assert figures["idle"] == pytest.approx([figures["step_time"] - 24] * 4)


def test_simulate_with_a_model_is_in_seconds_and_bytes():
    arguments = ["simulate", *SHAPE, "--splits", "4", *MODEL, "--json"]
    even = json.loads(run(*arguments, "--balance-method", "average"))
    balanced = json.loads(run(*arguments))
    assert even["time_unit"] == "s"
    assert balanced["step_time"] < even["step_time"]
    assert balanced["bubble_ratio"] == pytest.approx(formulas.bubble_ratio(4, 1, 8, 4), abs=2e-3)
    assert even["memory_unit"] == "bytes"
    # two dropout masks less than 34 bytes a token and hidden unit; keys and values in the carry
    activations = 7 / 4 * 32768 * (34 - 2 - 4) * 4096 * 8
    assert activations < even["peak_memory"][0] < 1.4 * activations


def test_a_model_and_a_gpu_go_by_name():
    words = shlex.split("--model llama-3-8b --gpu h100 --gpus 8 --seq-length 32768 --json")
    figures = json.loads(run("simulate", *SHAPE, *words, "--seq1f1b-splits", "4"))
    assert figures["schedule"] == "seq1f1b"
    assert 0.1 < figures["step_time"] < 100
    assert any("--bf16" in entry for entry in figures["assumed"])


def test_the_embedding_and_the_output_layer_are_on_the_ends():
    words = shlex.split("--model llama-3-8b --seq-length 8192 --gpu h100 --json")
    figures = json.loads(run("simulate", *SHAPE, *words))
    busy = [figures["step_time"] - idle for idle in figures["idle"]]
    assert busy[3] > 1.15 * busy[1]
    assert busy[1] == pytest.approx(busy[2])
    assert figures["peak_memory"][3] > 0.5 * figures["peak_memory"][2]


def test_over_splitting_is_ranked_last_and_warned_of():
    words = shlex.split(
        "compare --stages 8 --microbatches 8 --num-layers 24 --hidden-size 1024 "
        "--num-attention-heads 16 --seq-length 16384 --position-embedding-type rope "
        "--gpu a100-80g --splits 2,4,8"
    )
    rows = json.loads(run(*words, "--json"))
    times = {row["splits"]: row["step_time"] for row in rows if row["schedule"] == "seq1f1b"}
    assert times[4] < times[8]
    output = run(*words)
    assert "seq1f1b with 8 splits: sub-sequences are too short to pay; 4 are faster" in output
    assert "memory leaves out weights, optimizer and temporaries" in output


def test_shapes_that_megatron_refuses_are_refused():
    words = shlex.split(
        "--stages 4 --num-layers 30 --hidden-size 1024 --num-attention-heads 16 --seq-length 4096"
    )
    result = CliRunner().invoke(app, ["simulate", "--microbatches", "8", *words])
    assert result.exit_code == 2
    assert "30 layers cannot be dealt evenly" in result.output
    result = CliRunner().invoke(app, ["compare", "--microbatches", "6", *MODEL, "--stages", "4"])
    assert result.exit_code == 0
    assert "needs a multiple of 4" in result.output


def test_latency_and_bandwidth_cost_time():
    arguments = ["simulate", "--stages", "4", "--microbatches", "1", *MODEL, "--json"]
    free = json.loads(run(*arguments))["step_time"]
    late = json.loads(run(*arguments, "--latency", "0.01"))["step_time"]
    slow = json.loads(run(*arguments, "--latency", "0.01", "--bandwidth", "10"))["step_time"]
    assert late == pytest.approx(free + 2 * 3 * 0.01)
    assert slow == pytest.approx(late + 2 * 3 * 32768 * 4096 * 2 / 10e9)


def test_simulate_prints_every_stage():
    lines = run("simulate", *SHAPE, "--splits", "2").splitlines()
    assert lines[0].startswith("seq1f1b  4 stages")
    assert lines[1].startswith("step 28.50, bubble ratio 15.79%")
    assert [line.split()[0] for line in lines[3:7]] == ["0", "1", "2", "3"]


def test_simulate_replays_a_trace(trace):
    figures = json.loads(run("simulate", "--trace", trace, "--json"))
    assert figures["schedule"] == "replayed"
    assert figures["step_time"] == pytest.approx(figures["measured_step_time"])
    assert figures["bubble_ratio"] == pytest.approx(figures["measured_bubble_ratio"])
    assert "measured: step 10.500 s, bubble ratio 14.29%" in run("simulate", "--trace", trace)


def test_a_trace_can_drive_another_schedule(trace):
    figures = json.loads(
        run("simulate", "--trace", trace, "--schedule", "gpipe", "--microbatches", "6", "--json")
    )
    assert figures["schedule"] == "gpipe"
    assert figures["step_time"] == pytest.approx(formulas.step_time(2, 1, 6, 2))


@pytest.mark.parametrize("command", ["simulate", "compare"])
@pytest.mark.parametrize("flag", ["--latency", "--backward-ratio", "--tflops", "--bandwidth"])
@pytest.mark.parametrize("value", ["inf", "1e400", "nan", "-1", "x", "1e13"])
def test_numbers_are_finite(command, flag, value):
    text = refused(command, *SHAPE, *MODEL, flag, value, "--json")
    assert f"Invalid value for '{flag}': '{value}' is no number from" in text


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["simulate", "--stages", "4", "--microbatches", "9" * 30], "--microbatches"),
        (["simulate", *SHAPE, "--splits", "999999999"], "forwards in a step are more than"),
        (["timeline", "--stages", "99999", "--microbatches", "99999"], "forwards in a step are"),
        (["compare", *SHAPE, "--splits", "1,9999999999"], "is not a list of numbers from 1"),
        (["compare", *SHAPE, "--splits", "1" * 5000], "is not a list of numbers from 1"),
        (["simulate", *SHAPE, *MODEL[2:], "--seq-length", "1" + "0" * 400], "--seq-length"),
    ],
)
def test_sizes_without_end_are_refused(arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize("ending", ["txt", "svg", "png", "json", "html"])
def test_timeline_writes_what_the_ending_says(ending, tmp_path, trace):
    path = tmp_path / f"plan.{ending}"
    assert run("timeline", *SHAPE, "--splits", "2", "--output", str(path)) == f"wrote {path}\n"
    alone = path.stat().st_size
    beginnings = {
        "txt": b"seq1f1b: step 28.5",
        "svg": b"<?xml",
        "png": b"\x89PNG",
        "json": b'{"traceEvents"',
        "html": b"<!doctype html>",
    }
    assert path.read_bytes().startswith(beginnings[ending])
    run("timeline", "--trace", trace, "--output", str(path))
    assert path.stat().st_size != alone


OFFLOAD = shlex.split("--stages 2 --chunks 4 --microbatches 4 --offload-model-chunks 2")


def figures(*arguments: str) -> dict:
    return json.loads(run("simulate", *arguments, "--json"))


def test_chunks_in_host_memory_are_copied_as_often_as_their_schedule_says():
    row = figures(*OFFLOAD, "--offload-copy-time", "0.5")
    assert (row["slots"], row["chunk_loads"]) == (2, [6, 6])
    assert row["copying"] == [[3.0, 2.0], [3.0, 2.0]]
    assert row["bubble_ratio_in_theory"] is None
    turns = figures(*OFFLOAD, "--offload-copy-time", "0.5", "--seq1f1b-turn", "2")
    assert turns["chunk_loads"] == [num_loads(4, 2, 2) + 2, num_loads(4, 2, 2)]
    early = figures(*OFFLOAD, "--offload-copy-time", "0.5", "--offload-prefetch")
    shared = figures(
        *OFFLOAD,
        *shlex.split("--offload-copy-time 0.5 --offload-prefetch --offload-link-roots 3,3"),
    )
    resident = figures(*OFFLOAD[:-2], "--group", "4")
    times = [each["step_time"] for each in (resident, early, shared, row)]
    assert times[0] < times[1] < times[2] < times[3]
    assert figures(*OFFLOAD, "--offload-copy-time", "0")["step_time"] == times[0]


def test_a_models_chunks_have_bytes_and_slots_of_memory():
    model = ["--chunks", "4", "--microbatches", "4", "--stages", "2", *MODEL]
    rate = ["--offload-model-chunks", "2", "--offload-link-gb-per-s", "25"]
    row, resident = figures(*model, *rate), figures(*model, "--group", "4")
    # 4 layers of a chunk, 12 h^2 weights each and biases and norms; in bf16, gradients in fp32
    chunk = 4 * (12 * 4096**2 + 13 * 4096)
    into, out = row["copying"][0]
    assert into == pytest.approx(6 * 2 * chunk / 25e9, rel=1e-3)
    assert out == pytest.approx(4 * 4 * chunk / 25e9, rel=1e-3)
    more = row["peak_memory"][0] - resident["peak_memory"][0]
    assert more == pytest.approx(2 * 6 * chunk, rel=0.01)
    assert "slots for weights and gradients" in run("simulate", *model, *rate)


def test_a_trace_times_a_schedule_with_loads(tmp_path):
    path = tmp_path / "chunks.jsonl"
    with path.open("w") as stream:
        for stage, spans in enumerate(planned(interleaved(2, 2, 2)).stages):
            write_trace(stream, stage, spans)
    offload = shlex.split("--offload-model-chunks 1 --offload-copy-time 0.25")
    row = figures("--trace", str(path), *offload)
    assert row["chunk_loads"] == [3, 3]
    assert row["copying"] == [[0.75, 0.5]] * 2
    text = run("timeline", "--trace", str(path), *offload)
    assert text.count(" in ") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--offload-prefetch", "'--offload-prefetch': goes with --offload-model-chunks only"),
        ("--offload-link-roots 0,0", "'--offload-link-roots': goes with --offload-model-chunks"),
        ("--offload-copy-time 1", "'--offload-copy-time': goes with --offload-model-chunks"),
        (
            "--offload-model-chunks 1 --offload-copy-time 1",
            "'--offload-model-chunks': needs several stages, and several model chunks of each",
        ),
        (
            "--chunks 2 --offload-model-chunks 3 --offload-copy-time 1",
            "3: must be from 0 to the model chunks of a stage, which are 2",
        ),
        (
            "--chunks 2 --offload-model-chunks 1 --schedule greedy --offload-copy-time 1",
            "'--offload-model-chunks': cannot go with --schedule greedy",
        ),
        (
            "--chunks 2 --offload-model-chunks 1",
            "'--offload-copy-time': how long does the copy of a model chunk take?",
        ),
        (
            "--chunks 2 --offload-model-chunks 1 --offload-link-gb-per-s 8",
            "'--offload-link-gb-per-s': the bytes of chunks are not known: use --offload-copy-time",
        ),
        (
            "--chunks 2 --offload-model-chunks 1 --offload-copy-time 1 --offload-link-roots 0,x",
            "'0,x' is not a list of numbers such as 0,0,1,1",
        ),
        (
            "--chunks 2 --offload-model-chunks 1 --offload-copy-time 1 --offload-link-roots 0,0",
            "0,0: give one number for each of 4",
        ),
        (
            f"--chunks 2 --offload-model-chunks 1 {shlex.join(MODEL)}",
            "'--offload-link-gb-per-s': how fast are copies between host memory and the device?",
        ),
        (
            f"--chunks 2 --offload-model-chunks 1 --offload-copy-time 1 {shlex.join(MODEL)}",
            "'--offload-copy-time': a model's chunks have bytes: use --offload-link-gb-per-s",
        ),
    ],
)
def test_offloading_that_makes_no_sense_names_the_flag(arguments, message):
    for command in ("simulate", "timeline"):
        assert message in refused(command, *SHAPE, *shlex.split(arguments))


def test_timeline_prints_text_without_an_output(trace):
    assert "stage 3" in run("timeline", *SHAPE)
    both = run("timeline", "--trace", trace, "--width", "50")
    assert "measured: step 10.5 s" in both
    assert "replayed: step 10.5 s" in both


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["simulate", "--stages", "0"], "'--stages'"),
        (["simulate", "--microbatches", "x"], "'--microbatches'"),
        (["simulate", "--schedule", "zb-v"], "'--schedule'"),
        (["simulate"], "'--stages': how many pipeline stages? Give it, or a --trace"),
        (["simulate", "--stages", "2"], "'--microbatches': how many micro-batches?"),
        (["simulate", *SHAPE, "--backward-ratio", "-1"], "'--backward-ratio'"),
        (
            ["simulate", *SHAPE, "--schedule", "1f1b", "--splits", "2"],
            "'--splits': 1f1b has 1 sub-sequence, not 2",
        ),
        (
            ["simulate", *SHAPE, "--schedule", "seq1f1b"],
            "'--splits': seq1f1b needs at least 2 sub-sequences",
        ),
        (
            ["simulate", *SHAPE, "--schedule", "gpipe", "--chunks", "2"],
            "'--chunks': gpipe has 1 model chunk a stage, not 2",
        ),
        (
            ["simulate", *SHAPE, "--schedule", "1f1b-interleaved"],
            "'--chunks': 1f1b-interleaved needs at least 2 model chunks a stage",
        ),
        (
            ["simulate", "--stages", "1", "--microbatches", "2", "--chunks", "2"],
            "'--stages': 1f1b-interleaved needs at least 2 stages",
        ),
        (
            ["simulate", *SHAPE, "--group", "4"],
            "'--group': 1f1b takes no turns; only interleaved schedules do",
        ),
        (
            ["simulate", *SHAPE, "--max-live", "4"],
            "'--max-live': 1f1b holds what it holds; only greedy takes a cap",
        ),
        (
            ["compare", *SHAPE, "--splits", "4", "--max-live", "3"],
            "'--max-live': a cap of 3 sub-sequences does not hold one micro-batch",
        ),
        (
            ["simulate", *SHAPE, "--schedule", "zb-h1", "--splits", "2"],
            "'--splits': zb-h1 has 1 sub-sequence, not 2",
        ),
        (
            ["simulate", *SHAPE, "--schedule", "seq1f1b-zb-h1"],
            "'--splits': seq1f1b-zb-h1 needs at least 2 sub-sequences",
        ),
        (
            ["simulate", *SHAPE, "--schedule", "zb-h1", "--chunks", "2"],
            "'--chunks': zb-h1 has 1 model chunk a stage, not 2",
        ),
        (
            ["timeline", *SHAPE[2:], "--stages", "1", "--schedule", "greedy", "--chunks", "2"],
            "'--stages': greedy needs at least 2 stages",
        ),
        (
            ["simulate", *SHAPE, "--chunks", "2", "--group", "3"],
            "'--group': turns of 3 on 4 stages: a turn takes at least one sub-sequence",
        ),
        (
            ["simulate", *SHAPE, "--bandwidth", "5"],
            "'--bandwidth': needs a model: --model, or Megatron's options",
        ),
        (
            ["simulate", *SHAPE, "--gpu", "h100"],
            "'--gpu': needs a model: --model, or Megatron's options",
        ),
        (
            ["simulate", *SHAPE, *MODEL, "--gpu", "h100"],
            "'--tflops': a GPU has its own rates; leave out --tflops or --gpu",
        ),
        (["compare", *SHAPE, "--splits", "2,x"], "'--splits': '2,x' is not a list of numbers"),
        (["compare", *SHAPE, "--splits", "0"], "'--splits': '0' is not a list of numbers from 1"),
        (
            ["timeline", *SHAPE, "--output", "plan.gif"],
            "'--output': plan.gif must end in one of .txt, .svg, .png, .json, .html",
        ),
        (
            ["timeline", *SHAPE, "--output", "no/such/folder/plan.txt"],
            "'--output': no/such/folder/plan.txt: cannot be written:",
        ),
        (
            ["simulate", "--trace", "missing.jsonl"],
            "'--trace': missing.jsonl: cannot be read:",
        ),
    ],
)
def test_bad_input_names_the_flag(arguments, message):
    assert f"Invalid value for {message}" in refused(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seq-length", "1024", "--layers", "2"], "--hidden-size: required"),
        ([*MODEL, "--num-attention-heads", "3"], "--num-attention-heads 3: does not divide"),
        (
            [*MODEL, "--group-query-attention", "--query-groups", "5"],
            "--num-query-groups 5: does not divide 32 attention heads",
        ),
        ([*MODEL, "--splits", "3", "--multiple", "5"], "32768 is not a multiple of 5"),
        ([*MODEL, "--no-such-option"], "neither Megatron nor this project has this option"),
        (["--chunks", "x"], "--chunks"),
    ],
)
def test_every_fault_of_a_model_is_listed(arguments, message):
    result = CliRunner().invoke(app, ["simulate", *SHAPE, *arguments])
    assert result.exit_code == 2
    assert "seq1f1b cannot plan with these settings:" in result.output
    assert message in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "3"], "'--stages': 3, but the trace has 2"),
        (["--splits", "4"], "'--splits': {trace} has 2"),
        (["--chunks", "2"], "'--chunks': {trace} has 1"),
        (["--seq-length", "64"], "'--seq-length': a trace has its own costs"),
        (["--bandwidth", "1"], "'--bandwidth': the size of a trace's tensors is not known"),
    ],
)
def test_flags_that_contradict_a_trace_are_named(arguments, message, trace):
    output = refused("simulate", "--trace", trace, *arguments)
    assert f"Invalid value for {message.format(trace=trace)}" in output


def test_a_trace_of_less_than_a_step_is_refused(tmp_path):
    path = tmp_path / "part.jsonl"
    with path.open("w") as stream:
        for stage, spans in enumerate(planned(interleaved(2, 2, 2)).stages):
            write_trace(stream, stage, spans[1:])
    message = refused("simulate", "--trace", str(path))
    assert f"'--trace': {path}: not one whole step:" in message
    assert "stage 0 needs exactly one F" in message


def test_starting_imports_neither_torch_nor_matplotlib_and_takes_under_a_second():
    code = (
        "import time, sys; start = time.process_time(); import seq1f1b.cli; "
        "seconds = time.process_time() - start; "
        "print(seconds, [name for name in ('torch', 'matplotlib') if name in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    seconds, heavy = output.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 1.0


def test_help_lists_the_commands():
    output = run("--help")
    assert all(name in output for name in ("simulate", "compare", "timeline"))
