"""Measure memory and time of an update with three heads: our chunked one and full logits.

    python benchmark/memory.py    vocabulary 152,064, 8,192 tokens: takes 16 GiB and minutes

A small random Qwen2 model makes one update (forward, backward, clipping, AdamW) on one micro-batch
with one of three heads: common.Policy's in chunks, or all logits at once with log_softmax or with
torch's cross_entropy, by autograd. The last two do not divide by the temperature and, like ours,
compute response tokens only. Each head runs in its own process. The peak is the memory above
weights, gradients and AdamW's moments, which a small update allocates before. On a CPU it is
resident memory, on a GPU memory from the allocator. The time is the best of --repeats.

Ends with a JSON line: peak_ratio and time_ratio are ours divided by the better of the other two.
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


@dataclass
class Args:
    vocab: int = 152_064  # Qwen2.5-Math-7B's
    tokens: int = 8192  # response tokens in the micro-batch
    length: int = 1024  # response tokens of each sequence
    hidden: int = 512
    layers: int = 4
    dtype: str = "float32"
    repeats: int = 2


HEADS = {
    "chunked": None,
    "log_softmax": lambda logits, y: logits.log_softmax(-1).gather(1, y[:, None])[:, 0],
    "cross_entropy": lambda logits, y: -F.cross_entropy(logits, y, reduction="none"),
}


def make_policy(args: Args, device):
    from transformers import AutoModelForCausalLM, Qwen2Config

    heads = args.hidden // 64
    config = Qwen2Config(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    dtype = getattr(torch, args.dtype)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    return common.Policy(lm, args.vocab, temperature=1.0).train().to(device)


def status(name: str) -> int:
    """A value of /proc/self/status in bytes: VmRSS is resident memory, VmHWM its peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def measure(head: str, args: Args) -> dict:
    """Peak GiB above the model's state, and seconds, of an update. Runs in a new process."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    policy = make_policy(args, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def update(count: int, length: int) -> None:
        ids = torch.randint(args.vocab, (count, 1 + length), device=device)
        is_response = torch.ones_like(ids, dtype=torch.bool)
        is_response[:, 0] = False
        if HEADS[head]:
            hidden = policy.lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = policy.lm.lm_head(hidden.flatten(0, 1)).float()  # [n, V]
            logp = HEADS[head](logits, ids[:, 1:].flatten())
            del logits
        else:
            logp = policy(ids, is_response)
        (-logp.mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if cuda:
            torch.cuda.synchronize()

    update(1, 8)
    before = torch.cuda.memory_allocated() if cuda else status("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        update(args.tokens // args.length, args.length)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    return {"peak_gib": (peak - before) / 2**30, "seconds": min(seconds)}


def main(args: Args) -> None:
    found = {}
    for head in HEADS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[head] = pool.submit(measure, head, args).result()
        print(f"{head:13} {found[head]}", flush=True)
    ours, *others = found.values()
    result = {"dtype": args.dtype}
    for name, key in (("peak_ratio", "peak_gib"), ("time_ratio", "seconds")):
        result[name] = round(ours[key] / min(other[key] for other in others), 3)
    print(json.dumps(result | {"heads": found}))


if __name__ == "__main__":
    main(tyro.cli(Args))
