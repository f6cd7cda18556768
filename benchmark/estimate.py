"""What a step costs, on paper: rollout, update and sync of a model on a node of GPUs.

    python benchmark/estimate.py                          the two models on 8 H100, authors' batch
    python benchmark/estimate.py --gpus 4 --update-mfu 0.3
    python benchmark/estimate.py --check DIR/growth.json  against the CPU runs of growth.py

Bytes and FLOPs follow from the models' shapes; every rate is a flag, and a guess unless a GPU was
measured. The rollout is a roofline, one decode step after the other: an engine reads its weights or
multiplies by them, whichever takes longer, and reads its KV cache. --check fits the update's and
the decode's rates, with a fixed cost each, on the runs of two sizes, and predicts all the others
with the same formulas. Its last line is JSON.
"""

import heapq
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.flops import attention_flops, layer_parameters, update_flops  # noqa: E402
from benchmark.hardware import MODELS, Shape  # noqa: E402

SMOLLM2 = Shape(30, 576, 1536, 9, 3, 64, 49152, True, False, 8192)
RESPONSES = {"Qwen2.5-Math-7B": 800, "Qwen3-4B": 2500}  # mean length. A guess


@dataclass
class Args:
    models: tuple[str, ...] = ("Qwen2.5-Math-7B", "Qwen3-4B")
    check: str = ""
    """growth.json of benchmark/growth.py"""

    # The step
    prompts: int = 128
    generations: int = 8
    prompt_length: int = 150
    response_length: int = 0
    """mean; 0 = 800 for Qwen2.5-Math-7B, 2500 for Qwen3-4B. Lengths are spread exponentially"""
    max_response_length: int = 8192
    negatives: float = 0.5
    """share of the samples that NSR-PreRL's update counts"""
    microbatch: int = 16384
    """tokens"""

    # The machine: 8 H100 SXM
    gpus: int = 8
    tp: int = 1
    """GPUs of one engine"""
    peak: float = 989e12
    """bfloat16 FLOP/s of a GPU, dense"""
    bandwidth: float = 3.35e12
    """bytes/s of a GPU's memory"""
    gather: float = 200e9
    """bytes/s that a GPU receives in an all-gather over NVLink"""

    # How well it is used
    update_mfu: float = 0.4
    """share of the peak in the update, FLOPs that are computed twice counted twice"""
    prefill_mfu: float = 0.5
    decode_mfu: float = 0.5
    decode_bandwidth: float = 0.6
    """share of the bandwidth while decoding"""
    decode_overhead: float = 0.005
    """seconds of a decode step beside the model: scheduler and sampler"""
    kv_share: float = 0.35
    """share of a GPU's 80e9 bytes for the KV cache"""
    sleep_wake: float = 3.0
    """seconds a step: the engine's weights to host memory and back, allocator"""
    verify: float = 3.0
    """seconds a step, of which --check takes none"""


# ---------------------------------------------------------------------------------- counting work


def config(m: Shape) -> SimpleNamespace:
    """Under the names of a transformers config."""
    return SimpleNamespace(
        hidden_size=m.hidden,
        intermediate_size=m.intermediate,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_dim,
    )


def weights(m: Shape) -> int:
    """Parameters that a decoded token is multiplied by."""
    return m.layers * layer_parameters(config(m)) + m.vocab * m.hidden


def kv_bytes(m: Shape) -> int:
    """Of one token: bfloat16 keys and values."""
    return 4 * m.layers * m.kv_heads * m.head_dim


def spread(mean: float, count: int, longest: int) -> list[int]:
    """Lengths at the quantiles of an exponential distribution, cut at `longest`, in random order.

    >>> sorted(spread(100, 4, 200))
    [13, 47, 98, 200]
    """
    quantiles = (np.arange(count) + 0.5) / count
    lengths = np.clip(-mean * np.log(1 - quantiles), 1, longest).astype(int)
    return np.random.default_rng(0).permutation(lengths).tolist()


