"""The study: every method and ablation in the lab, three seeds each, and some in other worlds.

    python benchmark/study.py run                  restartable: done runs are not repeated
    python benchmark/study.py run --only grpo dsrl-10 --seeds 1
    python benchmark/study.py worlds               the same for WORLDS, pre-training included
    python benchmark/study.py report               docs/study/*.png and tables, from the CSV files

Each run is one command line of a script, printed as it starts. `run` and `worlds` end by putting
their runs into benchmark/results/*.csv, in the place of the same runs there; `report` needs these
files only, not the runs.
"""

import csv
import dataclasses
import json
import math
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
from docs.generate import fill, fork
from lab import task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
PICTURES = ROOT / "docs" / "study"

# The learning rate is the preset's, 3e-4: see SWEEP.
VARIANTS = {
    # post-train space
    "grpo": "grpo_baseline.py",
    "dr-grpo": "grpo_baseline.py --advantage mean --loss-aggregation seq-mean-token-sum-norm",
    "no-std": "grpo_baseline.py --advantage mean",  # Dr.GRPO's advantage alone
    "rloo": "grpo_baseline.py --advantage rloo",
    "reinforce++": "grpo_baseline.py --advantage reinforce++",
    "psr-rl": "grpo_baseline.py --negative-weight 0",
    "nsr-rl": "grpo_baseline.py --positive-weight 0",
    "w-reinforce": "grpo_baseline.py --advantage sign --positive-weight 0.1",
    "grpo-microbatch-mean": "grpo_baseline.py --loss-aggregation microbatch-token-mean "
    "--max-tokens-per-microbatch 1024",
    # pre-train space
    "prerl": "prerl.py",
    "psr-prerl": "prerl.py --negative-weight 0",
    "nsr-prerl": "nsr_prerl.py",
    "nsr-prerl-every-wrong": "nsr_prerl.py --advantage sign",
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
# Recorded with revision 79819ce, whose scripts had these flags; their rows stay in the CSV files.
RECORDED = {"grpo-microbatch-mean", "dsrl-10-reset", "dsrl-10-two-rates"}
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

# Each differs from the lab, the study above, in one thing: its corpus (WORLDS of lab/task.py), the
# seed of its base, or, in "harder", the problems: 6 to 8 steps. With the flags of its pre-training;
# most go on from the lab's base, which takes a quarter of the time.
GO_ON = "--start lab/base --rich-share 0 --steps 500 --learning-rate 1e-3"
WORLDS = {
    "lab": ("lab", None),
    "short": ("short", GO_ON),
    "down": ("down", GO_ON),
    "tag": ("tag", GO_ON),
    "paired": ("paired", ""),
    "rare": ("rare", GO_ON),
    "sloppy": ("sloppy", GO_ON),
    "seed2": ("lab", "--seed 2"),
    "harder": ("lab", None),
}
WORLD_METHODS = ("grpo", "nsr-prerl", "dsrl-10", "nsr-rl-then-rl")
SHOWN = ("grpo", "prerl", "nsr-prerl", "nsr-prerl-late", "dsrl-10")
SHOWN += ("prerl-positive-0.1", "nsr-rl-then-rl", "grpo-1e-3", "dsrl-10-two-rates")
WORLD_VARIANTS = {
    **VARIANTS,
    # a tenth of the positive half beside the negative one: does it hold a response's form?
    "prerl-positive-0.1": "prerl.py --positive-weight 0.1",
    # each space at its own: the warm-up's best rate without a collapse, then RL's best
    "dsrl-10-two-rates": "dsrl.py --warmup-learning-rate 3e-4 --learning-rate 1e-3 "
    "--warmup-steps 10",
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

WORLD_COLUMNS = COLUMNS | {"cosine": "alignment/cosine_to_grpo"}
del WORLD_COLUMNS["seconds"]  # the worlds' runs shared the machine

SAMPLES = ("restated", "right", "right for its own", "truncated", "Let")
KS = [1, 2, 4, 8, 16, 32, 64]
THRESHOLDS = (0.5, 0.8, 0.9)
FIGURES = {
    "methods": ["grpo", "prerl", "nsr-prerl", "dsrl-10"],
    "signs": ["psr-rl", "nsr-rl", "psr-prerl", "nsr-prerl", "nsr-prerl-every-wrong"]
    + ["nsr-prerl-late"],
    "warmup": ["grpo", "dsrl-5", "dsrl-10", "dsrl-20", "dsrl-40", "nsr-rl-then-rl"],
    "baselines": ["grpo", "dr-grpo", "no-std", "rloo", "reinforce++", "w-reinforce", "dsrl-10"],
    "long": ["grpo-1e-3", "prerl-1e-3"],
    "details": ["grpo", "grpo-microbatch-mean", "dsrl-10", "dsrl-10-reset"],
}


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["run", "worlds", "report"]]
    """run the experiments in the lab or in WORLDS, or draw the tables and figures from
    benchmark/results/*.csv"""
    only: tuple[str, ...] = ()
    """names of the variants to run; default all, the sweep first; in worlds: WORLD_METHODS"""
    worlds: tuple[str, ...] = tuple(WORLDS)
    """with worlds: those to run"""
    seeds: tuple[int, ...] = (1, 2, 3)
    folder: Path = ROOT / "runs"
    """of the folders study and worlds, which hold the runs"""
    jobs: int = 2
    """runs at a time, with a part of the cores each"""


def commands(args: Args) -> list[tuple[str, int, list[str], Path]]:
    """(variant, seed, command line, output folder) of every run, in the order of running."""
    known = SWEEP | VARIANTS | GUARD
    for name in RECORDED:
        known.pop(name, None)
    for name in set(args.only) - set(known):
        sys.exit(f"error: --only {name}: no such variant; they are {', '.join(known)}")
    hard = args.folder / "study" / "hard.jsonl"
    write_problems(hard, task.problems("hard"))
    common = ["--preset", "lab", "--eval-every", "10", "--eval-datasets", "lab", str(hard)]
    found = []
    for group, seeds in ((SWEEP, (SWEEP_SEED,)), (VARIANTS, args.seeds), (GUARD, args.seeds)):
        for seed in seeds:
            for name, command in group.items():
                if name in RECORDED or (args.only and name not in args.only):
                    continue
                folder = args.folder / "study" / f"{name}__s{seed}"
                script, *flags = shlex.split(command)
                line = [sys.executable, script, *common, "--seed", str(seed), *flags]
                found.append((name, seed, [*line, "--output-dir", str(folder)], folder))
    return found


def write_problems(path: Path, problems: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))


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
    (ROOT / "late.py").write_text(fork("late"))
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
    every = commands(dataclasses.replace(args, only=()))
    runs = [([name, seed], folder) for name, seed, _, folder in every]
    collect("study", ["variant", "seed"], runs, COLUMNS)


