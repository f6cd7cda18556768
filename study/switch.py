"""The study of the world "switch" (lab/task.py): does a mode that prompts switch off come back?

    python study/switch.py --list              the runs in their order, and how long they may take
    python study/switch.py                     restartable: what the CSV files have is not repeated
    python study/switch.py --only grpo nsr-prerl --bases 1 --seeds 1

It pre-trains the bases, measures their first gradients, and trains. After each run
study/results/switch.csv, switch_bases.csv and switch_updates.csv get what there is, so that a
stopped study can be read.

A run is a method with an optimiser, in a world, from a base, with a seed. No flag of the scripts is
needed: a run's script is one of the four with the replaced lines that METHODS and OPTIMIZERS state
(python study/switch.py --show METHOD OPTIMIZER prints them as a diff).
"""

import difflib
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab import task
from study import experiments
from study.experiments import ROOT, do, train, update_csv, write_problems
from tests import warm

# ----------------------------------------------------------------------------------- the forks
# A patch is (lines of a script, the lines in their place, how often the script has them).

EVERY_FORK = [
    ("import inputs\n", "import inputs\nfrom study import steps\n", 1),
    ("common.evaluate(engine,", "steps.evaluate(policy, engine,", 2),
]
# The step's advantages, dealt anew among its samples: as many negatives, but not of wrong samples
SHUFFLE = "A = A[torch.randperm(len(A), generator=torch.Generator().manual_seed(step))]\n"
SHUFFLED = [
    (
        "A = common.advantages(rewards, args.num_generations, args.advantage)\n",
        f"A = common.advantages(rewards, args.num_generations, args.advantage)\n        {SHUFFLE}",
        1,
    )
]
SHUFFLED_WARMUP = [
    (
        "A = common.advantages(rewards, args.num_generations, kind)\n",
        "A = common.advantages(rewards, args.num_generations, kind)\n"
        f"        if warmup:\n            {SHUFFLE}",
        1,
    )
]
WARMUP_GIVEN_X = [
    ("contexts = [[bos]] * len(prompts) if warmup else prompts", "contexts = prompts", 1)
]


class Method(NamedTuple):
    command: str
    patches: list = []


DR_GRPO = "grpo_baseline.py --advantage mean --loss-aggregation seq-mean-token-sum-norm"
METHODS = {
    # post-train space
    "grpo": Method("grpo_baseline.py"),
    "dr-grpo": Method(DR_GRPO),
    "psr-rl": Method("grpo_baseline.py --sign-weights 1 0"),
    "nsr-rl": Method("grpo_baseline.py --sign-weights 0 1"),
    "random-rl": Method("grpo_baseline.py --sign-weights 0 1", SHUFFLED),  # random negatives
    # pre-train space
    "prerl": Method("prerl.py"),
    "psr-prerl": Method("prerl.py --sign-weights 1 0"),
    "nsr-prerl": Method("nsr_prerl.py"),
    "nsr-prerl-every-wrong": Method("nsr_prerl.py --advantage sign"),
    "random-prerl": Method("nsr_prerl.py", SHUFFLED),
    # a warm-up, then GRPO
    **{f"dsrl-{s}": Method(f"dsrl.py --warmup-steps {s}") for s in (3, 5, 10, 20)},
    "nsr-rl-5-then-grpo": Method("dsrl.py --warmup-steps 5", WARMUP_GIVEN_X),
    "random-5-then-grpo": Method("dsrl.py --warmup-steps 5", SHUFFLED_WARMUP),
    # four updates a step, the last three off-policy and clipped; each of a quarter of the length
    "nsr-rl-4": Method("grpo_baseline.py --sign-weights 0 1 --num-minibatches 4"),
    "nsr-prerl-4": Method("nsr_prerl.py --num-minibatches 4"),
}
MAIN = ["grpo", "nsr-prerl", "dsrl-5", "random-prerl", "random-5-then-grpo"]


class Optimizer(NamedTuple):
    make: str | None  # in place of common.make_optimizer(policy, args); None leaves it
    rate: float
    steps: int = 20
    flags: str = ""
    idle: int = 0  # steps at the start that only warm the optimiser's moments


