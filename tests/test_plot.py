"""plot.py on runs written for it: methods, bands, thresholds and multiples worked out by hand."""

import json
import math
import shutil
import subprocess
from pathlib import Path
from statistics import mean

import pytest
import warm
from matplotlib.image import imread

import plot

ROOT = Path(__file__).resolve().parents[1]


def write_run(folder: Path, script: str, evals: dict, *, seconds=2.0, steps=40, **flags) -> Path:
    """A run whose reflections grow by 1 a step and whose avg@4 on two sets is as in `evals`."""
    folder.mkdir()
    flags = {"script": script, "seed": 1, "num_steps": steps, "learning_rate": 0.1, **flags}
    if script == "dsrl":
        flags.setdefault("warmup_steps", 10)
    (folder / "args.json").write_text(json.dumps(flags))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(steps + 1):
            row = {"step": step}
            if step:
                warmup = step <= flags.get("warmup_steps", 0)
                row |= {"phase": "pretrain" if warmup else "rl", "time/step": seconds}
                row["reward/mean"] = step / 100
                row |= {"sync/logprob_gap": 1e-7, "thoughts/reflection": step, "policy/loss": None}
            if step in evals:
                row |= {"eval/a/avg@4": evals[step] - 0.1, "eval/b/avg@4": evals[step] + 0.1}
                row |= {"eval/a/pass@4": 0.9, "eval/a/thoughts/transition": 0.5 + step}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    curve = {0: 0.2, 20: 0.6, 40: 0.8}
    slow = {0: 0.2, 20: 0.4, 40: 0.6}
    return [
        write_run(tmp_path / "d1", "dsrl", slow, seed=1),
        write_run(tmp_path / "d2", "dsrl", slow, seed=2, num_processes=2),
        write_run(tmp_path / "d5", "dsrl", {0: 0.2, 40: 0.3}, warmup_steps=5),
        write_run(tmp_path / "g1", "grpo_baseline", curve, seed=1),
        write_run(tmp_path / "g2", "grpo_baseline", {k: v + 0.1 for k, v in curve.items()}, seed=2),
    ]


def test_methods(runs):
    groups = plot.group_runs([plot.read_run(folder) for folder in runs])
    assert {label: len(group) for label, group in groups.items()} == {
        "DSRL, S 10": 2,
        "DSRL, S 5": 1,
        "GRPO": 2,
    }


def test_methods_of_two_models(tmp_path):
    """Folders with the same last name are two models; what a run keeps makes no method."""
    curve = {0: 0.2, 40: 0.8}
    for i, model in enumerate(("runs/a/model", "runs/b/model", "runs/b/model", "lab/base")):
        write_run(tmp_path / f"{i}", "dsrl", curve, model=model, seed=i, save_every=i)
    groups = plot.group_runs([plot.read_run(tmp_path / f"{i}") for i in range(4)])
    assert {label: len(group) for label, group in groups.items()} == {
        "DSRL, model a/model": 1,
        "DSRL, model b/model": 2,
        "DSRL, model base": 1,
    }


def test_what_makes_another_method(tmp_path):
    """The section of a flag says it; a fork's own flag makes a method, and so does a pair."""
    every = {"cpu_offload": True, "track": "wandb", "clip": [0.2, 0.28], "kl_coef": 0.5}
    for i, (flag, value) in enumerate(every.items()):
        write_run(tmp_path / f"{i}", "mine", {0: 0.2}, **{flag: value}, context=i)
    groups = plot.group_runs([plot.read_run(tmp_path / f"{i}") for i in range(4)])
    assert {label: len(group) for label, group in groups.items()} == {
        "mine": 2,
        "mine, clip 0.2 0.28": 1,
        "mine, kl-coef 0.5": 1,
    }


def test_bands(runs):
    groups = plot.group_runs([plot.read_run(folder) for folder in runs])
    points = plot.curve(groups["GRPO"], plot.accuracy)
    assert [step for step, *_ in points] == [0, 20, 40]
    # Of 0.6 and 0.7: mean 0.65, standard error 0.05, t(0.975, 1) = tan(0.475 pi) = 12.706
    assert points[1][1] == pytest.approx(0.65)
    assert points[1][2] == pytest.approx(0.05 * math.tan(0.475 * math.pi), rel=1e-4)
    assert plot.curve(groups["DSRL, S 5"], plot.accuracy)[0][2] == 0
    # The t quantile of df 2 has the closed form (2p - 1) / sqrt(2 p (1 - p)).
    t2 = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    assert plot.half_width([1.0, 2.0, 4.5]) == pytest.approx(
        t2 * math.sqrt(((-1.5) ** 2 + 0.25 + 4) / 2 / 3), rel=1e-4
    )


