"""Passes of a token through the model in one warm-up update: the authors' fork and nsr_prerl.py.

    python benchmark/token_passes.py                   counts both, and times both on a CPU
    python benchmark/token_passes.py --no-measure --prompt-length 150 --new-tokens 3000

A forward is 1 pass of each token, a backward 2, the forward that gradient checkpointing repeats 1;
the prompt's tokens count where x is in the context. Padding, generation and the optimiser do not.

The fork runs on CUDA only, so its passes are counted from its code. In a warm-up step
(pretrain_only) ray_trainer.py calls compute_log_prob twice, for old log-probs of all samples given
x and given BOS: a forward each. update_policy (dp_actor.py) runs _forward_micro_batch in both
spaces for all samples, then one backward of policy_loss * 0 + pretrain_pg_loss: autograd goes
through both graphs, as a factor of 0 prunes nothing, and the mask that leaves the positives out of
the loss leaves them in the batch. nsr_prerl.py passes BOS + y of the counted samples (A < 0)
forward and backward once; being on-policy it needs no old log-probs. Its canary scores 4 samples
with their prompts.

Measured is the same work done by our own code: both forms through common.Policy, with micro-batches
of the same size, clipping and AdamW. What else the fork computes, entropies and the top-100 of
whole float32 logits for its metrics, is left out. Both forms have the same gradient, which is
checked.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from lab import smollm2  # noqa: E402


@dataclass
class Args:
    samples: int = 64
    """responses of the step"""
    prompt_length: int = 272
    """tokens (the mean of lab/arithmetic.py)"""
    new_tokens: int = 128
    negatives: float = 0.5
    """share of the samples with A < 0"""
    checkpointing: bool = False
    """recompute each layer's activations in the backward"""
    measure: bool = True
    """time both forms with SmolLM2-135M"""
    repeats: int = 2
    """timed updates of each form, in turn, after one of ours that warms up"""
    max_tokens_per_microbatch: int = 4096


def passes(args: Args) -> dict[str, dict[str, float]]:
    """Token passes of one update, by what they are for.

    >>> small = Args(samples=4, prompt_length=9, new_tokens=1, negatives=0.5)
    >>> {form: sum(parts.values()) for form, parts in passes(small).items()}
    {'fork': 192, 'ours': 52.0}
    """
    again = 1 if args.checkpointing else 0
    post = args.prompt_length + args.new_tokens  # x + y
    pre = 1 + args.new_tokens  # BOS + y
    n, counted = args.samples, args.samples * args.negatives
    return {
        "fork": {
            "old log-probs, y | x": n * post,
            "old log-probs, y | BOS": n * pre,
            "update times 0, y | x": n * post * (3 + again),
            "update, y | BOS": n * pre * (3 + again),
        },
        "ours": {
            "update, y | BOS": counted * pre * (3 + again),
            "canary, y | x": min(4, n) * post,
        },
    }


def make_update(args: Args):
    """fork() and ours(): one whole update each, of the same policy on the same samples.

    Both return the gradient's norm.
    """
    from transformers import AutoConfig, AutoTokenizer

    store = f"file://{tempfile.mkdtemp()}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    path, device = smollm2.checkpoint(), torch.device("cpu")
    tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    flags = SimpleNamespace(
        dtype="bfloat16",
        gradient_checkpointing=args.checkpointing,
        cpu_offload=False,
        temperature=1.0,
        max_prompt_length=args.prompt_length,
        max_completion_length=args.new_tokens,
        learning_rate=0.0,  # both forms at the same weights, so that their gradients must agree
        weight_decay=0.0,
        max_tokens_per_microbatch=args.max_tokens_per_microbatch,
    )
    policy = common.load_policy(path, config, len(tokenizer), flags, device)
    optimizer = common.make_optimizer(policy, flags)

    n = args.samples
    rng = np.random.default_rng(0)
    words = len(tokenizer)
    prompts = rng.integers(words, size=(n, args.prompt_length)).tolist()
    bos = [[tokenizer.bos_token_id]] * n
    responses = list(rng.integers(words, size=(n, args.new_tokens), dtype=np.int32))
    samples = [{"ids": y, "logprobs": np.zeros(len(y), np.float32)} for y in responses]
    A = torch.where(torch.arange(n) < round(args.negatives * n), -1.0, 1.0)

    def microbatches(chosen: list[int], context_length: int) -> list[list[int]]:
        lengths = [context_length + args.new_tokens] * n
        return common.plan_microbatches(chosen, lengths, args.max_tokens_per_microbatch, 1)[0]

    def log_probs(contexts, batch: list[int]):
        return policy(*common.collate(contexts, responses, batch, device))

    def loss(logp, batch: list[int], count: int):
        """The counted samples' mean over tokens; the others are in the batch with weight 0."""
        weight = torch.where(A < 0, A, 0.0)[batch].repeat_interleave(args.new_tokens)
        objective = common.clipped_objective(logp, logp.detach(), weight, 0.2, 0.28)
        return -objective.sum() / (count * args.new_tokens)

    def step() -> float:
        norm = common.clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    negatives, everything = (A < 0).nonzero()[:, 0].tolist(), list(range(n))

    def fork() -> float:
        with torch.no_grad():
            for contexts in (prompts, bos):
                for batch in microbatches(everything, len(contexts[0])):
                    log_probs(contexts, batch)
        policy.reshard()
        for batch in microbatches(everything, args.prompt_length):
            count = len(negatives)
            rl = loss(log_probs(prompts, batch), batch, count)
            (rl * 0 + loss(log_probs(bos, batch), batch, count)).backward()
        return step()

    def ours() -> float:
        common.canary(policy, prompts, samples, flags, device)
        for batch in microbatches(negatives, 1):
            loss(log_probs(bos, batch), batch, len(negatives)).backward()
        return step()

    return {"fork": fork, "ours": ours}


def measure(args: Args) -> dict[str, list[float]]:
    """Seconds of each timed update, by form."""
    updates = make_update(args)
    seconds, norms = {form: [] for form in updates}, {}
    updates["ours"]()
    for _ in range(args.repeats):
        for form, update in updates.items():
            start = time.perf_counter()
            norms[form] = update()
            seconds[form].append(time.perf_counter() - start)
        assert abs(norms["fork"] / norms["ours"] - 1) < 0.02, norms  # bfloat16
    dist.destroy_process_group()
    return seconds


def main(args: Args) -> None:
    counts = passes(args)
    totals = {form: sum(parts.values()) for form, parts in counts.items()}
    for form, parts in counts.items():
        for what, count in [*parts.items(), ("all", totals[form])]:
            print(f"{form:5} {what:24} {count:12,.0f}", flush=True)
    result = {"passes": totals, "pass_ratio": round(totals["ours"] / totals["fork"], 4)}
    if args.measure:
        seconds = measure(args)
        medians = {form: median(values) for form, values in seconds.items()}
        for form, values in seconds.items():
            print(f"{form:5} seconds of an update      {', '.join(f'{s:.2f}' for s in values)}")
        result["seconds"] = {form: round(value, 3) for form, value in medians.items()}
        result["time_ratio"] = round(medians["ours"] / medians["fork"], 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
