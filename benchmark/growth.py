"""How the cost of a step grows: with responses, with their length, and on two ranks.

    python benchmark/growth.py --folder DIR    about 12 minutes on 2 cores
    python benchmark/growth.py --quick         fewer and smaller runs, under 5 minutes

Each point is a run of benchmark/fixed_work.py (SmolLM2-135M in bfloat16, prompts of about 270
tokens) and its last step counts, as the first ones warm up. Runs whose report is in --folder
already are not repeated. Rollout and update are fitted by a line each, least squares; an intercept
is what a step costs before the first response, or at no length. The last line is JSON; it is also
in DIR/growth.json, which benchmark/estimate.py --check reads.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("rollout", "verify", "canary", "update", "sync")


@dataclass
class Args:
    folder: str = ""
    """of the reports; default a temporary one"""
    script: str = "grpo_baseline.py"
    generations: int = 4
    """responses to each prompt"""
    prompts: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = (32, 64, 128, 256)
    """tokens of each response"""
    base: tuple[int, int] = (2, 128)
    """prompts while the length varies, and length while the prompts vary"""
    two_ranks_prompts: int = 4
    """prompts of the run on one rank and on two; 0 = no such run"""
    num_steps: int = 2
    quick: bool = False
    """1, 2 and 4 prompts, 2 responses each, of 32 tokens; and once of 96"""


def measure(args: Args, folder: Path, prompts: int, length: int, ranks: int) -> dict:
    """Seconds of the last step and its parts, from the report in `folder` or from a new run."""
    name = f"{Path(args.script).stem}-{prompts}x{args.generations}x{length}-r{ranks}"
    report = folder / f"{name}.json"
    if not report.exists():
        command = [sys.executable, "benchmark/fixed_work.py", args.script]
        command += ["--new-tokens", str(length), "--report", str(report.with_suffix(".partial"))]
        command += ["--num-prompts", str(prompts), "--num-generations", str(args.generations)]
        command += ["--num-steps", str(args.num_steps), "--num-processes", str(ranks)]
        with open(folder / f"{name}.log", "w") as log:
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
        report.with_suffix(".partial").rename(report)
    result = json.loads(report.read_text())
    last = result["steps"][-1]
    return {
        "prompts": prompts,
        "responses": prompts * args.generations,
        "length": length,
        "ranks": ranks,
        "prompt_tokens": result["prompt_tokens"][-1],
        "prefix_tokens": result["prefix_tokens"][-1],
        "step": result["step_seconds"][-1],
        **{part: last[f"time/{part}"] for part in PARTS},
        "matmul_flops": result["matmul_flops"],
    }


def line(x: list[float], y: list[float]) -> dict:
    """y ≈ intercept + slope x, and the largest relative miss.

    >>> line([1, 2, 3], [5, 7, 9])
    {'slope': 2.0, 'intercept': 3.0, 'miss': 0.0}
    """
    slope, intercept = (float(value) for value in np.polyfit(x, y, 1))
    miss = max(abs(intercept + slope * a - b) / b for a, b in zip(x, y))
    return {"slope": round(slope, 4), "intercept": round(intercept, 3), "miss": round(miss, 3)}


def main(args: Args) -> None:
    if args.quick:
        args.generations, args.prompts, args.lengths = 2, (1, 2, 4), (32, 96)
        args.base = (2, 32)
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    points = [(n, args.base[1], 1) for n in args.prompts]
    points += [(args.base[0], length, 1) for length in args.lengths]
    if args.two_ranks_prompts:
        points += [(args.two_ranks_prompts, args.base[1], ranks) for ranks in (1, 2)]
    runs = {}
    print("prompts  responses  length  ranks    step  " + "  ".join(f"{p:>7}" for p in PARTS))
    for point in dict.fromkeys(points):
        r = runs[point] = measure(args, folder, *point)
        print(
            f"{r['prompts']:7}  {r['responses']:9}  {r['length']:6}  {r['ranks']:5}  "
            f"{r['step']:6.1f}  " + "  ".join(f"{r[part]:7.2f}" for part in PARTS),
            flush=True,
        )
    by_responses = [runs[n, args.base[1], 1] for n in args.prompts]
    by_length = [runs[args.base[0], length, 1] for length in args.lengths]
    result = {
        "seconds_by_responses": {
            part: line([r["responses"] for r in by_responses], [r[part] for r in by_responses])
            for part in ("step", "rollout", "update")
        },
        "seconds_by_length": {
            part: line([r["length"] for r in by_length], [r[part] for r in by_length])
            for part in ("step", "rollout", "update")
        },
    }
    if args.two_ranks_prompts:
        one, two = (runs[args.two_ranks_prompts, args.base[1], ranks] for ranks in (1, 2))
        result["two_ranks_over_one"] = {
            part: round(two[part] / one[part], 3) for part in ("step", "rollout", "update", "sync")
        }
    (folder / "growth.json").write_text(json.dumps(result | {"runs": list(runs.values())}))
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
