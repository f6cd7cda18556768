"""A step of grpo_baseline.py and nsr_prerl.py beside one of TRL's GRPOTrainer, on the same work.

    python benchmark/vs_trl.py
    python benchmark/vs_trl.py --quick     one smaller round, to see it run

Same weights (SmolLM2-135M-Instruct, bfloat16), prompts, group size and number of new tokens (EOS is
ignored), one AdamW update a step with the same learning rate, weight decay and gradient clipping,
no KL term, half of the samples negatives. The programs run one after the other, in turn, each with
all of the machine's cores; the first step of each run warms up and is not counted. Reports are kept
in --output: what is there already is not run again.

Ends with one JSON line: grpo_speedup and nsr_prerl_speedup (TRL's GRPO step / ours; more is better)
and memory_ratio (GRPO's peak / TRL's; less is better), from medians over all counted steps or runs.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import inputs  # noqa: E402
import workarounds  # noqa: E402
from lab import arithmetic, smollm2  # noqa: E402

TRL = "trl==1.16.0"
ENVIRONMENT = ROOT / ".venv-trl"
SCRIPTS = {"grpo": "grpo_baseline.py", "nsr_prerl": "nsr_prerl.py"}
Program = Literal["trl", "grpo", "nsr_prerl"]


@dataclass
class Args:
    rounds: int = 3
    """runs of each program"""
    programs: tuple[Program, ...] = ("trl", "grpo", "nsr_prerl")
    """those to run now; the table shows all that have reports"""
    num_steps: int = 3
    """a run; the first is not counted"""
    num_prompts: int = 8
    num_generations: int = 8
    new_tokens: int = 128
    learning_rate: float = 3e-6
    weight_decay: float = 0.0
    flags: str = ""
    """more flags for our two scripts"""
    output: Path = ROOT / "runs" / "vs_trl"
    """folder of the reports"""
    quick: bool = False
    """one round of 2 steps with 2 prompts and 64 new tokens, in a folder of its own"""


def trl_python() -> str:
    """The interpreter of TRL's environment, which is made on the first call.

    All that TRL shares with ours (torch, transformers, accelerate, datasets) has our versions.
    """
    python, ready = str(ENVIRONMENT / "bin" / "python"), ENVIRONMENT / f".{TRL}"
    if not ready.exists():
        print(f"making {ENVIRONMENT.name} with {TRL}: some minutes, once", flush=True)
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
    """The chats of our scripts' steps (--preset smollm, --seed 1), in their order."""
    from transformers import AutoTokenizer

    limits = SimpleNamespace(system_prompt="")
    tokenizer = AutoTokenizer.from_pretrained(model)
    train = inputs.encode_prompts(arithmetic.problems("train"), tokenizer, limits)
    steps = range(1, args.num_steps + 1)
    chosen = [p for s in steps for p in inputs.pick_problems(train, s, args.num_prompts, 1)]
    path.write_text("".join(json.dumps(p["problem"]) + "\n" for p in chosen))


def run(program: Program, report: Path, args: Args) -> None:
    """One run of a program, with its output in a .log beside the report."""
    shared = "num_steps num_prompts num_generations new_tokens"
    shared += " learning_rate weight_decay"
    flags = ["--report", str(report)]
    for name in shared.split():
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if program == "trl":
        model, prompts = smollm2.checkpoint(), report.with_suffix(".prompts.jsonl")
        write_prompts(prompts, model, args)
        command = [trl_python(), "benchmark/trl_grpo.py", "--model", model, "--prompts"]
        command += [str(prompts), *flags]
        environment = os.environ | workarounds.KEEP_MEMORY  # as our scripts do
    else:
        command = [sys.executable, "benchmark/fixed_work.py", SCRIPTS[program], *flags]
        command += args.flags.split()
        environment = os.environ
    log = report.with_suffix(".log")
    with open(log, "w") as file:
        failed = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file
        ).returncode
    if failed:
        sys.exit(f"{program} failed; the end of {log}:\n{log.read_text()[-2000:]}")


def summarize(folder: Path, cores: int) -> None:
    reports = {name: [] for name in ("trl", "grpo", "nsr_prerl")}
    for name, found in reports.items():
        found += [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]
    seconds, peak = {}, {}
    print(f"{'':10} {'runs':>4} {'steps':>5} {'median s':>9} {'least':>7} {'most':>7} {'GiB':>6}")
    for name, found in reports.items():
        if found:
            steps = [s for report in found for s in report["step_seconds"][1:]]
            seconds[name] = median(steps)
            peak[name] = median(report["peak_gib"] for report in found)
            print(
                f"{name:10} {len(found):4} {len(steps):5} {seconds[name]:9.2f} "
                f"{min(steps):7.2f} {max(steps):7.2f} {peak[name]:6.2f}"
            )
    if len(seconds) < len(reports):
        return
    result = {
        "grpo_speedup": round(seconds["trl"] / seconds["grpo"], 2),
        "nsr_prerl_speedup": round(seconds["trl"] / seconds["nsr_prerl"], 2),
        "memory_ratio": round(peak["grpo"] / peak["trl"], 3),
        "nsr_prerl_memory_ratio": round(peak["nsr_prerl"] / peak["trl"], 3),
        "step_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_gib": {name: round(value, 2) for name, value in peak.items()},
        "runs": {name: len(found) for name, found in reports.items()},
        "cores": cores,
        "versions": reports["trl"][-1]["versions"],
    }
    print(json.dumps(result))


def main(args: Args) -> None:
    if args.quick:
        args.rounds, args.num_steps, args.num_prompts, args.new_tokens = 1, 2, 2, 64
        args.output = args.output.with_name(args.output.name + "_quick")
        for old in args.output.glob("*.json"):
            old.unlink()
    args.output.mkdir(parents=True, exist_ok=True)
    for number in range(1, args.rounds + 1):
        for program in args.programs:
            report = args.output / f"{program}-{number}.json"
            if not report.exists():
                run(program, report, args)
                steps = json.loads(report.read_text())["step_seconds"]
                print(f"round {number}, {program}: {[round(s, 1) for s in steps]} s", flush=True)
    summarize(args.output, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main(tyro.cli(Args))