def decode_work(m: Shape, prompt: int, lengths: list[int], slots: int) -> tuple:
    """Of one engine with at most `slots` sequences at a time: live sequences and cached tokens.

    Returns:
        [steps] each. A sequence that ends makes room for the next one.

    >>> decode_work(SMOLLM2, 10, [2, 3, 1], slots=2)
    (array([2, 2, 2]), array([22, 24, 24]))
    """
    ends, spans = [], []
    for length in lengths:
        start = heapq.heappop(ends) if len(ends) >= slots else 0
        heapq.heappush(ends, start + length)
        spans.append((start, length))
    live = np.zeros(max(ends), dtype=int)
    cached = np.zeros_like(live)
    for start, length in spans:
        live[start : start + length] += 1
        cached[start : start + length] += prompt + 1 + np.arange(length)
    return live, cached


def decode_flops(m: Shape, live, cached) -> np.ndarray:
    """Of each decode step: the weights for each live sequence, and attention to the cache."""
    return 2 * weights(m) * live + 4 * m.layers * m.heads * m.head_dim * cached


def prefill_flops(m: Shape, prompt: int) -> int:
    """Of one prompt, which its samples share."""
    c = config(m)
    return m.layers * (2 * layer_parameters(c) * prompt + attention_flops(c, prompt))


# --------------------------------------------------------------------------- the estimate for GPUs


def estimate(name: str, args: Args) -> dict:
    """Figures of a step by label, in the order of the table."""
    m = MODELS[name]
    longest = min(args.max_response_length, m.context - 1024)
    mean = args.response_length or RESPONSES[name]
    count, engines = args.prompts * args.generations, args.gpus // args.tp
    lengths = spread(mean, count, longest)

    # Rollout: every engine has its share of the samples
    own = lengths[::engines]
    capacity = args.kv_share * 80e9 * args.tp / kv_bytes(m)  # tokens
    slots = int(capacity / (args.prompt_length + np.mean(lengths)))
    live, cached = decode_work(m, args.prompt_length, own, slots)
    read = args.decode_bandwidth * args.bandwidth * args.tp
    dense = np.maximum(
        2 * weights(m) / read, 2 * weights(m) * live / (args.decode_mfu * args.peak * args.tp)
    )
    decode = (dense + cached * kv_bytes(m) / read + args.decode_overhead).sum()
    prefill = args.prompts * prefill_flops(m, args.prompt_length)
    rollout = decode + prefill / (args.prefill_mfu * args.peak * args.gpus)

    # Sync: bfloat16, one parameter at a time; a GPU has its shard already
    gathered = 2 * m.parameters
    missing = (args.gpus - 1) / args.gpus
    sync = missing * gathered / args.gather + 2 * gathered / args.bandwidth

    figures = {
        "parameters, 10^9": m.parameters / 1e9,
        "response tokens": sum(lengths),
        "mean response": float(np.mean(lengths)),
        "decode steps": len(live),
        "sequences at once, an engine": min(slots, len(own)),
        "prefill, PFLOP": prefill / 1e15,
        "bytes gathered a sync, 10^9": gathered / 1e9,
        "rollout, s": rollout,
        "sleep and wake, s": args.sleep_wake,
        "verify, s": args.verify,
        "sync, s": sync,
    }
    fixed = rollout + args.sleep_wake + args.verify + sync
    for method, context, share in (("GRPO", args.prompt_length, 1), ("NSR", 1, args.negatives)):
        sequences = [(context, length) for length in lengths[: round(share * count)]]
        flops = update_flops(config(m), sequences, m.vocab, checkpointing=True)
        compute = sum(flops.values()) / (args.update_mfu * args.peak * args.gpus)
        # FSDP gathers the weights twice a micro-batch and reduces float32 gradients once
        batches = np.ceil(sum(map(sum, sequences)) / args.gpus / args.microbatch)
        traffic = batches * missing * (2 * gathered + 4 * m.parameters) / args.gather
        optimizer = 28 * m.parameters / args.gpus / args.bandwidth  # reads and writes of AdamW
        update = max(compute, traffic) + optimizer  # FSDP fetches the next layer meanwhile
        for part, value in flops.items():
            figures[f"{method} update, {part}, PFLOP"] = value / 1e15
        figures[f"{method} update, FSDP traffic, s (hidden)"] = traffic
        figures[f"{method} update, s"] = update
        figures[f"{method} step, s"] = fixed + update
    return figures


def print_table(columns: dict[str, dict]) -> None:
    """Markdown, a column a model."""
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for label in next(iter(columns.values())):
        values = [column[label] for column in columns.values()]
        cells = [f"{v:,.0f}" if v >= 100 or isinstance(v, int) else f"{v:.2f}" for v in values]
        print(f"| {label} | {' | '.join(cells)} |")


