"""Show where a step's time goes, and how close the update is to the machine's peak FLOP/s.

    python benchmark/step_breakdown.py --report out.json    the report of benchmark/fixed_work.py

The JSON line at the end describes the last step, as the first ones warm up. update_peak_fraction is
the update's FLOP/s (forward and backward; what is computed twice counts once) divided by that of
the fastest matrix product in the same run; update_mfu is divided by --peak. other_fraction is the
time outside of rollout and update. On a GPU there is also the memory in use at the end of the last
rollout and update (benchmark/hardware.py's two peaks), and around the last sleep and wakes.
"""

import json
from pathlib import Path

import tyro

PARTS = ("rollout", "verify", "canary", "update", "sync")


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
    """FLOPs of one layer's forward on one sequence: the causal halves of q kᵀ and p v."""
    return 2 * attention_widths(config)[0] * length**2


def update_flops(config, sequences: list[tuple[int, int]], vocab_size: int, prefix: int = 0) -> int:
    """FLOPs of forward and backward over `sequences`, as common.Policy needs them, unpadded.

    Only matrix products count: 2 FLOPs per multiplication and addition, and twice the forward's for
    the backward. What is computed twice counts once. The head computes response tokens only.

    Args:
        sequences: (context length, response length) of each; prefix: tokens that all contexts begin
            with and that are computed once (split_prefix).

    >>> from types import SimpleNamespace as Config
    >>> shape = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=2)
    >>> config = Config(**shape, num_attention_heads=2, num_key_value_heads=1)
    >>> update_flops(config, [(1, 1), (3, 2)], 10) // 3
    4736
    >>> update_flops(config, [(1, 1), (3, 2)], 10, prefix=1) // 3
    4144
    """
    layers = config.num_hidden_layers
    again = len(sequences) - 1 if prefix else 0  # sequences that find the prefix computed
    tokens = sum(context + response for context, response in sequences) - again * prefix
    dense = 2 * layers * layer_parameters(config) * tokens
    attention = layers * sum(attention_flops(config, x + y) for x, y in sequences)
    attention -= layers * again * attention_flops(config, prefix)
    head = 2 * config.hidden_size * vocab_size * sum(response for _, response in sequences)
    return 3 * (dense + attention + head)


def flops_of_last_step(report: dict) -> float:
    """FLOPs of forward and backward over the samples that the last step's update computed."""
    from transformers import AutoConfig, AutoTokenizer

    prompts, last = report["prompt_tokens"][-1], report["steps"][-1]
    each = last["policy/counted_samples"] // len(prompts)  # of a group; the same in all groups
    contexts = [1] * len(prompts) if last["phase"] == "pretrain" else prompts
    sequences = [(x, report["new_tokens"]) for x in contexts for _ in range(each)]
    config = AutoConfig.from_pretrained(report["model"])
    words = len(AutoTokenizer.from_pretrained(report["model"]))
    prefix = report["prefix_tokens"][-1]
    return update_flops(config, sequences, words, prefix)


def engine_figures(report: dict) -> dict:
    """Tokens/s of the last generate; on a GPU, GiB in use around the last sleep and wakes."""
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


def main(report: Path, peak: float = 0.0) -> None:
    """Print the table and a JSON line. `peak`: FLOP/s by the machine's data sheet, 0 if unknown."""
    found = json.loads(report.read_text())
    print(f"{'step':>4} {'whole':>8} " + " ".join(f"{part:>8}" for part in (*PARTS, "log ...")))
    for wall, row in zip(found["step_seconds"], found["steps"]):
        seconds = [row[f"time/{part}"] for part in PARTS]
        cells = [wall, *seconds, wall - sum(seconds)]
        print(f"{row['step']:4} " + " ".join(f"{cell:8.2f}" for cell in cells))
    wall, row = found["step_seconds"][-1], found["steps"][-1]
    rate = flops_of_last_step(found) / row["time/update"]
    result = {
        "update_peak_fraction": round(rate / found["matmul_flops"], 3),
        "update_mfu": round(rate / peak, 3) if peak else None,
        "sync_s": round(row["time/sync"], 3),
        "sync_fraction": round(row["time/sync"] / wall, 4),
        "other_fraction": round(1 - (row["time/rollout"] + row["time/update"]) / wall, 4),
        "rollout_tokens_per_s": round(row["throughput/rollout_tokens_per_s"]),
        "update_tokens_per_s": round(row["throughput/update_tokens_per_s"]),
        "matmul_gflops": round(found["matmul_flops"] / 1e9),
        "peak_gib": found["peak_gib"],
        "allocator_peak_gib": round(row["memory/peak_gib"], 2),
        "logprob_gap": row["sync/logprob_gap"],
    }
    print(json.dumps(result | engine_figures(found)))


if __name__ == "__main__":
    tyro.cli(main)
