"""The study's runs: every method and ablation in the lab, three seeds each, and in other worlds.

    python study/experiments.py run                  continues: finished runs are not repeated
    python study/experiments.py run --only grpo dsrl-10 --seeds 1
    python study/experiments.py worlds               the same for WORLDS, pre-training included

Each run is one command line of a script, which is printed when it starts. At the end the program
writes the runs' metrics to study/results/*.csv, where they replace those of the same runs.
study/report.py makes tables and pictures from these files.
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
from typing import Literal

import pyarrow.parquet
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docs.generate import fork
from lab import task
from tests import warm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "study" / "results"

# The learning rate is the preset's, 3e-4: SWEEP says why.
VARIANTS = {
    # post-train space
    "grpo": "grpo_baseline.py",
    "dr-grpo": "grpo_baseline.py --advantage mean --loss-aggregation seq-mean-token-sum-norm",
    "no-std": "grpo_baseline.py --advantage mean",  # Dr.GRPO's advantage alone
    "rloo": "grpo_baseline.py --advantage rloo",
    "reinforce++": "grpo_baseline.py --advantage reinforce++",
    "psr-rl": "grpo_baseline.py --sign-weights 1 0",
    "nsr-rl": "grpo_baseline.py --sign-weights 0 1",
    "w-reinforce": "grpo_baseline.py --advantage sign --sign-weights 0.1 1",
    "grpo-microbatch-mean": "grpo_baseline.py --loss-aggregation microbatch-token-mean "
    "--max-tokens-per-microbatch 1024",
    # pre-train space
    "prerl": "prerl.py",
    "psr-prerl": "prerl.py --sign-weights 1 0",
    "nsr-prerl": "nsr_prerl.py",
    "nsr-prerl-every-wrong": "nsr_prerl.py --advantage sign",
    # both
    "dsrl-5": "dsrl.py --warmup-steps 5",
    "dsrl-10": "dsrl.py --warmup-steps 10",
    "dsrl-20": "dsrl.py --warmup-steps 20",
    "dsrl-40": "dsrl.py --warmup-steps 40",
    "nsr-rl-then-rl": "warmup_given_x.py --warmup-steps 10",  # a fork: write_forks()
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
WORLD_VARIANTS = {
    **VARIANTS,
    # a tenth of the positive half beside the negative one: does it hold a response's form?
    "prerl-positive-0.1": "prerl.py --sign-weights 0.1 1",
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

SAMPLES = ("restated", "correct", "correct for its own", "truncated", "Let")
KS = [1, 2, 4, 8, 16, 32, 64]


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["run", "worlds"]]
    """run the experiments in the lab, or those in WORLDS"""
    only: tuple[str, ...] = ()
    """names of the variants to run; default: all, the sweep first; with worlds: WORLD_METHODS"""
    worlds: tuple[str, ...] = tuple(WORLDS)
    """names of the worlds, with worlds"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each variant; the sweep has its own"""
    folder: Path = ROOT / "runs"
    """parent of the folders study and worlds, which hold the runs"""
    jobs: int = 2
    """runs at the same time; they share the cores"""


def commands(args: Args) -> list[tuple[str, int, list[str], Path]]:
    """(variant, seed, command line, output folder) of every run, in the order of running."""
    known = SWEEP | VARIANTS | GUARD
    for name in RECORDED:
        known.pop(name, None)
    for name in set(args.only) - set(known):
        sys.exit(f"error: --only {name}: no such variant; give some of {', '.join(known)}")
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


def warmup_given_x() -> str:
    """The source of dsrl.py with NSR-RL, which keeps x, as warm-up; docs/dsrl.md shows the line."""
    source = (ROOT / "dsrl.py").read_text()
    line = "contexts = [[bos]] * len(prompts) if warmup else prompts  # x^{1[s>S]}\n"
    if source.count(line) != 1:
        sys.exit(f"error: dsrl.py must have this line once: {line}")
    return source.replace(line, "contexts = prompts\n")


def write_forks() -> None:
    """Write the variants that no flag makes next to the scripts; git ignores these files."""
    (ROOT / "late.py").write_text(fork("late"))
    (ROOT / "warmup_given_x.py").write_text(warmup_given_x())


