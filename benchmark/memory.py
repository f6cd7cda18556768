"""Peak memory and time of one update, against vocabulary and tokens: our head and full logits.

    python benchmark/memory.py            # three vocabularies, three micro-batches; 16 GiB needed
    python benchmark/memory.py --quick    # 152k and 8k tokens only: under 5 minutes on 2 cores

A small random Qwen2 model makes one update (forward, backward, clipping, AdamW) on one micro-batch
with one of three heads:

    chunked         common.Policy, as the scripts train
    log_softmax     all logits at once, logits.float().log_softmax(-1).gather(y), by autograd
    cross_entropy   the same by torch's cross_entropy

The last two are spared the division by the temperature and work on response tokens only, as ours.
Each point is a process of its own. The peak is what the update needs above the model's own:
weights, gradients and AdamW's moments exist before, from an update on a few tokens. On a CPU it is
resident memory, on a GPU what the allocator handed out. The time is the best of --repeats updates.

The last line is JSON: peak_ratio_152k and time_ratio_152k are chunked over the better one of the
other two, at 152k and 8k tokens.
"""

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

GIB = 2**30
BAR_VOCAB, BAR_TOKENS = 152_064, 8192  # Qwen2.5-Math-7B's vocabulary


@dataclass
class Args:
    quick: bool = False
    """the bar's point only, without cross_entropy"""
    vocabs: tuple[int, ...] = (32_000, BAR_VOCAB, 256_000)
    tokens: tuple[int, ...] = (2048, 4096, BAR_TOKENS)
    """of responses in the micro-batch"""
    heads: tuple[str, ...] = ("chunked", "log_softmax", "cross_entropy")
    length: int = 1024
    """response tokens of each sequence"""
    hidden: int = 512
    layers: int = 4
    dtype: str = "float32"
    repeats: int = 2
    limit_gib: float = 16.0
    """points with full logits that would need more are left out"""


# ------------------------------------------------------------------------------------- the heads


def full_logits(policy, tokens, is_response):
    """Logits [n, V] and tokens [n] at the marked positions."""
    hidden = policy.lm.model(input_ids=tokens, use_cache=False).last_hidden_state
    marked = is_response[:, 1:]
    return policy.lm.lm_head(hidden[:, :-1][marked]).float(), tokens[:, 1:][marked]


def log_softmax(policy, tokens, is_response):
    logits, y = full_logits(policy, tokens, is_response)
    return logits.log_softmax(-1).gather(1, y[:, None])[:, 0]


def cross_entropy(policy, tokens, is_response):
    logits, y = full_logits(policy, tokens, is_response)
    return -F.cross_entropy(logits, y, reduction="none")


def chunked(policy, tokens, is_response):
    return policy(tokens, is_response)


# ----------------------------------------------------------------------------- one point, measured


def make_policy(vocab: int, args: Args, device):
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=args.hidden,
        intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
    )
    dtype = getattr(torch, args.dtype)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    return common.Policy(lm, vocab, temperature=1.0).train().to(device)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS is resident memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def memory(device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else status("VmRSS")


def reset_peak(device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS


def peak(device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def measure(head: str, vocab: int, tokens: int, args: Args) -> dict:
    """model_gib, peak_gib above it, and seconds of an update. Runs in a fresh process."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = make_policy(vocab, args, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def update(count: int, length: int) -> None:
        ids = torch.randint(vocab, (count, 1 + length), device=device)
        is_response = torch.ones_like(ids, dtype=torch.bool)
        is_response[:, 0] = False
        logp = globals()[head](policy, ids, is_response)
        (-logp.mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    update(1, 8)
    before = memory(device)
    reset_peak(device)
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        update(tokens // args.length, args.length)
        seconds.append(time.perf_counter() - start)
    own = sum(p.numel() * p.element_size() for p in policy.parameters()) * 4
    return {
        "head": head,
        "vocab": vocab,
        "tokens": tokens,
        "model_gib": own / GIB,
        "peak_gib": (peak(device) - before) / GIB,
        "seconds": min(seconds),
    }


# ------------------------------------------------------------------------------------- the table


def print_row(row: dict) -> None:
    print(
        f"{row['vocab']:>7}  {row['tokens']:>6}  {row['head']:13}  {row['model_gib']:9.2f}  "
        f"{row['peak_gib']:8.2f}  {row['seconds']:7.2f}",
        flush=True,
    )


def ratio(rows: list[dict], key: str) -> float:
    """Chunked over the better of the others, at the bar's point."""
    bar = [r for r in rows if (r["vocab"], r["tokens"]) == (BAR_VOCAB, BAR_TOKENS)]
    ours = [r[key] for r in bar if r["head"] == "chunked"]
    others = [r[key] for r in bar if r["head"] != "chunked"]
    return round(ours[0] / min(others), 3) if ours and others else float("nan")


def main(args: Args) -> None:
    if args.quick:
        args.vocabs, args.tokens, args.heads = (BAR_VOCAB,), (BAR_TOKENS,), args.heads[:2]
    print("  vocab  tokens  head           model GiB  peak GiB  seconds")
    rows = []
    for vocab in args.vocabs:
        for tokens in args.tokens:
            for head in args.heads:
                # Three float32 copies are alive in the backward
                if head != "chunked" and 3 * 4 * vocab * tokens > args.limit_gib * GIB:
                    continue
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    rows.append(pool.submit(measure, head, vocab, tokens, args).result())
                print_row(rows[-1])
    result = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": args.dtype,
        "peak_ratio_152k": ratio(rows, "peak_gib"),
        "time_ratio_152k": ratio(rows, "seconds"),
        "points": [{k: round(v, 3) if k != "head" else v for k, v in r.items()} for r in rows],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
