"""Programs that tests run in a process of their own, since the adaptor changes torch for good."""

import functools
import json
from argparse import Namespace
from typing import Any

from tests.forks import python

_MARK = "ANSWER"


def ask(program: str, question: Any, *, with_megatron: bool = True, **environ: str) -> Any:
    """Return what ``program`` prints as JSON behind ANSWER when it reads ``question`` as JSON.

    with_megatron: whether Megatron has been imported when the program installs the adaptor.
    """
    run = python(
        *("-c", program),
        text=json.dumps(question),
        environ=environ,
        with_megatron=with_megatron,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = next(line for line in run.stdout.splitlines() if line.startswith(_MARK))
    return json.loads(found.removeprefix(_MARK))


def parse_args() -> Namespace:
    """Parse sys.argv as Megatron does, which reads the sources of its flags' help each time."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import parse_args

    _read_help_once(ArgumentGroupFactory)
    return parse_args()


@functools.cache
def _read_help_once(factory: Any) -> None:
    read = functools.cache(
        functools.partial(factory._get_field_docstrings, object.__new__(factory))
    )
    factory._get_field_docstrings = lambda self, config: read(config)
