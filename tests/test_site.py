"""The guide builds as a site, with every link whole and a reference made from docstrings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def leaves(entries):
    if isinstance(entries, str):
        return [entries]
    if isinstance(entries, dict):
        entries = entries.values()
    return [leaf for entry in entries for leaf in leaves(entry)]


def test_every_page_of_the_guide_has_its_place_in_the_table_of_contents():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {page for page in leaves(settings["nav"]) if not page.startswith("reference/")}
    written = {file.name for file in (ROOT / "docs").glob("*.md")} - {"planner.template.md"}
    assert pages == written


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_site_builds_strictly_and_has_the_public_names(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for page, name in {
        "megatron.adaptor.enable": "megatron.adaptor.enable.enable",
        "seq1f1b.schedule": "seq1f1b.schedule.validate.validate",
        "seq1f1b.ulysses": "seq1f1b.ulysses.dispatch_modules",
    }.items():
        html = (tmp_path / "reference" / page / "index.html").read_text()
        assert re.search(rf'id="{re.escape(name)}["(.]', html), name
    architecture = (tmp_path / "architecture" / "index.html").read_text()
    (link,) = set(re.findall(r'href="([^"]*runtime/executor[^"]*)"', architecture))
    assert (tmp_path / "architecture" / link).resolve().read_text().startswith('"""')
