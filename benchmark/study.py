"""The study: every method and ablation in the lab, three seeds each.

    python benchmark/study.py run                  restartable: done runs are not repeated
    python benchmark/study.py run --only grpo dsrl-10 --seeds 1
    python benchmark/study.py report               docs/study/*.png and tables, from the CSV files

Each run is one command line of a script, printed as it starts. `run` ends by writing
benchmark/results/*.csv; `report` needs these files only, not the runs.
"""

import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import pyarrow.parquet
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plot
from docs.generate import fill, worked_example
from lab import task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
PICTURES = ROOT / "docs" / "study"

# The learning rate is the preset's, 3e-4: see SWEEP.
VARIANTS = {
    # post-train space
    "grpo": "grpo_baseline.py",
    "dr-grpo": "grpo_baseline.py --advantage dr_grpo",
    "rloo": "grpo_baseline.py --advantage rloo",
    "reinforce++": "grpo_baseline.py --advantage reinforce++",
    "psr-rl": "grpo_baseline.py --negative-weight 0",
    "nsr-rl": "grpo_baseline.py --positive-weight 0",
    "w-reinforce": "grpo_baseline.py --negatives reward --positive-weight 0.1",
    "grpo-microbatch-mean": "grpo_baseline.py --loss-aggregation microbatch-token-mean "
    "--max-tokens-per-microbatch 1024",
    # pre-train space
    "prerl": "prerl.py",
    "psr-prerl": "prerl.py --negative-weight 0",
    "nsr-prerl": "nsr_prerl.py",
    "nsr-prerl-every-wrong": "nsr_prerl.py --negatives reward",
    # both
    "dsrl-5": "dsrl.py --warmup-steps 5",
    "dsrl-10": "dsrl.py --warmup-steps 10",
    "dsrl-20": "dsrl.py --warmup-steps 20",
    "dsrl-40": "dsrl.py --warmup-steps 40",
    "nsr-rl-then-rl": "dsrl.py --warmup-steps 10 --warmup-space posttrain",
    "dsrl-10-reset": "dsrl.py --warmup-steps 10 --reset-optimizer-at-switch",
    # the worked example of docs/forking.md: the first 8 tokens of a response are left out
    "nsr-prerl-late": "late.py",
    # the highest rate of the sweep, at which RL does best, and longer
    "grpo-1e-3": "grpo_baseline.py --learning-rate 1e-3 --num-steps 150",
    "prerl-1e-3": "prerl.py --learning-rate 1e-3 --num-steps 150",
    "dsrl-3-1e-3": "dsrl.py --learning-rate 1e-3 --warmup-steps 3",
}
# One seed that the study does not use.
SWEEP = {
    f"sweep-{name}-{rate}": f"{name}.py --learning-rate {rate}"
    for name in ("grpo_baseline", "prerl", "nsr_prerl", "dsrl")
    for rate in ("1e-4", "3e-4", "1e-3")
}
SWEEP_SEED = 11
# What tests/test_learning.py runs.
GUARD = {
    f"guard-{name}": f"{name}.py --learning-rate 1e-3 --num-steps 12 --eval-every 12 {flags}"
    for name, flags in (("grpo_baseline", ""), ("dsrl", "--warmup-steps 4"))
}

COLUMNS = {  # of the CSV file, and the key in metrics.jsonl
    "step": "step",
    "phase": "phase",
    "reward": "reward/mean",
    "length": "completion/length",
    "entropy": "policy/entropy",
    "logprob": "policy/logprob",
    "reflection": "thoughts/reflection",
    "transition": "thoughts/transition",
    "seconds": "time/step",
    **{
        f"{name} {key}": f"eval/{name}/{full}"
        for name in ("lab", "hard")
        for key, full in {
            "avg@8": "avg@8",
            "pass@8": "pass@8",
            "length": "length",
            "reflection": "thoughts/reflection",
            "transition": "thoughts/transition",
        }.items()
    },
}

