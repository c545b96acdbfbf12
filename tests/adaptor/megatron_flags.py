"""Write the list of Megatron's flags that the planner accepts without reading them.

python tests/adaptor/megatron_flags.py > seq1f1b/planner/data/megatron_flags.yaml
"""

import argparse
from collections.abc import Iterator
from importlib.metadata import version

import yaml

from seq1f1b.planner.arguments import options
from seq1f1b.planner.refusals import REFUSED

_NAMES = {0: "none", None: "one", "+": "many", "*": "many"}


def parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with the flags of this project."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron.adaptor.command_line.flags import add_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def actions() -> Iterator[argparse.Action]:
    """Yield every option of the parser but its help."""
    for action in parser()._actions:
        if action.option_strings and action.dest != "help":
            yield action


def listing() -> dict[str, object]:
    """Return the flags by how many values they take, without those that the planner reads."""
    read = {flag for option in options() for flag in option.flags} | REFUSED.keys()
    flags: dict[str, list[str]] = {"none": [], "one": [], "many": [], "three": []}
    for action in actions():
        unread = [flag for flag in action.option_strings if flag not in read]
        flags[_NAMES.get(action.nargs, "three")] += unread
    return {"megatron": version("megatron-core"), **{k: sorted(v) for k, v in flags.items()}}


if __name__ == "__main__":
    text = yaml.safe_dump(listing(), sort_keys=False, width=100)
    print(f"# Written by tests/adaptor/megatron_flags.py\n{text}", end="")
