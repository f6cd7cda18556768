"""The study's runs on a real language model: SmolLM2-135M-Instruct on few-shot arithmetic.

    python study/smollm.py       continues: finished runs are not repeated

Each run is one command line of a script, which is printed when it starts. At the end the program
writes the runs' metrics to study/results/smollm.csv and smollm_responses.csv, from which
study/report.py makes tables and a picture.
"""

import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from study import experiments
from tests import warm

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
    only: tuple[str, ...] = tuple(VARIANTS)
    """names of the variants to run"""
    seeds: tuple[int, ...] = (1,)
    """seeds of each variant"""
    folder: Path = experiments.ROOT / "runs" / "smollm"
    """folder of the runs"""
    jobs: int = 2
    """runs at the same time; they share the cores"""


def run(args: Args) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    warm.python()
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            for name in args.only:
                folder = args.folder / f"{name}__s{seed}"
                script, *flags = shlex.split(VARIANTS[name])
                line = [sys.executable, script, *FLAGS.split(), "--seed", str(seed), *flags]
                line += ["--output-dir", str(folder)]
                pool.submit(experiments.train, line, folder, threads)
    collect(args.folder)


def collect(folder: Path) -> None:
    """Write the metrics and some responses of the finished runs in `folder` to the CSV files."""
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
    experiments.update_csv("smollm", ["variant", "seed", *COLUMNS], rows, 2)
    header = ["variant", "seed", "step", "question", "response", "reward"]
    experiments.update_csv("smollm_responses", header, responses, 2)


def question(prompt: str) -> str:
    r"""The last user turn of a prompt in ChatML.

    >>> question("<|im_start|>user\nWhat is 6 * 2?<|im_end|>\n<|im_start|>assistant\n")
    'What is 6 * 2?'
    """
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def shown(sample: dict) -> tuple[str, float]:
    """A response in one line without its stop token, and its reward."""
    text = sample["response"].replace("<|im_end|>", "").strip().replace("\n", "⏎")
    return text + (" …" if sample["finish_reason"] == "length" else ""), sample["reward"]


if __name__ == "__main__":
    run(tyro.cli(Args))
