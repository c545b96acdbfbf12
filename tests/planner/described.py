"""A description of this machine that no measurement made, for tests of what reads it."""

from pathlib import Path

import yaml

from seq1f1b.planner.gpu import THIS_MACHINE, gpu


def describe_this_machine(home: Path) -> dict[str, str]:
    """Write one below ``home``; return the environment that has it found."""
    like = gpu("a100-80g").model_dump(mode="json")
    like |= {"name": THIS_MACHINE, "runtime": "cpu", "gpus_per_node": 4, "curves": "a100-sxm"}
    like["usable_gib"]["value"] = 2.0
    path = home / "seq1f1b" / f"{THIS_MACHINE}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(like))
    return {"XDG_DATA_HOME": str(home)}