def test_table(runs, tmp_path):
    lines = plot.draw(runs, tmp_path / "curves.png", (0.55, 0.7), at_step=20)
    header, *rows = lines
    assert [row[0] for row in rows] == ["GRPO", "DSRL, S 10", "DSRL, S 5"]
    grpo, dsrl, five = (dict(zip(header[:5], row[:5])) for row in rows)
    assert grpo["seeds"] == dsrl["seeds"] == "2" and five["seeds"] == "1"
    assert grpo["final"] == grpo["best"] == "0.850" and dsrl["final"] == "0.600"
    # GRPO's mean: .25 at 0, .65 at 20, so .55 at 15; DSRL's: .4 at 20, .6 at 40, so .55 at 35.
    assert rows[0][4:7] == ["15.0", "30", "1.00x"]
    assert rows[1][4:7] == ["35.0", "70", f"{35 / 15:.2f}x"]
    assert rows[2][4:7] == ["-", "-", "-"]
    assert rows[1][7:10] == ["-", "-", "-"]
    # Reflections only in training: 20 at step 20 against 1; transitions in evaluations, from .5.
    assert rows[0][10:] == ["20.00x", "41.00x"]
    assert imread(tmp_path / "curves.png").shape[1] >= 1200


def test_default_thresholds_are_shares_of_grpo(runs, tmp_path):
    header = plot.draw(runs, tmp_path / "curves.png")[0]
    wanted = [f"steps to {share * 0.85:.3f}" for share in (0.5, 0.8, 0.95)]
    assert [title for title in header if title.startswith("steps")] == wanted


def test_many_seeds():
    """From 11 degrees of freedom on the quantile is a formula: within 1% of the true one."""
    for n, t in ((12, 2.201), (120, 1.980)):
        values = [float(i) for i in range(n)]
        deviation = (sum((v - mean(values)) ** 2 for v in values) / (n - 1)) ** 0.5
        assert plot.half_width(values) == pytest.approx(t * deviation / n**0.5, rel=0.01)


def test_switch_is_marked(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    texts = []
    save = Figure.savefig

    def look(figure, *args, **kwargs):
        texts.extend(t.get_text() for axis in figure.axes for t in axis.texts)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", look)
    plot.draw(runs, tmp_path / "curves.png")
    assert {"S = 10", "S = 5"} == set(texts)
    # Phases say it, whatever the script is called; a run that ends before the switch has none.
    for script, steps, wanted in (("fork", 40, {"S = 7"}), ("fork2", 7, set())):
        texts.clear()
        fork = write_run(tmp_path / script, script, {0: 0.2}, steps=steps, warmup_steps=7)
        plot.draw([fork], tmp_path / "curves.png")
        assert set(texts) == wanted


def test_runs_of_unequal_length(runs, tmp_path, capsys):
    """Means over steps that all seeds have, seconds of runs that get there, and a line about it."""
    short = write_run(tmp_path / "g3", "grpo_baseline", {0: 0.2, 20: 0.6}, seed=3, steps=25)
    lines = plot.draw([*runs[3:], short], tmp_path / "c.png", (0.55, 0.7), at_step=20)
    rows = dict(zip(lines[0], lines[1]))
    # The mean of .2, .3, .2 is .233 at 0; of .6, .7, .6 it is .633 at 20. No step 40.
    assert rows["final"] == rows["best"] == "0.633" and rows["seeds"] == "3"
    step = 20 * (0.55 - 0.7 / 3) / 0.4
    assert lines[1][4:6] == [f"{step:.1f}", f"{2 * step:.0f}"] and lines[1][7:9] == ["-", "-"]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"GRPO: {short} ends at step 25, and so do the means over seeds"]
    # A step that only one run reaches is not cheap; a run without evaluations has no part.
    rows = [plot.read_run(folder) for folder in (runs[3], short)]
    assert plot.seconds_to(rows, 30) == 60 and plot.seconds_to(rows, 10) == 20
    none = plot.read_run(write_run(tmp_path / "none", "grpo_baseline", {}, seed=4))
    assert plot.curve([rows[0], none], plot.accuracy) == plot.curve([rows[0]], plot.accuracy)
    # Alone, the short run is drawn to its end.
    points = plot.curve([rows[1]], lambda row: row.get("reward/mean"))
    assert points[-1][0] == 25


