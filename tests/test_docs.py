"""The documentation: generated parts are up to date, links, flags, figures and commands hold."""

import difflib
import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mutants
import pyarrow.parquet
import pytest
import torch
import warm
import yaml
from test_scripts import ROOT, SCRIPTS, SMALL, metrics
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

import harness
from benchmark import hardware
from lab import exercises
from study import report

sys.path.insert(0, str(ROOT / "docs"))
import generate


def ours(pattern: str) -> list:
    """Files of the working tree, without environments, caches and runs."""
    paths = [p.relative_to(ROOT) for p in ROOT.rglob(pattern)]
    return [ROOT / p for p in paths if not re.search(r"(^|/)(\.|runs/)", str(p))]


def table(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


PAGES = ours("*.md")


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_parts_are_up_to_date(name):
    text = (ROOT / "docs" / name).read_text()
    assert generate.render(text, generate.PAGES[name]) == text, "run python docs/generate.py"


def test_the_studys_tables_are_up_to_date():
    for page, parts in report.tables(*report.read_all()).items():
        assert report.render(page.read_text(), parts) == page.read_text(), "run make study"


def test_the_exercises(tmp_path):
    """Table and picture of lecture.md; each changed line sets a name that its script sets."""
    page, rewards = (ROOT / "docs" / "lecture.md").read_text(), exercises.read_rewards()
    assert generate.fill(page, "exercises", exercises.table(rewards)) == page, (
        "run lab/exercises.py"
    )
    exercises.draw(rewards, tmp_path / "lecture.png")
    assert (tmp_path / "lecture.png").stat().st_size > 3e4
    solutions = re.findall(r"^\| (\d) \| `(\w+ = .*?)` \| `(\w+\.py)", page, re.M)
    assert [number for number, _, _ in solutions] == list("12345")
    for _, line, script in solutions:
        name = line.partition(" = ")[0]
        assert len(re.findall(rf"^        {name} = ", (ROOT / script).read_text(), re.M)) in (1, 2)


def test_the_studys_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    runs, _, worlds, small = report.read_all()
    report.draw_pictures(runs, worlds, small)
    kept = {path.name: path.stat().st_size for path in (ROOT / "docs" / "study").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == kept.keys()
    for path in tmp_path.iterdir():  # a blank picture is a tenth of that
        assert path.stat().st_size > 0.5 * kept[path.name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "#")):
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert not anchor or re.fullmatch(r"L\d+", anchor), f"{target}: only lines are checked"
        if anchor.startswith("L"):
            assert int(anchor[1:]) <= len((page.parent / path).read_text().splitlines()), target


def run_fork(name: str, folder: Path, *flags: str) -> list[dict]:
    """Metrics of a script of docs/forking.md, made by its own diffs."""
    script = ROOT / f"late_{name}_{folder.parent.name}.py"  # beside common.py, as a fork is
    script.write_text(generate.fork(name))
    command = [*warm.python(), script.name, *SMALL, "--eval-every", "0", "--num-steps", "1"]
    command += ["--num-prompts", "3", "--num-generations", "3", *flags]
    try:
        done = subprocess.run(
            [*command, "--output-dir", str(folder)],
            cwd=ROOT, text=True, capture_output=True, timeout=900, check=False,
        )  # fmt: skip
    finally:
        script.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(folder)


FORKS = {
    "late": "--skip-tokens 8",
    "gspo": "--num-minibatches 2 --loss-aggregation seq-mean-token-mean --clip 0.01 0.28",
    "kl": "--kl-coef 0.5 --num-steps 2",
    "dynamic": "--oversample 4",
    "formatted": "--num-generations 4",
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Each on one rank, and on two with micro-batches of one sample, so that some are fillers."""
    found = {}
    for name, flags in FORKS.items():
        folder = tmp_path_factory.mktemp(name)
        two = ["--num-processes", "2", "--max-tokens-per-microbatch", "1"]
        for ranks, more in ((1, []), (2, two)):
            rows = run_fork(name, folder / str(ranks), *flags.split(), *more)
            found[name, ranks] = rows, folder / str(ranks)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FORKS)
def test_forks_on_two_ranks(forks, name):
    (one, *_), (two, *_) = forks[name, 1][0], forks[name, 2][0]
    assert one["policy/grad_norm"] > 0
    for key in ("policy/grad_norm", "policy/loss", "policy/logprob", "policy/counted_tokens"):
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_forks_do_what_they_say(forks, tmp_path):
    # The KL's gradient is computed for every sample, also of groups without a contrast.
    row = forks["kl", 1][0][0]
    assert row["reward/solve_all"] + row["reward/solve_none"] > 0
    assert row["policy/logprob"] == pytest.approx(-row["policy/entropy"], rel=1e-3)
    # Dynamic sampling leaves only groups with a contrast.
    row = forks["dynamic", 1][0][0]
    assert row["reward/solve_all"] == row["reward/solve_none"] == 0
    assert row["policy/counted_samples"] == 9
    # The reward of its own changes advantages, not the reported rewards.
    rows = table(forks["formatted", 1][1] / "completions" / "step_000001.parquet")
    assert {row["reward"] for row in rows} <= {0.0, 1.0}
    group = rows[:4]
    shaped = [row["reward"] + 0.1 * (len(row["response"]) < 100) for row in group]
    mean = sum(shaped) / 4
    assert [row["advantage"] for row in group] == pytest.approx(
        [r - mean for r in shaped], abs=1e-6
    )
    # Tokens that are left out change the gradient.
    all_tokens = run_fork("late", tmp_path / "run", "--skip-tokens", "0")
    assert all_tokens[0]["policy/grad_norm"] != pytest.approx(
        forks["late", 1][0][0]["policy/grad_norm"], rel=0.01
    )


def test_forking_example_is_short():
    """A fifth script in 30 changed lines, docstring included."""
    before = (ROOT / "nsr_prerl.py").read_text().splitlines()
    diff = difflib.unified_diff(before, generate.fork("late").splitlines(), n=0, lineterm="")
    assert 0 < sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in diff) <= 30


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(SCRIPTS, 2)))
def test_any_two_scripts_differ_by_the_method_only(a, b):
    """Under 60 changed lines outside the docstring, and the numbered sections are the same."""
    code = []
    for name in (a, b):
        text = (ROOT / f"{name}.py").read_text().partition('"""\n\nimport')[2]
        code.append(text.splitlines())
        assert re.findall(r"\n +# (\d)\. ", text) == list("01234567")
    diff = difflib.unified_diff(*code, n=0, lineterm="")
    changed = [x for x in diff if x[0] in "+-" and not x.startswith(("+++", "---"))]
    assert 0 < len(changed) < 60, "\n".join(changed)
    assert not [line for line in changed if re.search(r"# \d\. ", line)]


@pytest.mark.parametrize("name", [*SCRIPTS, "evaluate", "grad_alignment"])
def test_help(name):
    """Every flag, in sections, at 100 columns; the preset's defaults."""
    Args = importlib.import_module(name).Args
    text = harness.help_text(Args, Args())
    assert max(map(len, text.splitlines())) <= 100
    for field in vars(Args()):
        assert f"  --{field.replace('_', '-')} " in text
    if name in SCRIPTS:
        for section in ("Model and data", "Rollout", "Method", "Optimiser"):
            assert f"\n\n{section}\n" in text
        for section in ("Run", "Machine"):
            assert f"\n\n{section} (--resume may change these)\n" in text


def test_help_shows_the_presets_defaults():
    done = subprocess.run(
        [*warm.python(), "dsrl.py", "--preset", "lab", "--help"],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "lab/base]" in done.stdout.replace("\n" + 32 * " ", "")


def test_flags_in_the_pages_exist():
    """Every --flag that a page names belongs to a program of this project, or is listed here."""
    known = set(
        "--nnodes --nproc-per-node --node-rank --master-addr --master-port".split()
    )  # not ours
    known |= set("--shutdown-timeout --model_args --tasks --batch_size --dist --durations".split())
    for program in ours("*.py"):
        text = program.read_text()
        if program.parent.name != "tests":
            known |= set(re.findall(r'"(--[a-z][a-z-]+)"', text))  # argparse's and sys.argv's
        fields = re.findall(r"^    (\w+): ", text.partition("\nclass Args:")[2], re.M)
        known |= {f"--{field.replace('_', '-')}" for field in fields}
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text()):
            assert {flag, flag.replace("--no-", "--")} & known, f"{page.name}: {flag}"


def test_results_are_the_studys():
    """A mean with its interval in the README or a page stands in the study's tables."""
    study = (ROOT / "study" / "tables.md").read_text()
    found = 0
    for page in (ROOT / "README.md", *(ROOT / "docs" / name for name in generate.PAGES)):
        for value in re.findall(r"[\d.]+ ± [\d.]*\d", page.read_text()):
            assert value in study, f"{page.name}: {value}"
            found += 1
    assert found > 20


@pytest.mark.parametrize("name", hardware.MODELS)
def test_hardware_counts_the_models_parameters(name, monkeypatch):
    """The shapes of benchmark/hardware.py, against transformers' models on the meta device."""
    m = hardware.MODELS[name]
    config = (Qwen3Config if m.qwen3 else Qwen2Config)(
        num_hidden_layers=m.layers,
        hidden_size=m.hidden,
        intermediate_size=m.intermediate,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_dim,
        vocab_size=m.vocab,
        tie_word_embeddings=m.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == m.parameters
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == m.layer
    # Where nothing is rounded, the host holds the matrices: all but biases and norms.
    monkeypatch.setattr(hardware, "pinned", lambda size: size)
    head = m.vocab * m.hidden if m.tied else 0  # the engine's is never tied
    assert m.host(1) == pytest.approx(2 * (m.parameters + head), rel=1e-3)
    assert m.offloaded(1) == pytest.approx(16 * m.parameters, rel=1e-3)


def test_pre_commit_hooks_are_clean():
    """What .pre-commit-config.yaml runs before a commit, on every Python file in git."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True, check=False
    ).stdout.split()
    if not files:
        pytest.skip("not a git repository")
    for hook in (hook for repo in config["repos"] for hook in repo["hooks"]):
        program, *words = shlex.split(hook["entry"])
        assert program == ".venv/bin/ruff"
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, *files],
            cwd=ROOT, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_mutants_are_of_this_code():
    """Each old text stands in its file as often as tests/mutants.py says; the new one is Python."""
    names = [m.name for m in mutants.MUTANTS]
    assert len(names) == len(set(names)) >= 90
    for m in mutants.MUTANTS:
        text = (ROOT / m.file).read_text()
        assert text.count(m.old) == m.count > 0 and m.old != m.new, m.name
        compile(text.replace(m.old, m.new), m.file, "exec")
        assert (ROOT / m.tests.split()[0]).is_file(), m.name


def readme_commands(text: str) -> tuple[list[str], list[str]]:
    """The lines of the README's fenced blocks: those that run here, and those that need more."""
    here, elsewhere = [], []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        assert kind == "sh", f"a block of {kind or 'unnamed'} text is neither run nor checked"
        for line in block.splitlines():
            (elsewhere if "# needs " in line else here).append(line)
    return here, elsewhere


@pytest.mark.slow
def test_readme_in_a_fresh_clone(tmp_path):
    """Every command of the README that does not say what it needs, in order, in a clone.

    Training stops after 4 steps, for the sake of time.
    """
    clone = tmp_path / "clone"
    done = subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    here, elsewhere = readme_commands((clone / "README.md").read_text())
    assert here[0].startswith("make demo") and len(here) >= 3 and len(elsewhere) >= 3
    # Set-up takes minutes and a network: the clone gets this one's .venv, newer than its needs.
    (clone / ".venv").symlink_to(ROOT / ".venv")
    for name in ("requirements.txt", "requirements-cpu.txt"):
        os.utime(clone / name, (0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    here = [re.sub(r" *#.*", "", line) for line in here]
    short = {line: f"{line} --num-steps 4" for line in here if "--preset" in line}
    short["make demo"] = "make demo FLAGS='--num-steps 4'"
    assert len(short) == 2
    for line in here:
        done = subprocess.run(
            short.get(line, line),
            shell=True,
            cwd=clone,
            env=env,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    finished = sorted(folder.name.split("__")[0] for folder in (clone / "runs").iterdir())
    assert finished == ["dsrl", "grpo_baseline"] and (clone / "curves.png").stat().st_size > 1e4
    for folder in (clone / "runs").iterdir():
        assert (folder / "model" / "config.json").is_file()