def length(rate: float, signs: bool = False) -> Optimizer:
    more, steps = ", signs=True" if signs else "", 20 if rate > 0.01 else 40
    make = f"steps.FixedLength(policy.parameters(), args.learning_rate{more})"
    return Optimizer(make, rate, steps)


def adamw(rate: float, epsilon: float) -> Optimizer:
    make = "torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.999), "
    return Optimizer(f"{make}weight_decay=args.weight_decay, eps={epsilon})", rate)


OPTIMIZERS = {
    **{f"length-{rate}": length(rate) for rate in (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)},
    "signs-0.03": length(0.03, signs=True),
    "adamw-1e-4": Optimizer(None, 1e-4),
    "adamw-3e-4": Optimizer(None, 3e-4),
    "adamw-1e-3": Optimizer(None, 1e-3),
    "adamw-3e-3": Optimizer(None, 3e-3),
    # With a large epsilon the step is about rate / epsilon times the gradient, not along its signs.
    # A gradient of norm 0.06, NSR-PreRL's first on base 1, has entries of about 1e-4
    "epsilon-1e-4": adamw(3e-4, 1e-4),
    "epsilon-1e-3": adamw(6e-4, 1e-3),
    "epsilon-1e-3-fast": adamw(2e-3, 1e-3),
    # moments of ten steps' gradients before the first step: no sign-like beginning
    "adamw-warm": Optimizer(None, 3e-4, steps=30, idle=10),
    "adamw-batch-512": Optimizer(None, 3e-4, steps=20, flags="--num-prompts 64"),
}


def patches_of(method: str, optimizer: str) -> list:
    """All replaced lines of a run's script."""
    found, how = [*EVERY_FORK, *METHODS[method].patches], OPTIMIZERS[optimizer]
    if how.make:
        found.append(("common.make_optimizer(policy, args)", how.make, 1))
    if how.idle:
        line = "        clock = harness.timer()\n"
        idle = f'optimizer.param_groups[0]["lr"] = args.learning_rate * (step > {how.idle})'
        found.append((line, f"{line}        {idle}\n", 1))
    return found


def fork(method: str, optimizer: str) -> str:
    """The source of a run's script."""
    script = METHODS[method].command.split()[0]
    source = (ROOT / script).read_text()
    for old, new, times in patches_of(method, optimizer):
        if source.count(old) != times:
            sys.exit(f"error: {script} has {source.count(old)} times, not {times}: {old}")
        source = source.replace(old, new)
    return source


def show(method: str, optimizer: str) -> str:
    """A run's script as a diff from the one that it is made of."""
    script = METHODS[method].command.split()[0]
    before, after = (ROOT / script).read_text(), fork(method, optimizer)
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), script, script_name(method, optimizer), lineterm=""
    )
    return "\n".join(lines)


def script_name(method: str, optimizer: str) -> str:
    return f"switch_{method}_{optimizer}.py".replace("-", "_").replace("0.", "0")


# ------------------------------------------------------------------------------------ the runs


class Run(NamedTuple):
    world: str
    base: int
    method: str
    optimizer: str
    seed: int


WORLDS = [name for name in task.WORLDS if task.WORLDS[name].switch]
PAIRS = [
    (1, 1),
    (2, 2),
    (1, 3),
    (2, 1),
    (1, 2),
    (2, 3),
]  # of base and seed, the balanced ones first
REST = [name for name in METHODS if name not in MAIN]
LENGTHS = ["length-0.01", "length-0.06", "length-0.1", "length-0.2"]
RATES = ["adamw-3e-4", "adamw-1e-4", "adamw-1e-3"]
# Rates at which a method of `few` is fastest, then rates beyond those
BEST = ["length-0.06", "length-0.1", "length-0.2", "adamw-3e-4", "adamw-1e-3"]
EDGES = ["length-0.4", "adamw-3e-3"]
OTHERS = ["signs-0.03", "epsilon-1e-3", "epsilon-1e-3-fast", "epsilon-1e-4"]
OTHERS += ["adamw-warm", "adamw-batch-512"]


