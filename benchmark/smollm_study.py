"""The four methods on a real language model: SmolLM2-135M-Instruct on few-shot arithmetic.

    python benchmark/smollm_study.py run       restartable: done runs are not repeated
    python benchmark/smollm_study.py report    docs/study/smollm.png and tables, from the CSV files

Each run is one command line of a script, printed as it starts. `run` ends by writing
benchmark/results/smollm.csv and smollm_responses.csv; `report` needs these files only.
"""

import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import pyarrow.parquet
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plot
from benchmark import study
from docs.generate import fill

FLAGS = (
    "--preset smollm --dtype bfloat16 --num-steps 40 --learning-rate 1e-5 "
    "--max-completion-length 48 --eval-every 10"
)
VARIANTS = {
    "grpo": "grpo_baseline.py",
    "prerl": "prerl.py",
    "nsr-prerl": "nsr_prerl.py",
    "dsrl-5": "dsrl.py --warmup-steps 5",
}
COLUMNS = {  # of the CSV file, and the key in metrics.jsonl
    "step": "step",
    "phase": "phase",
    "reward": "reward/mean",
    "solve_none": "reward/solve_none",
    "length": "completion/length",
    "truncated": "completion/truncated",
    "entropy": "policy/entropy",
    "logprob": "policy/logprob",
    "reflection": "thoughts/reflection",
    "transition": "thoughts/transition",
    "avg@4": "eval/arithmetic/avg@4",
    "pass@4": "eval/arithmetic/pass@4",
}
SHOWN = 4  # samples of a step in smollm_responses.csv: the first of each of the first groups


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["run", "report"]]
    only: tuple[str, ...] = tuple(VARIANTS)
    """names of the variants to run"""
    seeds: tuple[int, ...] = (1,)
    folder: Path = study.ROOT / "runs" / "smollm"
    """of the runs"""
    jobs: int = 2
    """runs at a time, with a part of the cores each"""


def run(args: Args) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            for name in args.only:
                folder = args.folder / f"{name}__s{seed}"
                script, *flags = shlex.split(VARIANTS[name])
                line = [sys.executable, script, *FLAGS.split(), "--seed", str(seed), *flags]
                line += ["--output-dir", str(folder)]
                pool.submit(study.train, line, folder, threads)
    collect(args.folder)


def collect(folder: Path) -> None:
    """What the runs in `folder` measured, and some of their responses, into the CSV files."""
    rows, responses = [], []
    for path in sorted(folder.glob("*/done")):
        name, _, seed = path.parent.name.rpartition("__s")
        for line in (path.parent / "metrics.jsonl").read_text().splitlines():
            values = [json.loads(line).get(key) for key in COLUMNS.values()]
            values = [round(v, 4) if isinstance(v, float) else v for v in values]
            rows.append([name, seed, *values])
        for parquet in sorted((path.parent / "completions").glob("*.parquet")):
            samples = pyarrow.parquet.read_table(parquet).to_pylist()
            prompts = list(dict.fromkeys(s["prompt"] for s in samples))
            for prompt in prompts[:SHOWN]:
                first = next(s for s in samples if s["prompt"] == prompt)
                step = int(parquet.stem.removeprefix("step_"))
                responses.append([name, seed, step, question(prompt), *shown(first)])
    study.update_csv("smollm", ["variant", "seed", *COLUMNS], rows, 2)
    header = ["variant", "seed", "step", "question", "response", "reward"]
    study.update_csv("smollm_responses", header, responses, 2)


def question(prompt: str) -> str:
    r"""The last user turn of a prompt in ChatML.

    >>> question("<|im_start|>user\nWhat is 6 * 2?<|im_end|>\n<|im_start|>assistant\n")
    'What is 6 * 2?'
    """
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def shown(sample: dict) -> tuple[str, float]:
    """A response in one line without its end mark, and its reward."""
    text = sample["response"].replace("<|im_end|>", "").strip().replace("\n", "⏎")
    return text + (" …" if sample["finish_reason"] == "length" else ""), sample["reward"]


# -------------------------------------------------------------------------------------- the report


def table(runs: dict) -> str:
    """Held-out accuracy, and the training samples by tens of steps; seeds are averaged."""
    steps = sorted({r["step"] for seeds in runs.values() for rows in seeds.values() for r in rows})
    tens = [range(first, first + 10) for first in range(1, int(steps[-1]), 10)]
    header = ["", "avg@4, 0 → end", "pass@4, 0 → end"]
    header += [f"reward, steps {ten[0]}–{ten[-1]}" for ten in tens]
    header += ["length, 1 → end", "truncated, end", "entropy, 1 → end", "log π, 1 → end"]
    header += ["reflections per response, most in a step", "transitions"]
    lines = []
    for name, seeds in runs.items():
        ends = list(seeds.values())

        def both(column: str, first: int, digits: int = 3) -> str:
            begin = mean(study.at(rows, column, first) for rows in ends)
            end = mean(study.last(rows, column) for rows in ends)
            return f"{begin:.{digits}f} → {end:.{digits}f}"

        rewards = [
            mean(r["reward"] for rows in ends for r in rows if r["step"] in ten) for ten in tens
        ]
        truncated = mean(study.last(rows, "truncated") for rows in ends)
        lines.append([f"`{name}`", both("avg@4", 0), both("pass@4", 0)])
        lines[-1] += [f"{reward:.3f}" for reward in rewards]
        lines[-1] += [both("length", 1, 1), f"{truncated:.2f}"]
        lines[-1] += [both("entropy", 1, 2), both("logprob", 1, 2)]
        lines[-1] += [
            f"{max(r.get(column, 0) for rows in ends for r in rows):.3f}"
            for column in ("reflection", "transition")
        ]
    return study.markdown(header, lines)


def responses_table() -> str:
    """The kept responses of the first seed: of the base model once, and of each method's end."""
    rows = study.read_csv("smollm_responses")
    seed = min(row["seed"] for row in rows)
    first = next(iter(VARIANTS))
    lines = []
    for row in rows:
        if row["seed"] != seed or (row["step"] == "1" and row["variant"] != first):
            continue
        name = "before" if row["step"] == "1" else f"`{row['variant']}`, step {row['step']}"
        response = row["response"].replace("|", "\\|")
        right = "yes" if float(row["reward"]) else "no"
        lines.append([name, row["question"], f"`{response}`", right])
    lines.sort(key=lambda line: line[0] != "before")
    return study.markdown(["", "question", "response", "right"], lines)


def report() -> None:
    runs = {name: {} for name in VARIANTS}
    for row in study.read_csv("smollm"):
        name, seed = row.pop("variant"), int(row.pop("seed"))
        runs[name].setdefault(seed, []).append(study.numbers(row))
    curves = ["reward", "length", "entropy", "avg@4", "pass@4"]
    groups = {}
    for name, seeds in runs.items():
        args = {"script": VARIANTS[name].partition(".py")[0], "warmup_steps": 5}
        groups[name] = [
            (args, [{"step": r["step"]} | {COLUMNS[c]: r.get(c) for c in curves} for r in rows])
            for rows in seeds.values()
        ]
    plot.draw_panels(groups, study.PICTURES / "smollm.png")
    page = study.ROOT / "docs" / "study.md"
    text = page.read_text()
    for mark, part in {"smollm": table(runs), "responses": responses_table()}.items():
        text = fill(text, f"{mark}: made by benchmark/smollm_study.py", part)
    page.write_text(text)


if __name__ == "__main__":
    args = tyro.cli(Args)
    report() if args.action == "report" else run(args)