SAMPLES = ("restated", "right", "right for its own", "truncated", "Let")
KS = [1, 2, 4, 8, 16, 32, 64]
THRESHOLDS = (0.5, 0.8, 0.9)
FIGURES = {
    "methods": ["grpo", "prerl", "nsr-prerl", "dsrl-10"],
    "signs": ["psr-rl", "nsr-rl", "psr-prerl", "nsr-prerl", "nsr-prerl-every-wrong"]
    + ["nsr-prerl-late"],
    "warmup": ["grpo", "dsrl-5", "dsrl-10", "dsrl-20", "dsrl-40", "nsr-rl-then-rl"],
    "baselines": ["grpo", "dr-grpo", "rloo", "reinforce++", "w-reinforce", "dsrl-10"],
    "long": ["grpo-1e-3", "prerl-1e-3"],
    "details": ["grpo", "grpo-microbatch-mean", "dsrl-10", "dsrl-10-reset"],
}


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["run", "report"]]
    """run the experiments, or draw the tables and figures from benchmark/results/*.csv"""
    only: tuple[str, ...] = ()
    """names of the variants to run; default all, the sweep first"""
    seeds: tuple[int, ...] = (1, 2, 3)
    folder: Path = ROOT / "runs" / "study"
    """of the runs"""
    jobs: int = 2
    """runs at a time, with a part of the cores each"""


def commands(args: Args) -> list[tuple[str, int, list[str], Path]]:
    """(variant, seed, command line, output folder) of every run, in the order of running."""
    known = SWEEP | VARIANTS | GUARD
    for name in set(args.only) - set(known):
        sys.exit(f"error: --only {name}: no such variant; they are {', '.join(known)}")
    hard = args.folder / "hard.jsonl"
    hard.parent.mkdir(parents=True, exist_ok=True)
    hard.write_text("".join(json.dumps(problem) + "\n" for problem in task.problems("hard")))
    common = ["--preset", "lab", "--eval-every", "10", "--eval-datasets", "lab", str(hard)]
    found = []
    for group, seeds in ((SWEEP, (SWEEP_SEED,)), (VARIANTS, args.seeds), (GUARD, args.seeds)):
        for seed in seeds:
            for name, command in group.items():
                if args.only and name not in args.only:
                    continue
                folder = args.folder / f"{name}__s{seed}"
                script, *flags = shlex.split(command)
                line = [sys.executable, script, *common, "--seed", str(seed), *flags]
                found.append((name, seed, [*line, "--output-dir", str(folder)], folder))
    return found


def do(command: list[str], threads: int, log: Path) -> int:
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as file:
        return subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file).returncode


