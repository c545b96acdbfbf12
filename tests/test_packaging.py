"""The wheel holds every package and works beside Megatron-Core from any folder."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.try_wheel import build, try_environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("seq1f1b", "seq1f1b_tools", "megatron/adaptor")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == expected
    assert "megatron/__init__.py" not in packed


def installed(wheel: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return an environment that has the wheel, and its folder of packages."""
    environment = tmp_path / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60
    )
    (site_packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    # A path file brings in the dependencies but not the editable install of this project: path
    # files in the folder that it names are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment, site_packages


def test_installed_wheel_shares_the_namespace_with_megatron_core(
    wheel: Path, tmp_path: Path
) -> None:
    environment, site_packages = installed(wheel, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = (
        "import importlib.metadata as m, seq1f1b, megatron.adaptor, megatron.core;"
        "print(seq1f1b.__file__, megatron.adaptor.__file__, m.version('seq1f1b'), sep='\\n')"
    )
    run = subprocess.run(
        [str(environment / "bin" / "python"), "-W", "ignore", "-c", program],
        cwd=elsewhere,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    method, adaptor, version = run.stdout.splitlines()
    assert Path(method) == site_packages / "seq1f1b" / "__init__.py"
    assert Path(adaptor) == site_packages / "megatron" / "adaptor" / "__init__.py"
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_installed_wheel_runs_its_commands_and_trains_from_any_folder(
    wheel: Path, tmp_path: Path
) -> None:
    environment, _ = installed(wheel, tmp_path)
    script = environment / "bin" / "seq1f1b"  # as pip makes it
    script.write_text(f"#!{environment}/bin/python\nfrom seq1f1b.cli import app\n\napp()\n")
    script.chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    printed = try_environment(environment, elsewhere)
    assert (elsewhere / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert "tokens/s" in printed["training"]
