"""The planner's table of options is Megatron's."""

import json
import shlex

import pytest

from seq1f1b.planner.arguments import options
from seq1f1b.planner.command_line import unread_flags
from tests.programs import ask

_PROGRAM = """
import json, sys
json.loads(sys.stdin.read())
from tests.adaptor.megatron_flags import actions, listing
rows = {}
for action in actions():
    kind = type(action).__name__
    default = action.default
    rows[action.option_strings[0]] = {
        "dest": action.dest,
        "flag": kind in ("_StoreTrueAction", "_StoreFalseAction"),
        "type": getattr(action.type, "__name__", None),
        "many": action.nargs in ("+", "*"),
        "default": default if isinstance(default, (int, float, str, bool, list)) else None,
        "choices": [str(choice) for choice in action.choices] if action.choices else None,
    }
print("ANSWER" + json.dumps([rows, listing()]))
"""


@pytest.fixture(scope="module")
def megatron():
    return ask(_PROGRAM, None, with_megatron=False)


def test_names_types_and_defaults_are_megatrons(megatron):
    rows, _ = megatron
    for option in options():
        row = rows[option.flags[0]]
        assert row["dest"] == option.name
        assert row["flag"] == (option.type is None), option.name
        assert row["many"] == option.many, option.name
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        assert row["default"] == default, option.name
        if row["type"] in ("int", "float"):
            assert row["type"] == option.type.__name__, option.name
        if option.choices and row["choices"]:
            assert set(option.choices) == set(row["choices"]), option.name


def test_flags_without_effect_are_all_others(megatron):
    _, listing = megatron
    listing.pop("megatron")
    assert json.loads(json.dumps(unread_flags())) == listing


_REPORT = """
import json, sys
options, gpus = json.loads(sys.stdin.read())
from megatron.adaptor.memory_report import report
try:
    answer = report(options, gpus)
except ValueError as error:
    answer = str(error)
print("ANSWER" + json.dumps(answer))
"""


def test_megatrons_own_estimate_is_reported():
    words = shlex.split(
        "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 4096 "
        "--max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 4 "
        "--vocab-size 1000 --bf16"
    )
    estimate = ask(_REPORT, [words, 4])
    assert estimate["total"] == pytest.approx(estimate["weights"] + estimate["activations"])
    assert 0.4 < estimate["weights"] < 1.0
    refused = ask(_REPORT, [[*words, "--pipeline-model-parallel-size", "3"], 4])
    assert "Megatron refuses these options" in refused