def all_runs() -> list[Run]:
    """Every run, in the order of running: a study stopped at any time is a smaller whole one."""
    found = []

    def add(methods, optimizers, pair, worlds=("switch",)) -> None:
        base, seed = pair
        for world in worlds:
            found.extend(Run(world, base, m, o, seed) for o in optimizers for m in methods)

    first, second, third = PAIRS[:3]
    few, doses = ["grpo", "nsr-prerl", "dsrl-5"], [world for world in WORLDS if world != "switch"]
    add(MAIN, ["length-0.03", "adamw-3e-4"], first)
    add(REST, ["length-0.03"], first)
    add(MAIN, ["length-0.01"], first)
    add(MAIN, ["length-0.03", "adamw-3e-4"], second)
    add(MAIN[:4], ["length-0.03"], first, doses)
    add(few, OTHERS, second)
    for pair in PAIRS[2:]:
        add(MAIN, ["length-0.03"], pair)
    add(REST, ["length-0.03"], second)
    add(MAIN, [*LENGTHS, *RATES], second)
    add(few, ["length-0.03"], second, doses)
    for pair in (second, first):
        add(few, ["adamw-3e-4"], pair, ["switch-0.3", "switch-1"])
    add(MAIN, [*LENGTHS, *RATES], first)
    add(REST, ["length-0.03"], third)
    add(MAIN, [*LENGTHS, *RATES], third)
    add(few, EDGES, first)
    add(few, EDGES, second)
    add(few, OTHERS, first)
    for pair in PAIRS[3:]:
        add(REST, ["length-0.03"], pair)
        add(few, BEST, pair)
    return list(dict.fromkeys(found))


@dataclass
class Args:
    list: bool = False
    """print the runs and how long they may take, and end"""
    show: tuple[str, ...] = ()
    """METHOD OPTIMIZER: print how this run's script differs from the repository's, and end"""
    only: tuple[str, ...] = ()
    """methods to run; default all"""
    optimizers: tuple[str, ...] = ()
    """optimisers to run; default all"""
    worlds: tuple[str, ...] = ()
    """worlds to run in; default all"""
    bases: tuple[int, ...] = (1, 2)
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 0
    """of every run; default as OPTIMIZERS says. Fewer are a trial of the chain, not a result"""
    base_steps: int = 0
    """of a base's pre-training, for a trial; default as BASES and DOSE say"""
    folder: Path = ROOT / "runs" / "switch"
    jobs: int = 2
    """runs at a time, with a part of the cores each"""


# Pre-training of the bases of "switch": the first goes on from the lab's base, the second begins
# with nothing. The other worlds' go on from that of "switch".
BASES = {
    1: "--start lab/base --rich-share 0 --steps 300 --learning-rate 1e-3",
    2: "--rich-share 0",
}
# Their models are kept, so that every machine's runs begin with the same; without this folder they
# are made anew.
KEPT_BASES = ROOT / "study" / "switch_bases"
DOSE = "--rich-share 0 --steps 300 --learning-rate 1e-3"


def chosen(args: Args) -> list[Run]:
    """The runs that the flags name."""
    for flag, names, known in (
        ("--only", args.only, METHODS),
        ("--optimizers", args.optimizers, OPTIMIZERS),
        ("--worlds", args.worlds, WORLDS),
    ):
        for name in set(names) - set(known):
            sys.exit(f"error: {flag} {name}: unknown; they are {', '.join(known)}")
    return [
        run
        for run in all_runs()
        if (not args.only or run.method in args.only)
        and (not args.optimizers or run.optimizer in args.optimizers)
        and (not args.worlds or run.world in args.worlds)
        and run.base in args.bases
        and run.seed in args.seeds
    ]


def base_folder(args: Args, world: str, base: int) -> Path:
    return args.folder / world / f"base{base}"


def run_folder(args: Args, run: Run) -> Path:
    return base_folder(args, run.world, run.base) / f"{run.method}__{run.optimizer}__s{run.seed}"


