"""The wheel holds every package and works beside Megatron-Core from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders in its source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("seq1f1b", "seq1f1b_tools", "megatron", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True
    )
    (path,) = folder.glob("*.whl")
    return path


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


def test_installed_wheel_shares_the_namespace_with_megatron_core(
    wheel: Path, tmp_path: Path
) -> None:
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
