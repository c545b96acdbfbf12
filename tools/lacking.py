"""Find out what the project needs and this Python lacks; it needs nothing installed but pip.

    python tools/lacking.py LACKING KEPT

writes pip's requirements for what is lacking, with the versions in requirements.txt, into LACKING,
and its constraints for what has to stay as it is, torch and what came with it, into KEPT.
"""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
STAYS = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton", "nvidia-", "cuda-")


def installed() -> dict[str, str]:
    """Return the versions of what this Python finds, by name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def main() -> int:
    """Write both files; the exit status is 1 where torch does not fit."""
    lacking, kept = map(Path, sys.argv[1:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    have = installed()
    wanted = []
    for text in needed:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        version = have.get(name)
        if name == "torch" and version is not None:  # NVIDIA's are snapshots before the release
            version = Version(version).base_version
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        if name == "torch" and not fits:
            print(f"torch {have.get(name, 'is not there')}: needed is {text}")
            return 1
        if not fits:
            wanted.append(pins.get(name, str(requirement)))
    lacking.write_text("".join(f"{line}\n" for line in wanted))
    stays = {name: version for name, version in have.items() if name.startswith(STAYS)}
    kept.write_text("".join(f"{name}=={version}\n" for name, version in stays.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