# -------------------------------------------------------------------------- the check on CPU runs


def work(run: dict) -> dict[str, tuple[float, float]]:
    """(how often the fixed cost is paid, FLOPs) of each part of a run."""
    m, c = SMOLLM2, config(SMOLLM2)
    prompts, length = run["prompt_tokens"], run["length"]
    each = run["responses"] // len(prompts)
    sequences = [(prompt, length) for prompt in prompts for _ in range(each)]
    shared = run["prefix_tokens"]
    update = update_flops(c, sequences, m.vocab, checkpointing=False, prefix=shared)
    mean = round(np.mean(prompts))
    live, cached = decode_work(m, mean, [length] * run["responses"], slots=256)
    decode = decode_flops(m, live, cached).sum()
    scored = update_flops(c, sequences[:: max(1, len(sequences) // 4)][:4], m.vocab, False)
    return {
        "update": (1, sum(update.values())),
        "rollout": (len(live), decode + sum(prefill_flops(m, prompt) for prompt in prompts)),
        "canary": (0, scored["forward"]),
        "sync": (1, 0),
    }


def fit(parts: list[tuple[float, float]], seconds: list[float]) -> np.ndarray:
    """(seconds each time, seconds a FLOP) that explain `seconds` best, relatively; none negative.

    >>> fit([(1, 10), (1, 20)], [7, 12]).round(3)
    array([2. , 0.5])
    """
    a = np.array(parts, dtype=float)
    scale = np.maximum(a.max(0), 1e-30)
    relative = a / scale / np.array(seconds)[:, None]
    answer = np.linalg.lstsq(relative, np.ones(len(a)), rcond=None)[0]
    if (answer < 0).any():  # the other one explains more than all
        answer = np.where(answer < 0, 0, 1 / np.maximum(relative.mean(0), 1e-30))
    return answer / scale


def check(path: str) -> None:
    """Fit on two of the runs of one length, predict every other run."""
    runs = json.loads(Path(path).read_text())["runs"]
    single = [run for run in runs if run["ranks"] == 1]
    usual = max({r["length"] for r in single}, key=lambda t: sum(r["length"] == t for r in single))
    sizes = sorted((r for r in single if r["length"] == usual), key=lambda r: r["responses"])
    fitted = [sizes[0], sizes[len(sizes) // 2]]
    rates, peak = {}, fitted[0]["matmul_flops"]
    for part in ("update", "rollout", "canary", "sync"):
        rates[part] = fit([work(run)[part] for run in fitted], [run[part] for run in fitted])
        fixed, per_flop = rates[part]
        used = f", {1 / per_flop / peak:.0%} of the best matrix product" if per_flop else ""
        print(f"{part}: {fixed:.3f} s each time{used}")
    print("responses  length  ranks  " + "".join(f"{p:>22}" for p in ("rollout", "update", "step")))
    misses = []
    for run in runs:
        predicted = {part: rates[part] @ amount for part, amount in work(run).items()}
        predicted["step"] = sum(predicted.values())
        cells = [
            f"{predicted[p]:7.2f} /{run[p]:6.2f} {predicted[p] / run[p]:5.2f}"
            for p in ("rollout", "update", "step")
        ]
        kind = "fitted" if run in fitted else "held out" if run["ranks"] == 1 else "not counted"
        print(
            f"{run['responses']:9}  {run['length']:6}  {run['ranks']:5}  "
            + "".join(f"{cell:>22}" for cell in cells)
            + f"  {kind}"
        )
        if kind == "held out":
            misses.append(
                {p: abs(predicted[p] / run[p] - 1) for p in ("rollout", "update", "step")}
            )
    worst = {p: round(max(miss[p] for miss in misses), 3) for p in misses[0]}
    print(json.dumps({"held_out_runs": len(misses), "largest_miss": worst}))


def main(args: Args) -> None:
    if args.check:
        return check(args.check)
    columns = {name: estimate(name, args) for name in args.models}
    print_table(columns)
    print(json.dumps({name: {k: round(v, 3) for k, v in c.items()} for name, c in columns.items()}))


if __name__ == "__main__":
    main(tyro.cli(Args))
