"""The documentation: generated parts are up to date, links lead somewhere, the example works."""

import json
import re
import subprocess
import sys

import pytest
from test_scripts import ROOT, SMALL

sys.path.insert(0, str(ROOT / "docs"))
import generate

PAGES = [p for p in ROOT.rglob("*.md") if not {".venv", "runs"} & set(p.relative_to(ROOT).parts)]


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_parts_are_up_to_date(name):
    text = (ROOT / "docs" / name).read_text()
    assert generate.render(text, generate.PAGES[name]) == text, "run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "#")):
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor.startswith("L"):
            assert int(anchor[1:]) <= len((page.parent / path).read_text().splitlines()), target


def test_forking_example(tmp_path):
    """The fifth script of docs/forking.md, made by its own diffs, runs and leaves tokens out."""
    script = ROOT / f"late_{tmp_path.name}.py"  # beside common.py, as a fork is
    script.write_text(generate.worked_example())
    losses = []
    try:
        for skip in (0, 8):
            folder = tmp_path / str(skip)
            flags = ["--num-steps", "1", "--eval-every", "0", "--skip-tokens", str(skip)]
            done = subprocess.run(
                [sys.executable, script.name, *SMALL, *flags, "--output-dir", str(folder)],
                cwd=ROOT, text=True, capture_output=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            losses.append(json.loads((folder / "metrics.jsonl").read_text())["policy/grad_norm"])
    finally:
        script.unlink()
    assert losses[0] != pytest.approx(losses[1], rel=0.01)
