"""one_step.py and its page: the values are true, and a browser shows them."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import one_step
from lab import page

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def run(*flags: str, code: int = 0) -> str:
    done = subprocess.run(
        [*warm.python(), "one_step.py", *flags],
        cwd=ROOT, text=True, capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def own_problem(tmp_path_factory):
    """The page of a problem of one's own."""
    file = tmp_path_factory.mktemp("page") / "own.html"
    output = run(
        "--problem", "Q 67#3 A", "--answer", "04", "--responses", "3", "--output", str(file)
    )
    assert len(re.findall(r"loss [+-]0\.\d+ .* cosine", output)) == 3
    return file


@pytest.mark.parametrize("which", ["own", "docs"])
def test_values(own_problem, which):
    """Advantages, losses, gradients and changes, once more from the page's own responses."""
    values = page.read_values(ROOT / "docs" / "one_step.html" if which == "docs" else own_problem)
    responses, bos = values["responses"], values["bos_id"]
    assert len({tuple(y["ids"]) for y in responses}) == len(responses)
    G = len(responses) // len(values["problems"])
    r = torch.tensor([y["reward"] for y in responses], dtype=torch.float64).view(-1, G)
    assert all(0 < group.sum() < G for group in r)
    xs = [values["problems"][y["problem"]]["ids"] for y in responses]
    ys = [y["ids"] for y in responses]
    A = (r - r.mean(1, keepdim=True)).flatten()
    std = ((A.view(-1, G) ** 2).sum(1, keepdim=True) / (G - 1)).sqrt()
    expected = {"GRPO": A / (std.repeat(1, G).flatten() + 1e-6), "PreRL": A, "NSR-PreRL": A}
    for m in values["methods"]:
        model = AutoModelForCausalLM.from_pretrained(ROOT / "lab" / "base").double()
        assert m["A"] == pytest.approx(expected[m["name"]].tolist(), abs=1e-5)
        assert m["in_loss"] == [m["name"] != "NSR-PreRL" or a < 0 for a in A.tolist()]
        contexts = xs if m["name"] == "GRPO" else [[bos]] * len(xs)
        logps, loss = [], 0.0
        for context, y, a, kept in zip(contexts, ys, m["A"], m["in_loss"]):
            logits = model(torch.tensor([context + y])).logits[0]
            logits = torch.log_softmax(logits[len(context) - 1 : -1], -1)
            logps.append(sum(logits[t, token] for t, token in enumerate(y)))
            loss = loss - kept * a * logps[-1] / m["tokens"]
        key = "logp_x" if m["space"] == "x" else "logp_bos"
        sums = [sum(y[key]) for y in responses]
        assert sums == pytest.approx([logp.item() for logp in logps], abs=1e-4)
        assert m["tokens"] == sum(len(y) for y, kept in zip(ys, m["in_loss"]) if kept)
        assert m["loss"] == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert m["norm"] == pytest.approx(norm, rel=1e-3)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = values["learning_rate"]
        torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0).step()
        for i in (0, len(ys) - 1):
            for context, change in (xs[i], m["change_x"]), ([bos], m["change_bos"]):
                before = sum(responses[i]["logp_x" if context is xs[i] else "logp_bos"])
                with torch.no_grad():
                    after = one_step.log_probs(model, context, ys[i]).sum().item()
                assert change[i] == pytest.approx(after - before, abs=5e-3)


@pytest.mark.parametrize("name", ["one_step", "one_step_smollm2"])
def test_the_pages_in_docs_are_lab_pages(name):
    file = ROOT / "docs" / f"{name}.html"
    assert page.render(page.read_values(file)) == file.read_text(), "run make one-step"


def test_a_group_without_contrast_is_refused(tmp_path):
    flags = ["--problem", "Q 67#3 A", "--answer", "77", "--output", str(tmp_path / "a.html")]
    assert "has correct and incorrect ones" in run(*flags, code=2)
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path, capsys):
    """One line, before any computing: without random numbers for a weight, and nothing lost."""
    lame = Path(shutil.copytree(ROOT / "lab" / "base", tmp_path / "lame"))
    weights = load_file(lame / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, lame / "model.safetensors", {"format": "pt"})
    for flags, message in (
        ({"model": str(lame)}, "lacks 1 weights of a Qwen3ForCausalLM: model.norm.weight"),
        ({"model": str(tmp_path)}, "the folder has no config.json"),
        ({"model": "no/such"}, "--model no/such cannot be loaded: there is no such folder"),
        ({"output": str(lame / "config.json" / "a.html")}, "config.json is a file"),
        ({"output": str(tmp_path)}, "cannot be written: Is a directory"),
        ({"max_completion_length": 0}, "--max-completion-length must be positive, not 0"),
        ({"problems": -1}, "--problems must be positive, not -1"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive, not nan"),
        ({"problem": "Q 67#3 A"}, "--problem needs --answer"),
    ):
        with pytest.raises(SystemExit) as end:
            one_step.main(one_step.Args(**{"output": str(tmp_path / "a.html"), **flags}))
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: --") and message in lines[0]
    assert "--problems must be positive" in run("--problems", "0", code=2)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [320, 1920])
def test_the_page_in_a_browser(own_problem, tmp_path, width):
    """What is shown fits the width, holds the values, and is not blank."""
    file = tmp_path / "page.html"
    probe = "<script>document.title=document.documentElement.scrollWidth+' of '+innerWidth</script>"
    file.write_text(own_problem.read_text().replace("</body>", probe + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},1200", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", f"file://{file}"], text=True, capture_output=True, timeout=900
    ).stdout
    needed, available = map(int, re.search(r"<title>(\d+) of (\d+)<", shown).groups())
    assert needed <= available
    text = re.sub(r"<script.*?</script>|<[^>]*>", "", shown)
    values = page.read_values(own_problem)
    for m in values["methods"]:
        assert page.signed(m["loss"], 4) in text and m["name"] in text
    assert "".join(values["responses"][0]["tokens"][:20]).strip() in text
    assert not re.search(r"(src|href)=", shown)  # nothing is fetched
    picture = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={picture}", f"file://{file}"], capture_output=True, timeout=900
    )
    from matplotlib import image

    pixels = image.imread(picture)[..., :3]
    assert pixels.shape[1] == width and 0.005 < (pixels.min(-1) < 0.5).mean() < 0.5


@pytest.mark.slow
def test_the_notebook(tmp_path):
    """All cells of lab/lab.ipynb, in order; with 2 steps instead of 20."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name == "lab":
            (tmp_path / path.name).symlink_to(path)
    cells = json.loads((ROOT / "lab" / "lab.ipynb").read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert source.count('"20"') == 1 and source.count("[sys.executable,") == 2
    source = source.replace('"20"', '"2"').replace("[sys.executable,", f"[*{warm.python()},")
    (tmp_path / "notebook").write_text(source)
    done = subprocess.run(
        [*warm.python(), "notebook"],
        cwd=tmp_path, text=True, capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    changes = re.findall(r"^(\w+) .*norm [\d.]+ +([+-][\d.]+) +([+-][\d.]+)$", done.stdout, re.M)
    assert [name for name, _, _ in changes] == ["grpo", "prerl", "nsr_prerl"]
    assert float(changes[0][1]) > 0 > float(changes[2][2])  # what the text above the cell says
    assert (tmp_path / "runs" / "notebook" / "curves.png").stat().st_size > 1e4