def collect(name: str, header: list[str], runs: list[tuple[list, Path]], columns: dict) -> None:
    """What the runs measured, into NAME.csv, NAME_pass64.csv, NAME_samples.csv.

    A run is the values of the columns `header`, of which the last two are its variant and seed, and
    a folder.
    """
    rows, finals, ends = [], [], []
    for label, folder in runs:
        if not (folder / "done").exists():
            continue
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            values = [metrics.get(key) for key in columns.values()]
            values = [round(v, 4) if isinstance(v, float) else v for v in values]
            rows.append([*label, *values])
        if (folder / "pass64" / "results.json").exists():
            hard = json.loads((folder / "pass64" / "results.json").read_text())["hard"]
            finals.append([*label, *(round(hard[f"pass@{k}"], 4) for k in KS)])
        if label[-2] in WORLD_VARIANTS:
            ends.append([*label, *last_samples(folder)])
    update_csv(f"{name}_samples", [*header, *SAMPLES], ends, len(header))
    update_csv(name, [*header, *columns], rows, len(header))
    if finals:
        update_csv(f"{name}_pass64", [*header, *map(str, KS)], finals, len(header))


def last_samples(folder: Path) -> list[float]:
    """Of the last step's training samples: the shares that SAMPLES names."""
    path = sorted((folder / "completions").glob("*.parquet"))[-1]
    counts = dict.fromkeys(SAMPLES, 0)
    samples = pyarrow.parquet.read_table(path).to_pylist()
    for row in samples:
        problem = row["prompt"].removeprefix("Q ").removesuffix(" A")
        own = stated(row["response"])
        counts["restated"] += own == problem
        # judged by the problem that the response itself restates
        answer = task.chain(int(own[:2]), int(own[3])) if own else []
        box = task.boxed_answer(row["response"])
        counts["right for its own"] += bool(answer) and box == f"{answer[-1]:02d}"
        counts["right"] += row["reward"] == 1
        counts["truncated"] += row["finish_reason"] == "length"
        counts["Let"] += ". Let " in row["response"]
    return [round(n / len(samples), 4) for n in counts.values()]


