"""Compare a step of grpo_baseline.py and nsr_prerl.py with one of TRL's GRPOTrainer.

    python benchmark/vs_trl.py --rounds 3

All have the same weights (SmolLM2-135M-Instruct, bfloat16), prompts, group size and number of new
tokens (EOS is ignored). A step is one AdamW update with the same learning rate, weight decay and
gradient clipping, without a KL term; half of the samples are negatives. The programs run one after
the other with all of the machine's cores. The first step of a run warms up and is not counted.
Reports that are in --output already are not made again. Ends with a JSON line: for each program the
medians of step seconds and peak GiB, speedup (TRL's seconds / ours) and memory (our peak / TRL's).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import inputs  # noqa: E402
import workarounds  # noqa: E402
from lab import arithmetic, smollm2  # noqa: E402

TRL = "trl==1.16.0"
ENVIRONMENT = ROOT / ".venv-trl"
PROGRAMS = {"trl": "trl_grpo.py", "grpo": "grpo_baseline.py", "nsr_prerl": "nsr_prerl.py"}


@dataclass
class Args:
    rounds: int = 3
    """number of runs of each program"""
    num_steps: int = 3
    """steps of a run; the first is not counted"""
    num_prompts: int = 8
    num_generations: int = 8
    new_tokens: int = 128
    output: Path = ROOT / "runs" / "vs_trl"
    """folder of the reports"""


def trl_python() -> str:
    """The interpreter of TRL's environment; the first call makes the environment.

    Packages that both need (torch, transformers, accelerate, datasets) have our versions.
    """
    python, ready = str(ENVIRONMENT / "bin" / "python"), ENVIRONMENT / f".{TRL}"
    if not ready.exists():
        pins = ROOT / "requirements-cpu.txt"
        torch = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        if subprocess.run([*pip, torch]).returncode:  # as in the Makefile: uv finds the CPU build
            subprocess.run([*pip, "uv"], check=True)
            uv = [str(ENVIRONMENT / "bin" / "uv"), "pip", "install", "--python", python]
            subprocess.run([*uv, "--no-deps", "--torch-backend=cpu", torch], check=True)
        subprocess.run([*pip, TRL, torch, "tyro", "-c", str(pins)], check=True)
        ready.touch()
    return python


def write_prompts(path: Path, model: str, args: Args) -> None:
    """Write the chats of our scripts' steps (--preset smollm, --seed 1) in their order."""
    from transformers import AutoTokenizer

    limits = SimpleNamespace(system_prompt="")
    tokenizer = AutoTokenizer.from_pretrained(model)
    train = inputs.encode_prompts(arithmetic.problems("train"), tokenizer, limits)
    steps = range(1, args.num_steps + 1)
    chosen = [p for s in steps for p in inputs.pick_problems(train, s, args.num_prompts, 1)]
    path.write_text("".join(json.dumps(p["problem"]) + "\n" for p in chosen))


def run(program: str, report: Path, args: Args) -> None:
    """One run of a program, with its output in a .log beside the report."""
    flags = ["--report", str(report), "--learning-rate", "3e-6", "--weight-decay", "0"]
    for name in ("num_steps", "num_prompts", "num_generations", "new_tokens"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ
    if program == "trl":
        model, prompts = smollm2.checkpoint(), report.with_suffix(".prompts.jsonl")
        write_prompts(prompts, model, args)
        command = [trl_python(), "benchmark/trl_grpo.py", "--model", model]
        command += ["--prompts", str(prompts), *flags]
        environment = os.environ | workarounds.KEEP_MEMORY  # as our scripts do
    else:
        command = [sys.executable, "benchmark/fixed_work.py", PROGRAMS[program], *flags]
    log = report.with_suffix(".log")
    with open(log, "w") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if done.returncode:
        sys.exit(f"error: {program} failed; {log} ends with:\n{log.read_text()[-2000:]}")


def summarize(folder: Path) -> dict:
    """The JSON line, from the reports in the folder."""
    result = {}
    for name in PROGRAMS:
        reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-?.json"))]
        steps = [s for report in reports for s in report["step_seconds"][1:]]
        peak = median(report["peak_gib"] for report in reports)
        result[name] = {"runs": len(reports), "steps": [round(s, 2) for s in steps]}
        result[name] |= {"seconds": round(median(steps), 2), "peak_gib": round(peak, 2)}
        result[name]["speedup"] = round(result["trl"]["seconds"] / median(steps), 2)
        result[name]["memory"] = round(peak / result["trl"]["peak_gib"], 3)
    return result | {"cores": len(os.sched_getaffinity(0))}


def main(args: Args) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    for number in range(1, args.rounds + 1):
        for program in PROGRAMS:
            report = args.output / f"{program}-{number}.json"
            if not report.exists():
                run(program, report, args)
                print(f"round {number}: {program} is done", flush=True)
    print(json.dumps(summarize(args.output)))


if __name__ == "__main__":
    main(tyro.cli(Args))
