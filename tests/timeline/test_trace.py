"""Measured traces: written, read, and refused with file and line."""

import json

import pytest

from seq1f1b.schedule import lower, one_f_one_b
from seq1f1b.timeline import TraceError, read_trace, write_trace
from tests.timeline.drawn import planned


def test_a_trace_reads_back(tmp_path):
    timeline = planned(one_f_one_b(3, 4, 2))
    path = tmp_path / "trace.jsonl"
    with path.open("w") as stream:
        for stage in (2, 0, 1):
            write_trace(stream, stage, timeline.stages[stage])
    read = read_trace(path)
    assert read.stages == timeline.stages
    assert read.seconds
    assert (read.num_chunks, read.num_micro_batches, read.num_splits) == (1, 4, 2)
    assert read.bubble_ratio == pytest.approx(timeline.bubble_ratio)


def test_communication_and_empty_lines_are_left_out(tmp_path):
    path = tmp_path / "trace.jsonl"
    actions = lower(one_f_one_b(1, 1)).stages[0]
    lines = [
        {"stage": 0, "action": str(action), "start": i, "end": i + 1}
        for i, action in enumerate(actions)
    ]
    lines.append({"stage": 0, "action": "0SEND_F0.0", "start": 0, "end": 9})
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert [span.action for span in read_trace(path).stages[0]] == list(actions)


GOOD = '{"stage": 0, "action": "0F0.0", "start": 0, "end": 1}\n'


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD + "nonsense\n", ":2: Expecting value: line 1 column 1 (char 0)"),
        ("[1, 2]\n", ":1: not a JSON object"),
        ('{"stage": 0, "action": "0F0.0"}\n', ":1: lacks start, end"),
        (
            '{"stage": -1, "action": "0F0.0", "start": 0, "end": 1}\n',
            ":1: stage is -1; it must be a number from 0",
        ),
        (
            '{"stage": 0, "action": 7, "start": 0, "end": 1}\n',
            ":1: action is 7; it must be text such as 0F3.1",
        ),
        (
            '{"stage": 0, "action": "F0", "start": 0, "end": 1}\n',
            ":1: not an action: 'F0' (expected something like 0F3.1)",
        ),
        (
            '{"stage": 0, "action": "0F0.0", "start": 0, "end": NaN}\n',
            ":1: start and end must be numbers of seconds",
        ),
        (
            '{"stage": 0, "action": "0F0.0", "start": 2, "end": 1}\n',
            ":1: 0F0.0 starts at 2 and ends at 1",
        ),
        (
            GOOD + GOOD,
            ":2: 0F0.0 on stage 0 comes twice; a trace holds the actions of one step",
        ),
        ("[" * 99_999, ":1: brackets are nested too deep"),
        (
            GOOD.replace('"start": 0', '"start": true'),
            ":1: start and end must be numbers of seconds",
        ),
        (
            GOOD.replace('"end": 1', f'"end": 1{"0" * 400}'),
            ":1: start and end must be numbers of seconds",
        ),
        (
            GOOD.replace('"end": 1', '"end": 1e400'),
            ":1: start and end must be numbers of seconds",
        ),
        (GOOD.replace('"end": 1', '"end": 0'), ": no action takes any time"),
        (
            GOOD.replace("0F0.0", "0F0.99999999"),
            ": not one whole step: no stage has more than 1 actions, too few for 1 model chunks, "
            "1 micro-batches and 100000000 sub-sequences, which some of them belong to",
        ),
        (
            GOOD + GOOD.replace("0F0.0", "999999999999F0.0"),
            ": not one whole step: no stage has more than 2 actions, too few for 1000000000000 "
            "model chunks, 1 micro-batches and 1 sub-sequences, which some of them belong to",
        ),
        (GOOD + GOOD.replace('"stage": 0', '"stage": 999999999999'), ": no computation of stage 1"),
        (GOOD.replace('"stage": 0', '"stage": 1'), ": no computation of stage 0"),
        ("", ": no computation of stage 0"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value) == f"{path}{message}"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"missing\.jsonl: cannot be read: .*No such file"):
        read_trace(tmp_path / "missing.jsonl")