def stated(response: str) -> str | None:
    """The problem that a response restates; without a restatement, the one that it solves.

    >>> stated(" Compute 81#3. So 1:81 odd 44; "), stated(" Compute 81#3#042. So 1:81 odd 44; ")
    ('81#3', '81#3#042')
    >>> stated(". So 1:81 odd 44; 2:44 even 22; 3:22 even 11; "), stated(". So So ")
    ('81#3', None)
    >>> stated(". So 3:81 odd 44; 2:44 even 22; 1:22 even 11; ")
    '81#3'
    """
    if found := re.match(r" Compute (\d\d#\d(?:#\d{3})?)\. ", response):
        return found[1]
    if not (first := re.match(r"\. \w+ (\d):(\d\d) ", response)):
        return None
    count = first[1] if first[1] != "1" else re.findall(r"(\d):\d\d ", response)[-1]
    return f"{first[2]}#{count}"


def update_csv(name: str, header: list[str], rows: list[list], keys: int) -> None:
    """Write `rows` to NAME.csv. What it has of other runs, by the first `keys` columns, stays."""
    new = {tuple(map(str, row[:keys])) for row in rows}
    path = RESULTS / f"{name}.csv"
    kept = read_csv(name) if path.exists() else []
    kept = [[row.get(column, "") for column in header] for row in kept]
    kept = [row for row in kept if tuple(row[:keys]) not in new]
    rows = sorted([*kept, *rows], key=lambda row: tuple(map(str, row[:keys])))
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


# ---------------------------------------------------------------------------------- the worlds


def run_worlds(args: Args) -> None:
    for name in set(args.worlds) - set(WORLDS):
        sys.exit(f"error: --worlds {name}: no such world; they are {', '.join(WORLDS)}")
    known = WORLD_VARIANTS.keys() - RECORDED
    for name in set(args.only) - known:
        sys.exit(f"error: --only {name}: no such variant; they are {', '.join(known)}")
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    (ROOT / "late.py").write_text(fork("late"))
    with ThreadPoolExecutor(args.jobs) as pool:
        for work in [pool.submit(make_base, world, args, threads) for world in args.worlds]:
            work.result()
        runs = [
            (world, name, seed)
            for seed in args.seeds
            for world in args.worlds
            for name in args.only or (WORLD_METHODS if world != "lab" else ())
        ]
        work = [pool.submit(train_in_world, *run, args, threads) for run in runs]
        for future in work:
            future.result()
    collect_worlds(args)


def base_of(world: str, args: Args) -> Path:
    made = WORLDS[world][1] is not None
    return args.folder / "worlds" / world / "base" if made else ROOT / "lab" / "base"


