"""Run by test_policy.py under torchrun: what ranks with unequal work do, and what it comes to.

usage: two_ranks.py MODEL OUT SAMPLES       one update's gradients
       two_ranks.py MODEL OUT skew          collectives of ranks with short and long, few and many
       two_ranks.py MODEL OUT slow          rank 0 fetches and reads longer than a collective waits
"""

import datetime
import functools
import os
import sys
import time
import types

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import transformers

import common
import grad_alignment
import harness
import inputs

model, out, mode = sys.argv[1:]
args = types.SimpleNamespace(
    model=model,
    dtype="float32",
    temperature=1.0,
    gradient_checkpointing=False,
    cpu_offload=False,
    tensor_parallel_size=1,
    max_tokens_per_microbatch=4096,
)
LIMIT = 10 if mode == "slow" else 120  # seconds, of a collective: a hang ends as an error
dist.init_process_group = functools.partial(
    dist.init_process_group, timeout=datetime.timedelta(seconds=LIMIT)
)
rank, world_size, device = harness.init_distributed()

if mode == "slow":

    def fetch(name, local_files_only=False, **_):
        assert name == "owner/name" and (local_files_only or rank == 0)
        time.sleep(0 if local_files_only else LIMIT + 5)
        return model

    def read(*words, read=transformers.AutoModelForCausalLM.from_pretrained, **options):
        time.sleep(LIMIT + 5)
        return read(*words, **options)

    huggingface_hub.snapshot_download = fetch
    transformers.AutoModelForCausalLM.from_pretrained = read
    args.model = "owner/name"

path, config, tokenizer = inputs.load_model_files(args)
policy = common.load_policy(path, config, len(tokenizer), args, device)
rng = np.random.default_rng(0)


def respond(lengths) -> list[np.ndarray]:
    return [rng.integers(3, 50, n).astype(np.int32) for n in lengths]


result = None
if mode == "skew":
    result = []
    # Rank 0 scores the samples with even numbers: short ones, whose prompt is most of their tokens
    for lengths in ([4, 60] * 4, [60, 4] * 4, [30] * 8, [5], [40], [2, 90], [1, 1, 200]):
        prompts = [[1, 5, 6, 7, 8, 9]] * len(lengths)
        samples = [
            dict(ids=y, logprobs=np.zeros(len(y), np.float32), length=len(y))
            for y in respond(lengths)
        ]
        for tokens in (4096, 64):
            args.max_tokens_per_microbatch = tokens
            gap = common.canary(policy, prompts, samples, args, device)["sync/logprob_gap"]
            A = torch.zeros(len(lengths))
            A[-1] = -1.0  # a single sample has a gradient: other ranks have none
            args.num_generations = len(lengths)
            responses = [s["ids"] for s in samples]
            cosine = grad_alignment.alignment(
                policy, [[1]] * len(A), prompts, responses, A, 1 + A, args, device
            )
            result.append((gap, cosine["alignment/cosine_to_grpo"]))
elif mode != "slow":
    responses = respond([rng.integers(2, 12) for _ in range(int(mode))])
    contexts = [[1]] * len(responses)
    lengths = [1 + len(y) for y in responses]
    plan = common.plan_microbatches(range(len(responses)), lengths, 24, world_size)
    for prefix in ([], list(range(3, 23))):
        for batch in plan[rank]:
            tokens, is_response = common.collate(contexts, responses, batch, device)
            logp = policy(tokens, is_response, prefix)
            (logp.sum() * world_size).backward()
    result = {name: p.grad.full_tensor() for name, p in policy.named_parameters()}
if rank == 0:
    torch.save(result, out)
harness.wait_for_all()
torch.distributed.destroy_process_group()
# Gloo's threads outlive the process group. One that lets go of a tensor while the interpreter is
# torn down aborts the process, now and then, after all is done (pytorch#179291).
os._exit(0)
