"""Run by test_engine.py under torchrun: samples, trains three steps, samples again, exports.

usage: engine_check.py MODEL OUT TP
"""

import collections
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
import harness
import inputs

model, out, tp = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
args = types.SimpleNamespace(
    model=model,
    tensor_parallel_size=tp,
    dtype="float32",
    context=180,
    max_completion_length=32,
    temperature=0.8,
    seed=1,
    gradient_checkpointing=False,
    cpu_offload=False,
    max_tokens_per_microbatch=4096,
    learning_rate=1e-2,
    weight_decay=0.0,
)
rank, world_size, device = harness.init_distributed()
path, config, tokenizer = inputs.load_model_files(args)
# Longer than a block of the KV cache: what all begin with is taken from it, if it is not reset
problems = [{"id": i, "prompt_ids": [7, 9] * 70 + [5 + i, 7, 9]} for i in range(6)]
prompts = [p["prompt_ids"] for p in problems for _ in range(4)]
engine = common.make_engine(path, len(tokenizer), args)
if args.tensor_parallel_size > 1 and hasattr(torch.ops._C, "init_shm_manager"):  # needs AVX-512
    # Memory that no other run can meet, and that is gone when this one ends, however it does
    assert f"/dev/shm/{os.environ['MASTER_PORT']}-" in Path("/proc/self/maps").read_text()
    assert not any(name.startswith(os.environ["MASTER_PORT"]) for name in os.listdir("/dev/shm"))
policy = common.load_policy(path, config, len(tokenizer), args, device)
optimizer = common.make_optimizer(policy, args)
common.sync_weights(engine, policy)
common.check_sync(engine, policy)

gaps = {}
own = common.rollout(engine, problems, 4, "before", [2], args)
samples = common.gather(own)
gaps["before"] = common.canary(policy, prompts, samples, args, device)["sync/logprob_gap"]
assert [s["index"] for s in samples] == list(range(24))
for _ in range(3):
    tokens, is_response = common.collate(prompts, [s["ids"] for s in samples], range(24), device)
    policy(tokens, is_response).mean().backward()
    common.clip_gradients(policy, 1.0)
    optimizer.step()
    optimizer.zero_grad()
stale = common.gather(common.rollout(engine, problems, 4, "before", [2], args))
gaps["stale"] = common.canary(policy, prompts, stale, args, device)["sync/logprob_gap"]
common.sync_weights(engine, policy)
common.check_sync(engine, policy)
# The same samples with and without a second stop token: the one that is in most nearly half of them
whole = common.gather(common.rollout(engine, problems, 4, "after", [2], args))
seen_in = collections.Counter(t for s in whole for t in set(map(int, s["ids"])) if t != 2)
stop = min(seen_in, key=lambda t: (abs(seen_in[t] - len(whole) / 2), t))
after = common.gather(common.rollout(engine, problems, 4, "after", [2, stop], args))
gaps["after"] = common.canary(policy, prompts, after, args, device)["sync/logprob_gap"]

harness.save_model(out, policy, config, tokenizer, path, torch.float32)

# What the engine is asked for
asked, generate = [], engine.generate


def noted(prompts, params, **options):
    asked.extend((p["prompt_token_ids"], s) for p, s in zip(prompts, params))
    return generate(prompts, params, **options)


engine.generate = noted
common.rollout(engine, problems, 2, "5 1", [2, 6], args)
args.top_p = 0.9
common.rollout(engine, problems[::-1], 2, "5 1", [2, 6], args)
common.rollout(engine, problems, 2, "5 2", [2, 6], args)
engine.generate = generate


# The exact check, on faults that are small or that leave all sums but one layer's as they were
def sent(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """What the engine is sent in this weight's place."""
    if fault == "one element" and name == "model.layers.1.self_attn.v_proj.weight":
        weight = weight.clone()
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    if fault == "not sent" and name == "model.layers.1.mlp.up_proj.weight":
        return []
    if fault == "a bias not sent" and name == "model.layers.0.self_attn.k_proj.bias":
        return []
    if fault == "another layer" and ".layers." in name:
        name = name.replace("s.0.", "s.x.").replace("s.1.", "s.0.").replace("s.x.", "s.1.")
    return [(name, weight)]


seen = {}
for fault in ("not synced", "one element", "not sent", "a bias not sent", "another layer", ""):
    with torch.no_grad():
        for name, parameter in policy.lm.named_parameters():
            if fault != "not synced" or name == "model.norm.weight":
                parameter.mul_(1.01)
    if fault != "not synced":
        weights = ((n, p.detach().full_tensor()) for n, p in policy.lm.named_parameters())
        changed = (pair for name, weight in weights for pair in sent(name, weight))
        common.send_weights(engine, changed, policy.vocab_size, config)
    try:
        common.check_sync(engine, policy)
        seen[fault] = ""
    except RuntimeError as error:
        seen[fault] = str(error)

# Each rank of a tensor-parallel group generates all of the group's samples and keeps a part. Asked
# for directly, the whole must be identical within a group and, with other prompts, differ without.
from vllm import SamplingParams  # noqa: E402

group = rank // tp
outputs = engine.generate(
    [{"prompt_token_ids": [5 + group, 7, 9]}],
    SamplingParams(n=8, temperature=1.0, max_tokens=16, seed=3, detokenize=False),
    use_tqdm=False,
)
mine = [list(map(int, y.token_ids)) for y in outputs[0].outputs]
everyone = [None] * world_size
dist.all_gather_object(everyone, mine)

if rank == 0:
    torch.save(
        dict(
            gaps=gaps,
            seen=seen,
            groups=everyone,
            prompts=prompts,
            asked=[
                (x, s.n, s.temperature, s.top_p, s.max_tokens, s.stop_token_ids, s.seed)
                for x, s in asked
            ],
            stop=stop,
            whole=[s["ids"] for s in whole],
            ids=[s["ids"] for s in after],
            logprobs=[s["logprobs"] for s in after],
            truncated=[s["truncated"] for s in after],
            max_id=int(max(np.max(s["ids"]) for s in samples + stale + whole)),
        ),
        out / "result.pt",
    )
harness.shutdown(engine)
