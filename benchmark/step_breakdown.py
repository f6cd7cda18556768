"""Where the time of a step goes, and how near the update comes to the machine's matrix products.

    python benchmark/step_breakdown.py                         about 7 minutes on 2 cores
    python benchmark/step_breakdown.py --quick                 a smaller step: 2 minutes
    python benchmark/step_breakdown.py --report out.json       of a report that is there already

A run of benchmark/fixed_work.py: SmolLM2-135M in bfloat16, 8 prompts x 8 responses of 128 tokens.
The table has every step; the JSON line at the end is of the last one, as the first ones warm up:
update_peak_fraction (FLOPs of forward and backward, as update_flops counts them, by the
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


# Matrix products only, 2 FLOPs a pair: norms, softmax and the optimiser cost memory traffic.


def layer_parameters(config) -> int:
    """Weights of the matrices of one Llama, Qwen2 or Qwen3 layer."""
    q, kv = attention_widths(config)
    attention = 2 * config.hidden_size * (q + kv)  # query and output; key and value
    return attention + 3 * config.hidden_size * config.intermediate_size


def attention_widths(config) -> tuple[int, int]:
    """Width of all query heads and of all key heads."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, config.num_key_value_heads * head_dim


def attention_flops(config, length: int) -> int:
    """Of one layer's forward on one sequence: q kᵀ and p v, the causal half of each."""
    return 2 * attention_widths(config)[0] * length**2


def update_flops(
    config,
    sequences: list[tuple[int, int]],
    vocab_size: int,
    checkpointing: bool,
    prefix: int = 0,
) -> dict[str, float]:
    """FLOPs of forward and backward over `sequences`, as common.Policy computes them, unpadded.

    The head works on response tokens only, and computes their logits twice (TokenLogprobs).
    Attention (flash) computes q kᵀ again in its backward. With checkpointing, so does every layer.

    Args:
        config: a transformers config of a Llama, Qwen2 or Qwen3 model.
        sequences: (context length, response length) of each.
        prefix: tokens that all contexts begin with and that are computed once (split_prefix).

    Returns:
        forward; backward (twice the forward) and recompute, which is no useful work.

    >>> from types import SimpleNamespace as Config
    >>> shape = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=2)
    >>> config = Config(**shape, num_attention_heads=2, num_key_value_heads=1)
    >>> update_flops(config, [(1, 1), (3, 2)], 10, checkpointing=False)
    {'forward': 4736, 'backward': 9472, 'recompute': 472}
    >>> update_flops(config, [(1, 1), (3, 2)], 10, checkpointing=True)["recompute"]
    4968
    >>> update_flops(config, [(1, 1), (3, 2)], 10, checkpointing=False, prefix=1)["forward"]
    4144
    """
    layers = config.num_hidden_layers
    again = len(sequences) - 1 if prefix else 0  # sequences that find the prefix computed
    tokens = sum(context + response for context, response in sequences) - again * prefix
    responses = sum(response for _, response in sequences)
    dense = 2 * layers * layer_parameters(config) * tokens
    attention = layers * sum(attention_flops(config, x + y) for x, y in sequences)
    attention -= layers * again * attention_flops(config, prefix)
    head = 2 * config.hidden_size * vocab_size * responses
    forward = dense + attention + head
    recompute = head + attention // 2 + (dense + attention if checkpointing else 0)
    return {"forward": forward, "backward": 2 * forward, "recompute": recompute}


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
