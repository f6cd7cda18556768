"""Run by test_policy.py under torchrun: one update's gradients and checkpoint on some ranks.

usage: two_ranks.py MODEL OUT SAMPLES
"""

import os
import sys
import types

import numpy as np
import torch

import common
import harness
import inputs

model, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
args = types.SimpleNamespace(
    model=model,
    dtype="float32",
    temperature=1.0,
    gradient_checkpointing=False,
    cpu_offload=False,
    tensor_parallel_size=1,
)
rank, world_size, device = harness.init_distributed()
path, config, tokenizer = inputs.load_model_files(args)
policy = common.load_policy(path, config, tokenizer, args, device)
rng = np.random.default_rng(0)
responses = [rng.integers(3, 50, rng.integers(2, 12)).astype(np.int32) for _ in range(count)]
contexts = [[1]] * count
lengths = [1 + len(y) for y in responses]
plan = common.plan_microbatches(range(count), lengths, 24, world_size)
for prefix in ([], list(range(3, 23))):
    for batch in plan[rank]:
        tokens, is_response = common.collate(contexts, responses, batch, device)
        logp = policy(tokens, is_response, prefix)
        (logp.sum() * world_size).backward()
gradients = {name: p.grad.full_tensor() for name, p in policy.named_parameters()}
if rank == 0:
    torch.save(gradients, out)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Gloo's threads outlive the process group. One that lets go of a tensor while the interpreter is
# torn down aborts the process, now and then, after all is done (pytorch#179291).
os._exit(0)