def make_base(world: str, args: Args, threads: int) -> None:
    """A world's problems, its base model, that model's figures and gradients, each if not there."""
    folder, base = args.folder / "worlds" / world, base_of(world, args)
    corpus, flags = WORLDS[world]
    kinds = {"train": ["train"], "lab": ["test"], "hard": ["hard"]}
    if world == "harder":  # of 6 to 8 steps: what is left of the corpus's, all but the held-out
        kinds["train"].append("long")
    for name, splits in kinds.items():
        problems = [p for split in splits for p in task.problems(split, task.WORLDS[corpus])]
        if world == "harder" and name == "train":
            problems = [p for p in problems if int(p["problem"][5]) >= 6]
        write_problems(folder / f"{name}.jsonl", problems)
    pretrain = [sys.executable, "-u", "lab/pretrain.py", "--world", corpus]
    pretrain += ["--checkpoint", str(base)]
    if not (base / "tokenizer.json").exists():
        do([*pretrain, *flags.split()], threads, folder / "pretrain.log")
    if not (log := folder / "measure.log").exists() or "| figure |" not in log.read_text():
        do([*pretrain, "--measure"], threads, log)
    if not (folder / "alignment" / "alignment.json").exists():
        shutil.rmtree(folder / "alignment", ignore_errors=True)
        line = "grad_alignment.py --preset lab --num-tokens 1000 --num-finite-steps 0".split()
        line += ["--dataset", str(folder / f"{held_out(world)}.jsonl"), "--model", str(base)]
        line += ["--output-dir", str(folder / "alignment")]
        do([sys.executable, *line], threads, folder / "alignment.log")


def held_out(world: str) -> str:
    """The held-out problems that are like a world's training problems."""
    return "hard" if world == "harder" else "lab"


def train_in_world(world: str, name: str, seed: int, args: Args, threads: int) -> None:
    folder = args.folder / "worlds" / world
    script, *flags = shlex.split(WORLD_VARIANTS[name])
    line = [sys.executable, script, "--preset", "lab", "--model", str(base_of(world, args))]
    line += ["--dataset", str(folder / "train.jsonl"), "--eval-every", "10", "--eval-datasets"]
    line += [str(folder / "lab.jsonl"), str(folder / "hard.jsonl"), "--seed", str(seed), *flags]
    line += ["--alignment-every", "10"] if script == "nsr_prerl.py" else []
    output = folder / f"{name}__s{seed}"
    train([*line, "--output-dir", str(output)], output, threads)


def collect_worlds(args: Args) -> None:
    """What is there of the worlds' runs and bases, into benchmark/results/worlds*.csv."""
    runs, bases = [], []
    for world in WORLDS:
        folder = args.folder / "worlds" / world
        for name in WORLD_VARIANTS:
            for path in sorted(folder.glob(f"{name}__s*[0-9]")):
                runs.append(([world, name, int(path.name.rpartition("__s")[2])], path))
        if (folder / "alignment" / "alignment.json").exists():
            bases.append([world, *(round(v, 4) for v in base_figures(folder).values())])
    collect("worlds", ["world", "variant", "seed"], runs, WORLD_COLUMNS)
    if bases:
        header = list(base_figures(args.folder / "worlds" / bases[0][0]))
        update_csv("worlds_bases", ["world", *header], bases, 1)


def base_figures(folder: Path) -> dict[str, float]:
    """Of a world's base: --measure's, and how far the gradients of log π(y) are fixed by x."""
    lines = (folder / "measure.log").read_text().splitlines()
    measured = json.loads(next(line for line in lines if line.startswith("{")))
    result = json.loads((folder / "alignment" / "alignment.json").read_text())
    figures = {
        f"{split} {key}": measured[split][key]
        for split in ("test", "hard")
        for key in ("avg@8", "pass@8", "share of Let", "right in So", "right if Let is forced")
    }
    everything = sum(token["norm_bos"] ** 2 for token in result["tokens"])
    # the tokens that x makes more than e times as likely
    fixed = [t for t in result["tokens"] if t["prob_x"] > math.e * t["prob_bos"]]
    figures["nats that x adds to a token"] = result["summary"]["all"]["logprob_difference_mean"]
    figures["tokens fixed by x"] = len(fixed) / len(result["tokens"])
    figures["their share of the squared gradient norm"] = (
        sum(t["norm_bos"] ** 2 for t in fixed) / everything
    )
    figures["mean cosine"] = result["summary"]["all"]["cosine_mean"]
    figures["share negative"] = result["summary"]["all"]["share_negative"]
    for name in ("PreRL", "NSR-PreRL", "NSR-RL"):
        figures[f"cosine of {name}"] = result["cosine_to_grpo"][name]
    return figures