def train(command: list[str], folder: Path, threads: int) -> None:
    """One run, unless it was done before."""
    if (folder / "done").exists():
        return
    print(shlex.join(command[1:]), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.time()
    code = do(command, threads, log := folder.parent / f"{folder.name}.log")
    if code:
        print(f"exit code {code}: {log}", flush=True)
    else:
        (folder / "done").write_text(f"{time.time() - start:.0f} seconds\n")


def pass_at_64(folder: Path, threads: int) -> None:
    """64 samples from a run's last checkpoint to each hard problem, unless that was done before."""
    output, log = folder / "pass64", folder.parent / f"{folder.name}.pass64.log"
    if (output / "results.json").exists() or not (folder / "done").exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    line = "evaluate.py --preset lab --num-samples 64 --datasets".split()
    line += [str(folder.parent / "hard.jsonl"), "--model", str(folder / "model")]
    code = do([sys.executable, *line, "--output-dir", str(output)], threads, log)
    if code:
        print(f"exit code {code}: {log}", flush=True)


def run(args: Args) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    (ROOT / "late.py").write_text(worked_example())
    runs = commands(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        work = [pool.submit(train, command, folder, threads) for _, _, command, folder in runs]
        work += [
            pool.submit(pass_at_64, folder, threads)
            for name, *_, folder in runs
            if name in VARIANTS
        ]
        for future in work:
            future.result()
    collect(args)


def collect(args: Args) -> None:
    """What the runs in --folder measured, to benchmark/results/study.csv and study_pass64.csv."""
    rows, finals, ends = [], [], []
    for name, seed, _, folder in commands(dataclasses.replace(args, only=())):
        if not (folder / "done").exists():
            continue
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            values = [metrics.get(key) for key in COLUMNS.values()]
            values = [round(v, 4) if isinstance(v, float) else v for v in values]
            rows.append([name, seed, *values])
        if (folder / "pass64" / "results.json").exists():
            hard = json.loads((folder / "pass64" / "results.json").read_text())["hard"]
            finals.append([name, seed, *(round(hard[f"pass@{k}"], 4) for k in KS)])
        if name in VARIANTS:
            ends.append([name, seed, *last_samples(folder)])
    write_csv(RESULTS / "study_samples.csv", ["variant", "seed", *SAMPLES], ends)
    write_csv(RESULTS / "study.csv", ["variant", "seed", *COLUMNS], rows)
    write_csv(RESULTS / "study_pass64.csv", ["variant", "seed", *map(str, KS)], finals)


def last_samples(folder: Path) -> list[float]:
    """Of the last step's training samples: the shares that SAMPLES names."""
    path = sorted((folder / "completions").glob("*.parquet"))[-1]
    counts = dict.fromkeys(SAMPLES, 0)
    samples = pyarrow.parquet.read_table(path).to_pylist()
    for row in samples:
        problem = row["prompt"].removeprefix("Q ").removesuffix(" A")
        counts["restated"] += row["response"].startswith(f" Compute {problem}. ")
        # judged by the problem that the response itself restates
        own = re.match(r" Compute (\d\d)#(\d)\. ", row["response"])
        answer = task.chain(int(own[1]), int(own[2])) if own else []
        box = task.boxed_answer(row["response"])
        counts["right for its own"] += bool(answer) and box == f"{answer[-1]:02d}"
        counts["right"] += row["reward"] == 1
        counts["truncated"] += row["finish_reason"] == "length"
        counts["Let"] += ". Let " in row["response"]
    return [round(n / len(samples), 4) for n in counts.values()]


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


# ---------------------------------------------------------------------------------- the report


def read_results() -> tuple[dict, dict]:
    """{variant: {seed: rows}} of study.csv, {variant: [pass@k by k, for each seed]}."""
    runs, finals = {}, {}
    with open(RESULTS / "study.csv") as file:
        for row in csv.DictReader(file):
            name, seed = row.pop("variant"), int(row.pop("seed"))
            row = {k: v if k == "phase" else float(v) for k, v in row.items() if v}
            runs.setdefault(name, {}).setdefault(seed, []).append(row)
    with open(RESULTS / "study_pass64.csv") as file:
        for row in csv.DictReader(file):
            finals.setdefault(row["variant"], []).append({k: float(row[str(k)]) for k in KS})
    return runs, finals


def interval(values: list[float], digits: int = 3) -> str:
    """Mean ± half of the 95% interval over seeds (Student's t), or "-".

    >>> interval([0.5, 0.6, 0.7]), interval([0.5]), interval([0.5, None])
    ('0.600 ± 0.248', '0.500', '-')
    """
    if not values or None in values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {plot.half_width(values):.{digits}f}" if len(values) > 1 else "")


def at(rows: list[dict], column: str, step: int) -> float | None:
    return next((row.get(column) for row in rows if row["step"] == step), None)


def last(rows: list[dict], column: str) -> float:
    return [row[column] for row in rows if column in row][-1]


def points(rows: list[dict], column: str) -> list[tuple[float, float]]:
    return [(row["step"], row[column]) for row in rows if column in row]


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


def accuracy_table(runs: dict, finals: dict) -> str:
    header = ["variant", "lab, step 20", "lab, best", "lab, end", "hard, end", "hard pass@8, end"]
    header += ["hard pass@64, end", *(f"steps to {t}" for t in THRESHOLDS)]
    lines = []
    for name in VARIANTS:
        seeds = list(runs.get(name, {}).values())
        line = [
            [at(rows, "lab avg@8", 20) for rows in seeds],
            [max(v for _, v in points(rows, "lab avg@8")) for rows in seeds],
            [last(rows, "lab avg@8") for rows in seeds],
            [last(rows, "hard avg@8") for rows in seeds],
            [last(rows, "hard pass@8") for rows in seeds],
            [final[64] for final in finals.get(name, [])],
        ]
        steps = [
            [plot.reached(points(rows, "lab avg@8"), threshold) for rows in seeds]
            for threshold in THRESHOLDS
        ]
        line = [interval(values) for values in line] + [interval(values, 1) for values in steps]
        lines.append([f"`{name}`", *line])
    return markdown(header, lines)


def shape_table(runs: dict) -> str:
    header = ["variant", "length, 0 → end", "entropy, 1 → end", "reflections × at 20"]
    header += ["transitions × at 20", "seconds in steps"]
    lines = []
    for name in VARIANTS:
        seeds = list(runs.get(name, {}).values())
        line = [f"`{name}`"]
        for column, digits in (("lab length", 0), ("entropy", 2)):
            ends = interval([last(rows, column) for rows in seeds], digits)
            line.append(f"{points(seeds[0], column)[0][1]:.{digits}f} → {ends}" if seeds else "-")
        for column in ("lab reflection", "lab transition"):
            times = [at(rows, column, 20) / at(rows, column, 0) for rows in seeds]
            line.append(interval(times, 1))
        line.append(interval([sum(row.get("seconds", 0) for row in rows) for rows in seeds], 0))
        lines.append(line)
    return markdown(header, lines)


def sweep_table(runs: dict) -> str:
    """Mean held-out avg@8 over the run's evaluations, by learning rate."""
    rates = ("1e-4", "3e-4", "1e-3")
    lines = []
    for script, label in plot.NAMES.items():
        rows = [runs.get(f"sweep-{script}-{rate}", {}).get(SWEEP_SEED) for rate in rates]
        values = [[v for _, v in points(r, "lab avg@8")][1:] if r else [] for r in rows]
        cells = [f"{mean(v):.3f} ({max(v):.3f}, {v[-1]:.3f})" if v else "-" for v in values]
        lines.append([label, *cells])
    return markdown(["mean (best, last)", *rates], lines)


def samples_table() -> str:
    """Mean over seeds of what the last step's training samples are."""
    with open(RESULTS / "study_samples.csv") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        cells = [" ".join(f"{float(row[key]):.2f}" for row in own) or "-" for key in SAMPLES]
        lines.append([f"`{name}`", *cells])
    return markdown(["variant (each seed)", *SAMPLES], lines)


def guard_table(runs: dict) -> str:
    """Gain in held-out avg@8 in the 12 steps of tests/test_learning.py, by seed."""
    lines = []
    for name in GUARD:
        seeds = runs.get(name, {})
        gains = [last(rows, "lab avg@8") - at(rows, "lab avg@8", 0) for rows in seeds.values()]
        lines.append([f"`{name}`", ", ".join(f"{gain:.3f}" for gain in gains) or "-"])
    return markdown(["run", "gain of each seed"], lines)


def draw(runs: dict, names: list[str], picture: str, columns: list[str]) -> None:
    """The variants' curves of `columns` to docs/study/PICTURE.png, by plot.py."""
    groups = {}
    for name in names:
        flags = VARIANTS[name].split()
        args = {"script": flags[0].removesuffix(".py")}
        args["warmup_steps"] = (
            int(flags[flags.index("--warmup-steps") + 1]) if "--warmup-steps" in flags else 0
        )
        seeds = [
            (args, [{"step": row["step"]} | {COLUMNS[c]: row.get(c) for c in columns} for row in r])
            for r in runs.get(name, {}).values()
        ]
        if seeds:
            groups[name] = seeds
    if groups:
        plot.draw_panels(groups, PICTURES / f"{picture}.png")


def draw_pass_at_k(finals: dict, names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, name in enumerate(name for name in names if name in finals):
        values = [mean(final[k] for final in finals[name]) for k in KS]
        axis.plot(KS, values, color=plot.COLOURS[i], ls=plot.STYLES[i % 4], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(KS, KS)
    axis.set_xlabel("k")
    axis.set_ylabel("pass@k, problems of 6 to 8 steps")
    axis.grid(alpha=0.25)
    if finals:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


def report() -> None:
    """Pictures to docs/study/, and the tables of docs/study.md between their marks."""
    runs, finals = read_results()
    PICTURES.mkdir(parents=True, exist_ok=True)
    curves = ["lab avg@8", "hard avg@8", "length", "entropy", "reflection", "transition"]
    for picture, names in FIGURES.items():
        draw(runs, names, picture, curves)
    draw_pass_at_k(finals, FIGURES["methods"], PICTURES / "pass_at_k.png")
    page = ROOT / "docs" / "study.md"
    text = page.read_text()
    for mark, part in {
        "accuracy": accuracy_table(runs, finals),
        "shape": shape_table(runs),
        "sweep": sweep_table(runs),
        "samples": samples_table(),
        "guard": guard_table(runs),
    }.items():
        text = fill(text, f"{mark}: made by benchmark/study.py", part)
    page.write_text(text)


if __name__ == "__main__":
    args = tyro.cli(Args)
    run(args) if args.action == "run" else report()
