"""study/switch.py: its forks, its order, what it measures, and its tables."""

import ast
import csv
import difflib
import json
import math
import re
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import task
from lab.pretrain import let_probability
from study import experiments, report, switch
from study.steps import FixedLength

SCRIPTS = sorted({(run.method, run.optimizer) for run in switch.all_runs()})


@pytest.mark.parametrize("method, optimizer", SCRIPTS)
def test_a_fork_differs_only_in_the_stated_lines(method, optimizer):
    source = switch.fork(method, optimizer)
    ast.parse(source)
    script = switch.METHODS[method].command.split()[0]
    before = (switch.ROOT / script).read_text().splitlines()
    patches = switch.patches_of(method, optimizer)
    removed = added = 0
    for line in difflib.ndiff(before, source.splitlines()):
        text = line[2:].strip()
        if line.startswith("- "):
            removed += 1
            assert any(old.strip() in text for old, _, _ in patches), text
        elif line.startswith("+ "):
            added += 1
            assert any(text in new or new.strip() in text for _, new, _ in patches), text
    expected = sum(times * new.count("\n") or times for _, new, times in patches)
    kept = sum(times for old, new, times in patches if new.startswith(old))
    assert added == expected - kept and removed == sum(t for *_, t in patches) - kept
    # the data flow of the change: random advantages come before they are read
    assert ("torch.randperm" in source) == ("random" in method)
    assert ("FixedLength" in source) == optimizer.startswith(("length", "signs"))


def test_runs():
    runs = switch.all_runs()
    assert len(set(runs)) == len(runs)
    assert {run.method for run in runs} == set(switch.METHODS)
    assert {run.optimizer for run in runs} == set(switch.OPTIMIZERS)
    assert {run.world for run in runs} == {w for w in task.WORLDS if w.startswith("switch")}
    assert [run.method for run in runs[:5]] == switch.MAIN
    assert all(run[:2] + run[3:] == ("switch", 1, "length-0.03", 1) for run in runs[:5])
    for method in switch.METHODS:  # three seeds on each of two bases
        own = {(r.base, r.seed) for r in runs if r[2:4] == (method, "length-0.03")}
        assert own >= {(base, seed) for base in (1, 2) for seed in (1, 2, 3)}
    folders = {switch.run_folder(switch.Args(), run) for run in runs}
    names = {switch.script_name(*pair) for pair in SCRIPTS}
    assert len(folders) == len(runs) and len(names) == len(SCRIPTS)
    assert switch.bases_of(runs)[:2] == [("switch", 1), ("switch", 2)]


def test_commands():
    def flags(method: str, optimizer: str) -> dict:
        line = switch.command(switch.Args(), switch.Run("switch", 2, method, optimizer, 3))
        return dict(zip(line[2::2], line[3::2]))

    plain = flags("grpo", "length-0.03")
    assert plain["--learning-rate"] == "0.03" and plain["--seed"] == "3"
    assert plain["--model"].endswith("runs/switch/switch/base2/model")
    # four updates a step, together as long as one
    assert flags("nsr-rl-4", "length-0.03") != plain
    line = switch.command(switch.Args(), switch.Run("switch", 1, "nsr-rl-4", "length-0.03", 1))
    assert line[line.index("--learning-rate") + 1] == "0.0075"
    # S counts from the first step that moves the weights
    assert flags("dsrl-5", "adamw-3e-4")["--warmup-steps"] == "5"
    warm = flags("dsrl-5", "adamw-warm")
    assert (warm["--warmup-steps"], warm["--num-steps"]) == ("15", "30")


@pytest.mark.parametrize("signs", [False, True])
def test_steps_have_one_length(signs):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    unused = torch.nn.Parameter(torch.ones(2))
    optimizer = FixedLength([*weights, unused], lr=0.03, signs=signs)
    for scale in (1e-6, 1.0, 1e3):
        before = [weight.detach().clone() for weight in weights]
        grads = [scale * torch.randn_like(weight) for weight in weights]
        for weight, grad in zip(weights, grads):
            weight.grad = grad.clone()
        optimizer.step()
        moved = torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before)])
        along = torch.cat([(g.sign() if signs else g).flatten() for g in grads])
        torch.testing.assert_close(moved, -0.03 * along / along.norm(), rtol=1e-3, atol=1e-6)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # no direction, no step
    assert all(weight.isfinite().all() for weight in weights) and (unused == 1).all()