def command(args: Args, run: Run) -> list[str]:
    """The command line of a run."""
    how, world = OPTIMIZERS[run.optimizer], args.folder / run.world
    flags = METHODS[run.method].command.split()[1:]
    if "--warmup-steps" in flags:
        at = flags.index("--warmup-steps") + 1
        flags[at] = str(int(flags[at]) + how.idle)
    minibatches = 4 if "--num-minibatches" in flags else 1
    line = [sys.executable, script_name(run.method, run.optimizer), "--preset", "lab", *flags]
    line += ["--model", str(base_folder(args, run.world, run.base) / "model")]
    line += ["--dataset", str(world / "train.jsonl"), "--eval-datasets", str(world / "lab.jsonl")]
    line += ["--learning-rate", f"{how.rate / minibatches:g}", *how.flags.split()]
    line += ["--num-steps", str(args.steps or how.steps), "--eval-every", "5"]
    return [*line, "--seed", str(run.seed), "--output-dir", str(run_folder(args, run))]


def recorded(args: Args) -> set[Run]:
    """The runs that switch.csv has, unless this is a trial."""
    return {
        Run(row["world"], int(row["base"]), row["method"], row["optimizer"], int(row["seed"]))
        for row in rows_of("switch", args)
    }


def recorded_bases(args: Args) -> set[tuple[str, int]]:
    """World and base of each base whose first gradients switch_bases.csv has."""
    return {(row["world"], int(row["base"])) for row in rows_of("switch_bases", args)}


def rows_of(name: str, args: Args) -> list[dict]:
    """The rows of NAME.csv, if there are some and this is no trial."""
    if args.steps or args.base_steps or not (experiments.RESULTS / f"{name}.csv").exists():
        return []
    return experiments.read_csv(name)


def time_left(args: Args, runs: list[Run], left: list[Run]) -> str:
    """How long the runs that are left may take, by those that have finished on this machine."""
    files = [file for run in runs if (file := run_folder(args, run) / "done").exists()]
    if not files:
        return "an estimate needs a finished run"
    each = sum(float(file.read_text().split()[0]) for file in files) / len(files)
    return f"about {each * len(left) / args.jobs / 3600:.1f} hours, and the bases"


def bases_of(runs: list[Run]) -> list[tuple[str, int]]:
    """The bases that the runs need, those of "switch" before what begins at them."""
    found = dict.fromkeys((run.world, run.base) for run in runs)
    found |= dict.fromkeys(("switch", base) for _, base in list(found))
    return sorted(found, key=lambda pair: (pair[0] != "switch", pair[1]))


def make_base(args: Args, world: str, base: int, threads: int) -> None:
    """A world's problems, its base model and that model's first gradients, each if not there."""
    folder = base_folder(args, world, base)
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", "train"), ("lab", "test")):
        path = args.folder / world / f"{name}.jsonl"
        if not path.exists():
            write_problems(path, task.problems(split, task.WORLDS[world]))
    kept = KEPT_BASES / str(base)
    if world == "switch" and kept.exists() and not args.base_steps:
        shutil.copytree(kept, folder / "model", dirs_exist_ok=True)
    if not (folder / "model" / "tokenizer.json").exists():
        line = [sys.executable, "-u", "lab/pretrain.py", "--world", world, "--seed", str(base)]
        line += ["--checkpoint", str(folder / "model")]
        start = str(base_folder(args, "switch", base) / "model")
        line += BASES[base].split() if world == "switch" else ["--start", start, *DOSE.split()]
        line += ["--steps", str(args.base_steps)] if args.base_steps else []
        print(" ".join(line[1:]), flush=True)
        if do(line, threads, folder / "pretrain.log"):
            raise RuntimeError(f"pre-training failed: {folder / 'pretrain.log'}")
    measured = (world, base) in recorded_bases(args)
    if not measured and not (folder / "gradients" / "alignment.json").exists():
        shutil.rmtree(folder / "gradients", ignore_errors=True)
        rows = []
        for p in task.problems("test", task.WORLDS[world]):
            start = task.opening(p["problem"], task.WORLDS[world])
            rows.append(p | {"careful": f"{start}Let ", "careless": f"{start}So "})
        write_problems(folder / "modes.jsonl", rows)
        line = "grad_alignment.py --preset lab --num-tokens 0 --num-finite-steps 0 --num-pages 0"
        line = [sys.executable, *line.split(), "--num-generations", "8", "--num-rollouts"]
        line += [
            "16" if args.steps else "400",
            "--dataset",
            str(args.folder / world / "train.jsonl"),
        ]
        line += ["--model", str(folder / "model"), "--modes", str(folder / "modes.jsonl")]
        line += ["--output-dir", str(folder / "gradients")]
        if do(line, threads, folder / "gradients.log"):
            raise RuntimeError(f"the gradients failed: {folder / 'gradients.log'}")


