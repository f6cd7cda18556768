"""Where the time of a step goes, and how near the update comes to the machine's matrix products.

    python benchmark/step_breakdown.py                         about 7 minutes on 2 cores
    python benchmark/step_breakdown.py --quick                 a smaller step: 2 minutes
    python benchmark/step_breakdown.py --report out.json       of a report that is there already

A run of benchmark/fixed_work.py: SmolLM2-135M in bfloat16, 8 prompts x 8 responses of 128 tokens.
The table has every step; the JSON line at the end is of the last one, as the first ones warm up:
update_peak_fraction (FLOPs of forward and backward, as benchmark/flops.py counts them, by the
update's seconds and the best matrix product of the same run; what is computed twice counts once),
sync_share, and other_share, all that is neither rollout nor update, by the wall clock;
generate_tokens_per_s, of the engine's generate alone. With --peak, update_mfu: the same FLOPs by
the update's seconds and that peak. On a GPU also the memory in use at the end of the last rollout
and update (benchmark/hardware.py's two peaks), before and after the last sleep, and before and
after the weights and the KV cache woke.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmark.flops import update_flops  # noqa: E402

PARTS = ("rollout", "verify", "canary", "update", "sync")


@dataclass
class Args:
    script: str = "grpo_baseline.py"
    report: str = ""
    """of fixed_work.py; without it the run is made"""
    num_steps: int = 3
    new_tokens: int = 128
    flags: str = ""
    """more flags for the script"""
    peak: float = 0.0
    """FLOP/s of the machine as its maker states it; 0 = no update_mfu"""
    quick: bool = False
    """2 steps of 2 prompts x 8 responses of 64 tokens"""


def make_report(args: Args) -> dict:
    report = Path(tempfile.mkdtemp()) / "report.json"
    command = [sys.executable, "benchmark/fixed_work.py", args.script, "--report", str(report)]
    command += ["--new-tokens", str(args.new_tokens), "--num-steps", str(args.num_steps)]
    subprocess.run([*command, *args.flags.split()], cwd=ROOT, check=True)
    return json.loads(report.read_text())


def flops_of_last_step(report: dict) -> float:
    """Of forward and backward over the samples that the last step's update computed."""
    from transformers import AutoConfig, AutoTokenizer

    prompts, last = report["prompt_tokens"][-1], report["steps"][-1]
    each = last["policy/counted_samples"] // len(prompts)  # of a group; the same in all groups
    contexts = [1] * len(prompts) if last["phase"] == "pretrain" else prompts
    sequences = [(x, report["new_tokens"]) for x in contexts for _ in range(each)]
    config = AutoConfig.from_pretrained(report["model"])
    words = len(AutoTokenizer.from_pretrained(report["model"]))
    prefix = report["prefix_tokens"][-1]
    flops = update_flops(config, sequences, words, checkpointing=False, prefix=prefix)
    return flops["forward"] + flops["backward"]


def engine_figures(report: dict) -> dict:
    """Speed of the last generate; on a GPU, used GiB before and after the last sleep and wakes."""
    last, result = {}, {}
    for call in report["engine_calls"]:
        moved = call["after_gib"] is not None and abs(call["after_gib"] - call["before_gib"])
        if call["call"] == "generate" or moved > 0.01:  # waking what is awake moves nothing
            last["_".join([call["call"], *(call["tags"] or [])])] = call
    generate = last.pop("generate")
    result["rollout_gib"], result["update_gib"] = generate["after_gib"], report["update_gib"][-1]
    result["generate_tokens_per_s"] = round(generate["tokens"] / generate["seconds"])
    for name, call in last.items():
        result[f"{name}_gib"] = [round(call["before_gib"], 2), round(call["after_gib"], 2)]
        result[f"{name}_s"] = round(call["seconds"], 3)
    return result


def main(args: Args) -> None:
    if args.quick:
        args.num_steps, args.new_tokens, args.flags = 2, 64, args.flags + " --num-prompts 2"
    report = json.loads(Path(args.report).read_text()) if args.report else make_report(args)
    print(f"{'step':>4} {'whole':>8} " + " ".join(f"{part:>8}" for part in (*PARTS, "log ...")))
    for wall, row in zip(report["step_seconds"], report["steps"]):
        seconds = [row[f"time/{part}"] for part in PARTS]
        cells = [wall, *seconds, wall - sum(seconds)]
        print(f"{row['step']:4} " + " ".join(f"{cell:8.2f}" for cell in cells))
    wall, row = report["step_seconds"][-1], report["steps"][-1]
    rate = flops_of_last_step(report) / row["time/update"]
    result = {
        "update_peak_fraction": round(rate / report["matmul_flops"], 3),
        "update_mfu": round(rate / args.peak, 3) if args.peak else None,
        "sync_s": round(row["time/sync"], 3),
        "sync_share": round(row["time/sync"] / wall, 4),
        "other_share": round(1 - (row["time/rollout"] + row["time/update"]) / wall, 4),
        "rollout_tokens_per_s": round(row["throughput/rollout_tokens_per_s"]),
        "update_tokens_per_s": round(row["throughput/update_tokens_per_s"]),
        "matmul_gflops": round(report["matmul_flops"] / 1e9),
        "peak_gib": report["peak_gib"],
        "allocator_peak_gib": round(row["memory/peak_gib"], 2),
        "logprob_gap": row["sync/logprob_gap"],
    } | engine_figures(report)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