def test_a_trial_needs_its_own_folder(monkeypatch):
    with pytest.raises(SystemExit, match="a folder of its own|--folder of its own"):
        switch.main(switch.Args(steps=1))


def test_an_unknown_method_is_refused():
    with pytest.raises(SystemExit, match="--only gpro: unknown; they are grpo, "):
        switch.chosen(switch.Args(only=("gpro",)))


def write_run(folder, speed: float, steps: int, idle: int = 0) -> None:
    """What a run leaves behind, as far as it is collected."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(0, steps + 1, 5):
        done = max(0, step - idle)
        values = {"avg@8": 0.3 + speed * done, "pass@8": 0.9, "length": 50.0, "let": 0.01 * done}
        values |= {"thoughts/reflection": 0.1 + done, "thoughts/transition": 0.2, "restated": 1.0}
        values |= {"p_N": 0.03 + speed * done, "p_T": 0.95, "p_BOS": 0.5, "truncated": 0.0}
        row = {"step": step, **{f"eval/lab/{key}": value for key, value in values.items()}}
        lines.append(row if step == 0 else row | {"phase": "rl", "reward/mean": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "done").write_text("")


def test_results_of_an_unfinished_study(tmp_path, monkeypatch):
    """Some runs, one of them without an end: tables, picture and CSV files of the others."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    assert report.read_switch() == {}
    assert report.switch_table({}) == report.switch_doses_table({}) == report.NOT_RUN
    assert report.switch_few_table({}) == report.NOT_RUN
    report.draw_switch({})
    assert not list(tmp_path.iterdir())

    args = switch.Args(folder=tmp_path / "runs")
    speeds = {"grpo": 0.01, "nsr-prerl": 0.02, "dsrl-5": 0.03}
    for method, speed in speeds.items():
        for base, seed in ((1, 1), (2, 2)) if method != "dsrl-5" else ((1, 1),):
            run = switch.Run("switch", base, method, "length-0.03", seed)
            write_run(switch.run_folder(args, run), speed, 30)
    warm = switch.Run("switch", 1, "grpo", "adamw-warm", 1)
    write_run(switch.run_folder(args, warm), 0.01, 40, idle=10)
    stopped = switch.run_folder(args, switch.Run("switch", 1, "random-prerl", "length-0.03", 1))
    write_run(stopped, 0.01, 10)
    (stopped / "done").unlink()
    moved = {"norm": 2.0, "x": 10.2, "bos": 14.9, "x_signs": 0.5, "bos_signs": 0.4}
    found = {"log_odds_x": -4.0, "log_odds_bos": 0.1, "cosine": 0.646}
    summary = {"all": {"fraction_negative": 0.125, "cosine_mean": 0.5}}
    gradients = switch.base_folder(args, "switch", 1) / "gradients" / "alignment.json"
    gradients.parent.mkdir()
    updates = {"GRPO": moved | {"x": 5.8}, "NSR-PreRL": moved}
    written = {"modes": found | {"updates": updates}, "summary": summary}
    gradients.write_text(json.dumps(written))
    switch.collect(args)

    with open(tmp_path / "switch.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 7 + 9 and {row["method"] for row in rows} == set(speeds)
    runs = report.read_switch()
    lines = report.switch_table(runs).splitlines()
    assert len(lines) == 2 + 4
    cells = dict(zip(lines[0].split(" | "), lines[2].split(" | ")))
    assert cells["base.seed"] == "1.1 2.2" and cells["avg@8 at 20"] == "0.50 0.50"
    assert cells["`Let` at 20"] == "0.20 0.20"
    few = report.switch_few_table(runs).splitlines()[2:]
    assert few[1].startswith("| NSR-PreRL | 0.50 | 0.70 | 0.50 | 0.70 |"), few[1]
    every = report.switch_methods_table(runs).splitlines()[2:]
    assert every[1].startswith("| NSR-PreRL | 0.70 | 0.90 | 0.43 | 201.0 | 1.0 |"), every[1]
    # ten steps that only warmed the moments are not counted
    shifted = runs["switch", "grpo", "adamw-warm"]["1", "1"]
    assert [row["step"] for row in shifted] == [0, 0, 5, 10, 15, 20, 25, 30][-len(shifted) :]
    assert report.at(shifted, "eval avg@8", 20) == pytest.approx(0.5)
    rates = report.switch_rates_table(runs).splitlines()[2:]
    assert rates[0].startswith("| length-0.03 | 0.42 | 0.55 | 0.68 | - |"), rates
    assert "at" not in report.switch_best_table(runs)  # one rate of a kind is no choice
    doses = report.switch_doses_table(runs).splitlines()[2:]
    expected = "| `switch` | 1 | -4.00 | 0.65 | 12.5% | 5.80 | 10.20 | 0.50 | 0.50 | 0.50 | 0.70 |"
    assert doses[0].startswith(expected), doses[0]
    assert doses[1].startswith("| `switch` | 2 | - | - | - | - | - | - | - | 0.50 | 0.70 |")
    # at step 5 p(Let) is 0.08 and 0.13, from 0.03; DSRL's lead at step 10 is 0.2
    rise = [math.log(p / (1 - p) * 0.97 / 0.03) for p in (0.08, 0.13)]
    gains, leads = report.forecast_points(runs)
    assert gains["grpo", "1"] == [pytest.approx((0.15 * 5.8, rise[0]))]
    assert gains["nsr-prerl", "1"] == [pytest.approx((0.15 * 10.2, rise[1]))] and len(gains) == 2
    assert leads == {("3%", "1"): pytest.approx((10.2 / 5.8, 0.2))}
    report.draw_switch(runs)
    assert (tmp_path / "switch.png").stat().st_size > 2e4
    assert (tmp_path / "forecast.png").stat().st_size > 1e4


def test_the_best_rate():
    """The highest mean of steps 5 to 20, over the seeds that all rates of the kind have."""

    def rows(speed: float) -> list[dict]:
        values = [{"step": step, "eval avg@8": speed * step} for step in (0, 5, 10, 15, 20)]
        return [*values, {"step": 25, "eval avg@8": 1.0}]

    assert report.speed(rows(0.02)) == pytest.approx(0.25) and report.speed([]) is None
    speeds = {"length-0.01": 0.01, "length-0.03": 0.02, "length-0.06": 0.04, "length-0.1": 0.03}
    runs = {("switch", "grpo", name): {("1", "1"): rows(v)} for name, v in speeds.items()}
    assert report.best(runs, "grpo", "1", "length") == "0.50 at 0.06"
    assert (
        report.best(runs, "grpo", "2", "length") == report.best(runs, "grpo", "1", "adamw") == "-"
    )
    runs["switch", "grpo", "length-0.1"]["1", "3"] = rows(1.0)  # a seed that the others lack
    assert report.best(runs, "grpo", "1", "length") == "0.50 at 0.06"
    rates = "adamw-1e-4", "adamw-3e-4", "adamw-1e-3"
    for name, value in zip(rates, (0.01, 0.02, 0.01)):
        runs["switch", "grpo", name] = {("2", s): rows(value * int(s)) for s in "12"}
    assert report.best(runs, "grpo", "2", "adamw") == "0.38 (0.25-0.50) at 3e-4"


@pytest.mark.slow
def test_one_run_of_one_step(tmp_path, monkeypatch):
    """The chain from pre-training to the measured probabilities, which are those of the model."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    args = switch.Args(only=("random-5-then-grpo",), optimizers=("length-0.03",), bases=(1,))
    args.seeds, args.steps, args.base_steps = (1,), 1, 1
    args.worlds, args.folder, args.jobs = ("switch",), tmp_path, 1
    switch.main(args)
    (run,) = switch.chosen(args)
    (switch.ROOT / switch.script_name(run.method, run.optimizer)).unlink()
    folder = switch.run_folder(args, run)
    assert (folder / "done").exists() and not (tmp_path / "results").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    for path, row in ((switch.base_folder(args, "switch", 1), rows[0]), (folder, rows[1])):
        model = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path / "model")
        for kind, value in let_probability(model, tokenizer, task.WORLDS["switch"]).items():
            assert row[f"eval/lab/p_{kind}"] == pytest.approx(value, abs=2e-4)
        assert 0 < row["eval/lab/let"] < 1 and row["eval/lab/restated"] > 0.5
    start, end = (
        AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
        for path in (switch.base_folder(args, "switch", 1), folder)
    )
    moved = [(a - b).flatten() for a, b in zip(end.parameters(), start.parameters())]
    assert torch.cat(moved).norm().item() == pytest.approx(0.03, rel=1e-3)
    found = json.loads((folder.parent / "gradients" / "alignment.json").read_text())["modes"]
    assert found["updates"]["NSR-PreRL, random"]["norm"] > 0
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(sys, "executable", "/nothing/is/run")  # all of it is there
    switch.main(args)
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    (switch.ROOT / switch.script_name(run.method, run.optimizer)).unlink()


def test_time_left(tmp_path):
    """By the runs that have finished, two at a time; no guess before the first."""
    args, runs = switch.Args(folder=tmp_path), switch.all_runs()[:4]
    assert "needs a finished run" in switch.time_left(args, runs, runs)
    folder = switch.run_folder(args, runs[0])
    folder.mkdir(parents=True)
    (folder / "done").write_text("7200 seconds\n")
    assert switch.time_left(args, runs, runs[1:]).startswith("about 3.0 hours")


def test_a_run_in_the_csv_file_is_not_repeated(tmp_path, monkeypatch):
    """On another machine, without its folder. A trial repeats it."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    args = switch.Args(folder=tmp_path / "runs")
    run = switch.all_runs()[0]
    write_run(switch.run_folder(args, run), 0.01, 20)
    switch.collect(args)
    shutil.rmtree(args.folder)
    assert switch.recorded(args) == {run}
    args.steps = 1
    assert switch.recorded(args) == set()


@pytest.mark.parametrize("base", [1, 2])
def test_the_kept_bases_are_those_of_the_results(base):
    """Their p(Let) is what lab/README.md says, and what the runs in switch.csv began with."""
    folder = switch.KEPT_BASES / str(base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = let_probability(model, tokenizer, task.WORLDS["switch"])
    readme = (switch.ROOT / "lab" / "README.md").read_text()
    stated = [ast.literal_eval(text) for text in re.findall(r"`p\(Let\) ({.*?})`", readme)]
    assert found == pytest.approx(stated[base - 1], abs=2e-4)
    rows = [r for r in experiments.read_csv("switch") if (r["base"], r["step"]) == (str(base), "0")]
    rows = [row for row in rows if row["world"] == "switch"]
    assert rows
    for row in rows:
        assert float(row["eval p(Let|N)"]) == pytest.approx(found["N"], abs=2e-4)
        assert float(row["eval p(Let|BOS)"]) == pytest.approx(found["BOS"], abs=2e-4)


def test_best_rate():
    """Chosen by the seeds that all rates have, then shown with every seed of that rate."""

    def rows(accuracy):
        return [{"step": 5.0, "eval avg@8": accuracy}]

    seeds = {
        "length-0.1": {("1", "1"): rows(0.5), ("1", "2"): rows(0.9)},
        "length-0.2": {("1", "1"): rows(0.6), ("1", "3"): rows(0.8), ("2", "1"): rows(0.1)},
        "adamw-1e-4": {("1", "1"): rows(0.7)},
    }
    runs = {("switch", "grpo", optimizer): found for optimizer, found in seeds.items()}
    assert report.best(runs, "grpo", "1", "length") == "0.70 (0.60-0.80) at 0.2"
    assert report.best(runs, "grpo", "1", "adamw") == "-"  # one rate is no choice
    del seeds["length-0.2"][("1", "1")]
    assert report.best(runs, "grpo", "1", "length") == "-"  # no seed at both