# ---------------------------------------------------------------------------------- the report


def read_results() -> tuple[dict, dict]:
    """{variant: {seed: rows}} of study.csv, {variant: [pass@k by k, for each seed]}."""
    runs, finals = {}, {}
    for row in read_csv("study"):
        name, seed = row.pop("variant"), int(row.pop("seed"))
        runs.setdefault(name, {}).setdefault(seed, []).append(numbers(row))
    for row in read_csv("study_pass64"):
        finals.setdefault(row["variant"], []).append({k: float(row[str(k)]) for k in KS})
    return runs, finals


def read_worlds(lab_runs: dict) -> dict:
    """{world: {variant: {seed: rows}}} of worlds.csv; "lab" is completed by the study's."""
    runs = {world: {} for world in WORLDS} | {"lab": dict(lab_runs)}
    for row in read_csv("worlds"):
        world, name, seed = row.pop("world"), row.pop("variant"), int(row.pop("seed"))
        runs[world].setdefault(name, {}).setdefault(seed, []).append(numbers(row))
    return runs


def read_csv(name: str) -> list[dict]:
    with open(RESULTS / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def numbers(row: dict) -> dict:
    """A row's values as numbers, without those that are missing."""
    return {k: v if k == "phase" else float(v) for k, v in row.items() if v}


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
    rows, lines = read_csv("study_samples"), []
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        cells = [" ".join(f"{float(row[key]):.2f}" for row in own) or "-" for key in SAMPLES]
        lines.append([f"`{name}`", *cells])
    return markdown(["variant (each seed)", *SAMPLES], lines)


def bases_table() -> str:
    """A column a world: its base model, and the gradients of that model's responses."""
    rows = sorted(read_csv("worlds_bases"), key=lambda row: list(WORLDS).index(row["world"]))
    lines = [
        [key, *(f"{float(row[key]):.3f}" for row in rows)] for key in rows[0] if key != "world"
    ]
    return markdown(["base", *(f"`{row['world']}`" for row in rows)], lines)


def worlds_table(runs: dict) -> str:
    """The methods in each world, on held-out problems like those of training; each seed's value."""
    header = ["world", "method", "step 20", "end", "steps to 0.5", "steps to 0.8"]
    header += ["reflections × at 20", "transitions × at 20", "hard avg@8 and pass@8, step 10"]
    header += ["restated, last step"]
    samples = read_csv("worlds_samples")
    samples += [{"world": "lab", **row} for row in read_csv("study_samples")]
    lines = []
    for world in WORLDS:
        on = held_out(world)
        for name in [name for name in WORLD_VARIANTS if name in SHOWN and runs[world].get(name)]:
            seeds = list(runs[world][name].values())
            curves = [points(rows, f"{on} avg@8") for rows in seeds]
            times = {
                column: [(at(rows, column, 20), at(rows, column, 0)) for rows in seeds]
                for column in (f"{on} reflection", f"{on} transition")
            }
            own = [row for row in samples if (row["world"], row["variant"]) == (world, name)]
            line = [
                each([at(rows, f"{on} avg@8", 20) for rows in seeds]),
                each([curve[-1][1] for curve in curves]),
                *(each([plot.reached(c, t) for c in curves], 0) for t in THRESHOLDS[:2]),
                *(each([a / b if b else None for a, b in pairs], 1) for pairs in times.values()),
                f"{each([at(rows, 'hard avg@8', 10) for rows in seeds])}, "
                f"{each([at(rows, 'hard pass@8', 10) for rows in seeds])}",
                each([float(row["restated"]) for row in own]),
            ]
            lines.append([f"`{world}`", f"`{name}`", *line])
    return markdown(header, lines)


def each(values: list[float | None], digits: int = 2) -> str:
    """The seeds' values.

    >>> each([0.5, None, 0.975]), each([])
    ('0.50 - 0.97', '')
    """
    return " ".join("-" if v is None else f"{v:.{digits}f}" for v in values)


def draw_worlds(runs: dict) -> None:
    """Held-out avg@8, a panel a world, to docs/study/worlds.png by plot.py."""
    groups = {}
    for name in ("grpo", "prerl", "nsr-prerl", "dsrl-10", "nsr-prerl-late"):
        by_seed = {}
        for world in WORLDS:
            for seed, rows in runs[world].get(name, {}).items():
                for step, value in points(rows, f"{held_out(world)} avg@8"):
                    line = by_seed.setdefault(seed, {}).setdefault(step, {"step": step})
                    line[f"eval/{world}/avg@8"] = value
        flags = VARIANTS[name].split()
        args = {"script": flags[0].removesuffix(".py"), "warmup_steps": 10}
        groups[name] = [(args, list(lines.values())) for lines in by_seed.values()]
    plot.draw_panels(groups, PICTURES / "worlds.png")


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


def draw_pass_against_avg(worlds: dict) -> None:
    """Every evaluation below the ceiling: pass@8 against avg@8 on `hard`, by method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {
        "GRPO, PreRL (both signs)": r"grpo|prerl|sweep-(grpo_baseline|prerl)-.*",
        "positive half": r"psr-(rl|prerl)",
        "negative half, with x": r"nsr-rl",
        "negative half, without x": r"nsr-prerl.*|sweep-nsr_prerl-.*",
        "DSRL": r"dsrl-\d+|sweep-dsrl-.*",
    }
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for i, (label, pattern) in enumerate(kinds.items()):
        found = [
            (row["hard avg@8"], row["hard pass@8"])
            for variants in (worlds["lab"], worlds["harder"])
            for name, seeds in variants.items()
            for rows in seeds.values()
            for row in rows
            if re.fullmatch(pattern, name) and "hard avg@8" in row and 0 < row["step"] <= 30
        ]
        axis.scatter(*zip(*found), color=plot.COLOURS[i], marker="o^sDv"[i], s=22, label=label)
    axis.set_xlim(0.15, 0.7)
    axis.set_ylim(0.6, 1.02)
    axis.set_xlabel("avg@8, problems of 6 to 8 steps")
    axis.set_ylabel("pass@8")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(PICTURES / "pass_against_avg.png", dpi=100)
    plt.close(figure)


def report() -> None:
    """Pictures to docs/study/, and the tables of docs/study.md between their marks."""
    runs, finals = read_results()
    PICTURES.mkdir(parents=True, exist_ok=True)
    curves = ["lab avg@8", "hard avg@8", "length", "entropy", "reflection", "transition"]
    for picture, names in FIGURES.items():
        draw(runs, names, picture, curves)
    worlds = read_worlds(runs)
    draw_worlds(worlds)
    draw_pass_against_avg(worlds)
    page = ROOT / "docs" / "study.md"
    text = page.read_text()
    for mark, part in {
        "accuracy": accuracy_table(runs, finals),
        "shape": shape_table(runs),
        "sweep": sweep_table(runs),
        "samples": samples_table(),
        "guard": guard_table(runs),
        "bases": bases_table(),
        "worlds": worlds_table(worlds),
    }.items():
        text = fill(text, f"{mark}: made by benchmark/study.py", part)
    page.write_text(text)


if __name__ == "__main__":
    args = tyro.cli(Args)
    {"run": run, "worlds": run_worlds, "report": lambda args: report()}[args.action](args)