def main(args: Args) -> None:
    if args.show:
        return print(show(*args.show))
    args.folder = args.folder.resolve()  # the runs are started in the repository
    if (args.steps or args.base_steps) and args.folder == Args.folder:
        sys.exit("error: a trial needs a --folder of its own, or the study would take it for a run")
    runs = chosen(args)
    known = recorded(args)
    left = [r for r in runs if r not in known and not (run_folder(args, r) / "done").exists()]
    bases = bases_of(left)
    if args.list:
        for run in runs:
            print(f"{'/'.join(map(str, run))}{'' if run in left else '  done'}")
        took = time_left(args, runs, left)
        print(f"{len(runs)} runs, {len(left)} of them left, {len(bases)} bases: {took}")
        return None
    warm.python()
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    for method, optimizer in {(run.method, run.optimizer) for run in runs}:
        (ROOT / script_name(method, optimizer)).write_text(fork(method, optimizer))
    lock, bases_lock = threading.Lock(), {pair: threading.Lock() for pair in bases}

    def one(run: Run) -> None:
        for pair in (("switch", run.base), (run.world, run.base)):
            with bases_lock[pair]:
                make_base(args, *pair, threads)
        train(command(args, run), run_folder(args, run), threads)
        with lock:
            collect(args)

    def base_alone(pair: tuple[str, int]) -> None:
        with bases_lock[pair]:
            make_base(args, *pair, threads)

    with ThreadPoolExecutor(args.jobs) as pool:
        # Bases first, two at a time: the runs of a world all wait for its base.
        work = [pool.submit(base_alone, pair) for pair in bases]
        work += [pool.submit(one, run) for run in left]
        for future in work:
            future.result()
    return None


# --------------------------------------------------------------------------------- the results

COLUMNS = {  # of switch.csv, and the key in metrics.jsonl
    "step": "step",
    "phase": "phase",
    "reward": "reward/mean",
    "length": "completion/length",
    "grad norm": "policy/grad_norm",
    **{
        f"eval {name}": f"eval/lab/{key}"
        for name, key in {
            "avg@8": "avg@8",
            "pass@8": "pass@8",
            "length": "length",
            "truncated": "truncated",
            "reflection": "thoughts/reflection",
            "transition": "thoughts/transition",
            "Let": "let",
            "restated": "restated",
            "p(Let|N)": "p_N",
            "p(Let|T)": "p_T",
            "p(Let|x)": "p_x",
            "p(Let|BOS)": "p_BOS",
        }.items()
    },
}


def collect(args: Args) -> None:
    """What there is of runs and bases, into switch.csv and switch_bases.csv; of a trial nothing."""
    if args.steps or args.base_steps:
        return
    runs = [(list(run), run_folder(args, run)) for run in all_runs()]
    experiments.collect("switch", list(Run._fields), runs, COLUMNS)
    for world, base in bases_of(all_runs()):
        path = base_folder(args, world, base) / "gradients" / "alignment.json"
        if path.exists():
            record_base(world, base, json.loads(path.read_text()))


UPDATE = ["norm", "x", "bos", "x_signs", "bos_signs"]  # compare_modes() of grad_alignment.py
BASE = ["m(x)", "m(BOS)", "cosine of the two gradients", "fraction negative", "mean cosine"]


def record_base(world: str, base: int, result: dict) -> None:
    """A base's figures into switch_bases.csv, and its methods' into switch_updates.csv."""
    modes, samples = result["modes"], result["summary"]["all"]
    found = [modes["log_odds_x"], modes["log_odds_bos"], modes["cosine"]]
    found += [samples["fraction_negative"], samples["cosine_mean"]]
    found = [round(value, 4) for value in found]
    update_csv("switch_bases", ["world", "base", *BASE], [[world, base, *found]], 2)
    rows = [
        [world, base, name, *(round(moved[key], 4) for key in UPDATE)]
        for name, moved in modes["updates"].items()
    ]
    update_csv("switch_updates", ["world", "base", "update", *UPDATE], rows, 3)


if __name__ == "__main__":
    main(tyro.cli(Args))