def test_thoughts_at_a_step(runs):
    """Between two evaluations, on the line between them; "-" where the run has no such step."""
    group = [plot.read_run(runs[3])]
    for at_step, ratio in ((0, 1), (10, 10.5 / 0.5), (20, 41), (41, None)):
        found = plot.multiple(group, "thoughts/transition", at_step)
        assert found == (ratio and pytest.approx(ratio)), at_step
    assert plot.multiple(group, "thoughts/reflection", 40) == 40
    assert plot.multiple(group, "thoughts/reflection", 0) is None  # training begins at step 1


def plot_command(*words) -> subprocess.CompletedProcess:
    command = [*warm.python(), "plot.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_as_a_command(runs, tmp_path):
    """Files in new folders; a run that is named twice; folders and files beside the runs."""
    evaluation, file = tmp_path / "evaluate__x", tmp_path / "old.png"
    evaluation.mkdir()
    (evaluation / "args.json").write_text("{}")
    file.touch()
    table = tmp_path / "new" / "tables" / "c.csv"
    again = f"{runs[0]}/../{runs[0].name}"
    words = [*runs, again, evaluation, file, "--output", tmp_path / "new" / "c.PNG", "--csv", table]
    done = plot_command(*words)
    assert done.returncode == 0, done.stderr
    rows = table.read_text().splitlines()
    assert "DSRL, S 10" in done.stdout and len(rows) == 4 and '"DSRL, S 10",2,' in rows[2]
    said = f"{evaluation} (it has no metrics.jsonl), {file} (it has no args.json)"
    assert done.stdout.splitlines()[0] == f"no runs, so left out: {said}"
    assert (tmp_path / "new" / "c.PNG").is_file()


def test_a_copy_is_no_second_seed(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    table = tmp_path / "c.csv"
    done = plot_command(*runs, copy, "--output", tmp_path / "c.png", "--csv", table)
    assert done.returncode == 0, done.stderr
    names = [row.split('"')[1] for row in table.read_text().splitlines()[1:] if '"' in row]
    assert f"DSRL, S 10, {runs[0].name}" in names and "DSRL, S 10, copy" in names
    assert not any(name == "DSRL, S 10" for name in names)


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--output", "c.xyz", "a picture's name must end in .png, .pdf, "),
        ("--output", "curves", "a picture's name must end in .png, .pdf, "),
        ("--output", "d1.png", "cannot be written: Is a directory"),
        ("--output", "file/c.png", "cannot be written: "),
        ("--output", "/proc/c.png", "cannot be written: "),
        ("--csv", "file/new/c.csv", "cannot be written: "),
        ("--csv", "d1.png", "cannot be written: Is a directory"),
    ],
)
def test_files_that_cannot_be_written(tmp_path, capsys, flag, name, message):
    """Before any run is read: there is none."""
    (tmp_path / "d1.png").mkdir()
    (tmp_path / "file").touch()
    words = {"--output": tmp_path / "c.png"} | {flag: tmp_path / name}
    args = plot.Args((tmp_path / "none",), output=words["--output"], csv=words.get("--csv"))
    with pytest.raises(SystemExit) as end:
        plot.main(args)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"error: {flag} {tmp_path / name}") and message in lines[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "args.json").unlink(), "has no args.json"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "is empty"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": '), "broken JSON"),
        (lambda run: run.rename(run.parent / "gone"), "is not the folder of a run"),
        (lambda run: run.rename(run.parent / "x").with_name("d1").touch(), "has no args.json"),
    ],
)
def test_bad_input(runs, tmp_path, damage, message):
    damage(runs[0])
    done = plot_command(runs[0], "--output", tmp_path / "c.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
