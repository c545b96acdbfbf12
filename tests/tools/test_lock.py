"""requirements.lock: every package of the environment, pinned, with the hashes of its files."""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text()


def entries() -> dict[str, str]:
    """Return the text of each package's entry, by its pin."""
    text = re.sub(r"^ *#.*\n", "", LOCK, flags=re.MULTILINE)
    found = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return {re.split("[ ;]", entry)[0]: entry for entry in found if entry}


def test_the_lock_has_every_pin_and_hashes_for_each_package() -> None:
    locked = entries()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert pins <= locked.keys()
    for pin, entry in locked.items():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.!+]+", pin), pin
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry), pin
    assert "http" not in "".join(line for line in LOCK.splitlines() if "==" not in line)


def test_the_lock_has_all_that_its_packages_ask_for() -> None:
    names = {pin.partition("==")[0] for pin in entries()}
    for name in sorted(names):
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another machine
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in names, (name, requirement)
