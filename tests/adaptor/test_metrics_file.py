"""The metrics file holds each iteration once, in JSON, and never ends the training."""

import json
import math
from dataclasses import replace

import pytest

from megatron.adaptor.reports.metrics import IterationMetrics
from megatron.adaptor.reports.metrics_file import MetricsFile

ENTRY = IterationMetrics(1, 4.5, 10.0, 100.0, 0.1, [1, 2], [0, 0], [0.5, 0.25])


def iterations(path):
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def write(path, *numbers):
    file = MetricsFile(path)
    for number in numbers:
        file.append(replace(ENTRY, iteration=number))


def test_a_resumed_run_replaces_what_comes_again(tmp_path):
    path = tmp_path / "folder" / "metrics.jsonl"
    write(path, 1, 2, 3, 4)
    with path.open("a") as stream:
        stream.write('{"iteration": 5, "lm_l')  # a job that was killed while it wrote
    write(path, 3, 4, 5)
    assert iterations(path) == [1, 2, 3, 4, 5]
    replaced = path.with_name("metrics.jsonl.replaced").read_text().splitlines()
    assert [line[:16] for line in replaced] == [f'{{"iteration": {n},' for n in (3, 4, 5)]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entry = replace(ENTRY, lm_loss=math.nan, bubble_ratio=[math.inf, 0.25])
    MetricsFile(path).append(entry)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["lm_loss"] is None
    assert content["bubble_ratio"] == [None, 0.25]


def test_a_file_that_cannot_be_written_is_given_up(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    write(tmp_path / "metrics.jsonl", 1, 2)
    assert caplog.text.count("cannot be written") == 1