def write_problems(path: Path, problems: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def do(command: list[str], threads: int, log: Path) -> int:
    """Run a Python program in a fork of warm.py's server, which the main thread has started."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as file:
        command = [*warm.python(), *command[1:]]
        return subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file).returncode


def train(command: list[str], folder: Path, threads: int) -> None:
    """Make one run, unless it is finished already."""
    if (folder / "done").exists():
        return
    print(shlex.join(command[1:]), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.time()
    code = do(command, threads, log := folder.parent / f"{folder.name}.log")
    if code:
        print(f"failed with exit code {code}; see {log}", flush=True)
    else:
        (folder / "done").write_text(f"{time.time() - start:.0f} seconds\n")


def pass_at_64(folder: Path, threads: int) -> None:
    """Sample 64 responses of a run's final model to each hard problem, unless that is done."""
    output, log = folder / "pass64", folder.parent / f"{folder.name}.pass64.log"
    if (output / "results.json").exists() or not (folder / "done").exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    line = "evaluate.py --preset lab --num-samples 64 --datasets".split()
    line += [str(folder.parent / "hard.jsonl"), "--model", str(folder / "model")]
    code = do([sys.executable, *line, "--output-dir", str(output)], threads, log)
    if code:
        print(f"failed with exit code {code}; see {log}", flush=True)


def run(args: Args) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    write_forks()
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
    """Write the metrics of finished runs to NAME.csv, NAME_pass64.csv and NAME_samples.csv.

    Args:
        header: names of the columns that identify a run; the last two are variant and seed.
        runs: (values of these columns, folder) of each run.
        columns: names of further columns, and their keys in metrics.jsonl.
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
    if ends:
        update_csv(f"{name}_samples", [*header, *SAMPLES], ends, len(header))
    update_csv(name, [*header, *columns], rows, len(header))
    if finals:
        update_csv(f"{name}_pass64", [*header, *map(str, KS)], finals, len(header))


def last_samples(folder: Path) -> list[float]:
    """Fractions of the last step's training samples, as SAMPLES names them."""
    path = sorted((folder / "completions").glob("*.parquet"))[-1]
    counts = dict.fromkeys(SAMPLES, 0)
    samples = pyarrow.parquet.read_table(path).to_pylist()
    for row in samples:
        problem = row["prompt"].removeprefix("Q ").removesuffix(" A")
        own = stated(row["response"])
        counts["restated"] += own == problem
        # graded against the problem that the response itself restates
        answer = task.chain(int(own[:2]), int(own[3])) if own else []
        box = task.boxed_answer(row["response"])
        counts["correct for its own"] += bool(answer) and box == f"{answer[-1]:02d}"
        counts["correct"] += row["reward"] == 1
        counts["truncated"] += row["finish_reason"] == "length"
        counts["Let"] += ". Let " in row["response"]
    return [round(n / len(samples), 4) for n in counts.values()]


def stated(response: str) -> str | None:
    """The problem that a response restates or, without a restatement, the one that it solves.

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
    """Write `rows` to NAME.csv. Rows of other runs, by the first `keys` columns, are kept."""
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
        sys.exit(f"error: --worlds {name}: no such world; give some of {', '.join(WORLDS)}")
    known = WORLD_VARIANTS.keys() - RECORDED
    for name in set(args.only) - known:
        sys.exit(f"error: --only {name}: no such variant; give some of {', '.join(known)}")
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    write_forks()
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
    """Make a world's problems, base model, its metrics and its gradients, if they do not exist."""
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
    """The name of the held-out problems that are like a world's training problems."""
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
    """Write the metrics of the worlds' finished runs and bases to study/results/worlds*.csv."""
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
    """Metrics of a world's base: those of --measure, and those of grad_alignment.py."""
    lines = (folder / "measure.log").read_text().splitlines()
    measured = json.loads(next(line for line in lines if line.startswith("{")))
    result = json.loads((folder / "alignment" / "alignment.json").read_text())
    figures = {
        f"{split} {key}": measured[split][key]
        for split in ("test", "hard")
        for key in (
            "avg@8",
            "pass@8",
            "fraction of Let",
            "correct in So",
            "correct if Let is forced",
        )
    }
    everything = sum(token["norm_bos"] ** 2 for token in result["tokens"])
    # the tokens that x makes more than e times as likely
    fixed = [t for t in result["tokens"] if t["prob_x"] > math.e * t["prob_bos"]]
    figures["nats that x adds to a token"] = result["summary"]["all"]["logprob_difference_mean"]
    figures["tokens fixed by x"] = len(fixed) / len(result["tokens"])
    figures["their fraction of the squared gradient norm"] = (
        sum(t["norm_bos"] ** 2 for t in fixed) / everything
    )
    figures["mean cosine"] = result["summary"]["all"]["cosine_mean"]
    figures["fraction negative"] = result["summary"]["all"]["fraction_negative"]
    for name in ("PreRL", "NSR-PreRL", "NSR-RL"):
        figures[f"cosine of {name}"] = result["cosine_to_grpo"][name]
    return figures


def read_csv(name: str) -> list[dict]:
    with open(RESULTS / f"{name}.csv") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    args = tyro.cli(Args)
    warm.python()
    run(args) if args.action == "run" else run_worlds(args)
