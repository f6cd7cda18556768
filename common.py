"""The algorithm's helpers of the four training scripts: small, independent functions.

Their order is that of a step: engine and policy, then the numbered sections of the scripts' main,
which has the loop itself. inputs.py reads the model and the data, models.py says which models can
be trained, grading.py decides whether an answer is correct. harness.py has command line, output
folder and checkpoints; workarounds.py has what only a CPU or a fault of a library needs.
"""

import math
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import grading
import harness
import models
import thoughts
import workarounds

# ------------------------------------------------------------------------------------------- engine


def make_engine(path: str, vocab_size: int, args, shared: bool = True):
    """A vLLM engine in this process. Ranks r*TP .. r*TP+TP-1 form one tensor-parallel engine.

    It starts with dummy weights, which the first sync replaces. Its vocabulary has only the ids
    that can occur, so the ids with which Qwen pads its embeddings are never sampled.

    Args:
        path: folder of the model.
        vocab_size: number of ids that can occur: inputs.num_tokens().
        shared: whether the trainer uses the GPU between rollouts; then the engine sleeps there.
    """
    if torch.cuda.is_available():
        workarounds.exact_float32()
        extra = dict(gpu_memory_utilization=args.gpu_memory_utilization, enable_sleep_mode=shared)
    else:
        extra = workarounds.cpu_engine_options(args.context, bits)
    from vllm import LLM

    with workarounds.start_of_engine() as repair:
        engine = LLM(
            path,
            load_format="dummy",
            # Untied: vLLM's CPU kernels repack a tied head at load; a reload would not reach it.
            hf_overrides={"vocab_size": vocab_size, "tie_word_embeddings": False},
            dtype="float32" if args.dtype == "float64" else args.dtype,
            tensor_parallel_size=args.tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            max_model_len=args.context,
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            seed=args.seed,
            disable_log_stats=True,
            **extra,
        )
        repair(engine, biased_head="lm_head.bias" in models.read_headers(path, path))
    sleep(engine, args)
    return engine


def sleeps(engine) -> bool:
    """Does the engine share its GPU with a trainer? False on a CPU."""
    return engine.llm_engine.model_config.enable_sleep_mode


def weights_stay(engine, args) -> bool:
    """Can the engine's weights stay on the GPU during the update, so that they need no copying?

    True if that leaves a tenth of the GPU's memory free. It needs vLLM 0.32 or later.
    """
    if not hasattr(engine, "release_kv_cache_memory"):
        return False
    parameters = engine.collective_rpc(lambda worker: list(worker.get_model().parameters()))[0]
    held, itemsize = sum(p.nbytes for p in parameters), parameters[0].itemsize
    count = sum(p.numel() for p in parameters) * args.tensor_parallel_size
    config = engine.llm_engine.model_config.hf_text_config
    needed = held + trainer_bytes(count, itemsize, config, args, dist.get_world_size())
    return needed <= 0.9 * torch.cuda.mem_get_info()[1]


def trainer_bytes(count: int, itemsize: int, config, args, world_size: int) -> float:
    """A rough estimate of the trainer's memory on one GPU; benchmark/hardware.py is more exact.

    It adds up this rank's shard of float32 weights, gradients and two moments; one micro-batch;
    embedding and head with the head's gradient; and 3 GiB.

    Args:
        count: parameters of the model; itemsize: bytes of a parameter in --dtype.
    """
    state = 0 if args.cpu_offload else 16 * count / world_size
    layers, hidden = config.num_hidden_layers, config.hidden_size
    kept = 8 * getattr(config, "intermediate_size", 4 * hidden) + 28 * hidden  # of a layer, bf16
    if args.gradient_checkpointing:  # every layer's input, and one and a half layers computed anew
        per_token = 2 * layers * hidden + 1.5 * kept
    else:
        per_token = layers * kept
    batch = max(args.max_tokens_per_microbatch, args.context) * per_token * itemsize / 2
    return state + batch + 12 * config.vocab_size * hidden + 3 * 2**30


def sleep(engine, args) -> None:
    """After a rollout: give the KV cache's memory to the trainer, and the weights' if needed."""
    if not sleeps(engine):
        return
    if weights_stay(engine, args):
        workarounds.finish_queued_batches(engine)
        engine.sleep(level=0)
        engine.release_kv_cache_memory()
    else:
        # Level 1 keeps a copy in host memory. Level 2 drops the weights, which would be right as
        # every sync replaces them, but has had bugs that return garbage.
        engine.sleep(level=1)


def wake(engine, tag: str) -> None:
    """Give memory back to the engine: "weights" for a sync, then "kv_cache" for a rollout.

    The KV cache comes last, so that it takes no memory during a sync. It is no error to wake what
    is awake.
    """
    if sleeps(engine) and engine.llm_engine.is_sleeping():
        torch.cuda.empty_cache()  # what the trainer has freed
        engine.wake_up(tags=[tag])


# ----------------------------------------------------------------------------- policy and optimiser


class TokenLogprobs(torch.autograd.Function):
    """log softmax(f(h Wᵀ + b) / temperature)[y], a chunk of tokens at a time.

    h is [n, H], W [V, H], b [V] or None, y [n]; the result is [n]. f(z) is cap·tanh(slope·z/cap),
    or slope·z if cap is ∞: models.head_form(). Both passes hold the logits of one chunk only. The
    backward pass computes them again, but not their normaliser. It adds up the gradient of W in
    place, where autograd would make a new [V, H] for every chunk.
    """

    @staticmethod
    def logits(h, W, b, temperature: float, slope: float, cap: float, chunk: int):
        """Yields each chunk's tokens (a slice), float32 logits [c, V], and [c, V] in h's dtype.

        All chunks use the same memory: on a CPU, new memory takes longer to get than to fill. Rows
        begin at multiples of 8, because a GPU has no fast kernels for an odd vocabulary size.
        """
        rows, words = min(chunk, len(h)), len(W)
        product = h.new_empty(rows, (words + 7) // 8 * 8)
        product[:, words:] = 0  # a CPU's bfloat16 kernels read this, and 0 * NaN is NaN
        product = product[:, :words]
        wide = product.to(torch.promote_types(h.dtype, torch.float32))  # itself, if h is float32
        for i in range(0, len(h), chunk):
            c = slice(i, min(i + chunk, len(h)))
            low, z = product[: c.stop - i], wide[: c.stop - i]
            z.copy_(torch.mm(h[c], W.T, out=low))
            if b is not None:
                z.add_(b)
            if cap < math.inf:
                z.mul_(slope / cap).tanh_().mul_(cap / temperature)
            elif slope != temperature:
                z.mul_(slope / temperature)
            yield c, z, low

    @staticmethod
    def forward(ctx, h, W, b, y, temperature: float, slope: float, cap: float, chunk: int):
        ctx.numbers = temperature, slope, cap, chunk
        wide = torch.promote_types(h.dtype, torch.float32)
        chosen, norm = h.new_empty(len(h), dtype=wide), h.new_empty(len(h), 1, dtype=wide)
        for c, z, _ in TokenLogprobs.logits(h, W, b, *ctx.numbers):
            chosen[c] = z.gather(1, y[c, None])[:, 0]
            top = z.amax(-1, keepdim=True)
            norm[c] = top + z.sub_(top).exp_().sum(-1, keepdim=True).log_()  # log Σ exp, in place
        ctx.save_for_backward(h, W, b, y, norm)
        return chosen - norm[:, 0]

    @staticmethod
    def backward(ctx, grad):
        h, W, b, y, norm = ctx.saved_tensors
        temperature, slope, cap, _ = ctx.numbers
        grad_h, part = torch.zeros_like(h), torch.empty_like(W)
        grad_W = torch.zeros(W.shape, dtype=norm.dtype, device=W.device)
        grad_b = None if b is None else torch.zeros_like(grad_W[:, 0])
        for c, z, d in TokenLogprobs.logits(h, W, b, *ctx.numbers):
            bend = 1 - (z * (temperature / cap)).square() if cap < math.inf else None  # of tanh
            g = grad[c, None] * (slope / temperature)
            z.sub_(norm[c]).exp_().mul_(-g)  # ∂logp/∂logits = onehot(y) - softmax
            z.scatter_add_(1, y[c, None], g)
            d.copy_(z if bend is None else z.mul_(bend))
            grad_h[c] = d @ W
            grad_W += torch.mm(d.T, h[c], out=part)
            if b is not None:
                grad_b += z.sum(0)
        grad_b = None if b is None else grad_b.to(b.dtype)
        return grad_h, grad_W.to(W.dtype), grad_b, None, None, None, None, None


class Policy(nn.Module):
    """A Hugging Face causal LM whose forward returns log-probs of chosen tokens, never full logits.

    It is FSDP's root module, so that FSDP gathers embeddings and head for this forward.
    """

    def __init__(self, lm, vocab_size: int, temperature: float, chunk: int = 2048):
        super().__init__()
        self.lm, self.vocab_size = lm, vocab_size
        self.temperature, self.chunk = temperature, chunk
        self.slope, self.cap = models.head_form(lm)

    def forward(self, tokens: torch.Tensor, is_response: torch.Tensor, prefix: list[int] = ()):
        """log π(token_t | prefix, tokens_<t), float32 [n], at the n marked tokens.

        Args:
            tokens: [B, L], right-padded. Attention is causal, so padding needs no mask. Positions
                start at 0 for either context, x or BOS.
            is_response: bool [B, L], marks the n tokens.
            prefix: tokens that come before each of the B rows; computed once for all rows.
        """
        cache, before, first = None, [], 1  # without a prefix nothing predicts the first token
        if prefix:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.lm.config)  # keys and values, with their gradients
            ids = torch.tensor([prefix], device=tokens.device)
            out = self.lm.model(input_ids=ids, past_key_values=cache, use_cache=True)
            before, first = [out.last_hidden_state[:, -1:].expand(len(tokens), -1, -1)], 0
            cache.batch_repeat_interleave(len(tokens))
        out = self.lm.model(input_ids=tokens, past_key_values=cache, use_cache=bool(prefix))
        hidden = torch.cat([*before, out.last_hidden_state], 1)[:, :-1]  # [B, L-first, H]
        marked = is_response[:, first:]  # position t-1 predicts token t
        # The head without the padded vocabulary
        W = self.lm.lm_head.weight[: self.vocab_size]
        b = None if self.lm.lm_head.bias is None else self.lm.lm_head.bias[: self.vocab_size]
        numbers = self.temperature, self.slope, self.cap, self.chunk
        return TokenLogprobs.apply(hidden[marked], W, b, tokens[:, first:][marked], *numbers)


def load_policy(path: str, config, vocab_size: int, args, device) -> Policy:
    """The policy, sharded by FSDP2: --dtype to compute, float32 master weights and reduction.

    Rank 0 reads the model from the folder `path`; the other ranks receive their shards.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype)
    master = torch.promote_types(dtype, torch.float32)
    attention = workarounds.choose_attention(config, dtype, device, args)
    lm = models.meta_model(config, master, attention)
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, vocab_size, args.temperature).train()
    shard = dict(
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=master),
    )
    if args.cpu_offload:
        shard["offload_policy"] = CPUOffloadPolicy()
    for layer in lm.model.layers:
        fully_shard(layer, **shard)
    fully_shard(policy, **shard)
    policy.to_empty(device=torch.device("cpu") if args.cpu_offload else device)
    lm.tie_weights()  # to_empty gives tied parameters one tensor each

    state, buffers = {}, {}
    if dist.get_rank() == 0:
        full = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        state = {f"lm.{name}": tensor for name, tensor in full.state_dict().items()}
        buffers = {f"lm.{name}": tensor for name, tensor in full.named_buffers()}
    harness.wait_for_all()  # reading may take longer than a collective's time-out
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(policy, state, options=options)
    for name, buffer in policy.named_buffers():  # rotary frequencies are in no state dict
        value = [buffers.get(name)]
        dist.broadcast_object_list(value)
        policy.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], value[0].to(device), persistent=False
        )
    return policy


def make_optimizer(policy, args):
    """AdamW with the paper's betas, over this rank's shards.

    The fused form needs no temporary memory; PyTorch's default on CUDA copies all weights.
    """
    return torch.optim.AdamW(
        policy.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
        fused=True,
    )


# --------------------------------------------------------------------------------------- 1. rollout


def rollout(
    engine, problems: list[dict], num_samples: int, seed: str, stop: list[int], args
) -> list[dict]:
    """Sample y ~ π(·|x): `num_samples` responses to each problem. Returns this rank's part.

    Each of n engines takes every n-th problem, and each of its ranks keeps some of the samples. A
    sample depends on the seed, the problem's id and the sample's number, not on the ranks.

    Args:
        stop: ids that end a response: inputs.find_stop_tokens(). The stop token is part of y.

    Returns:
        dicts of index (problem * num_samples + number), ids (int32 [T], the stop token included),
        logprobs (float32 [T], the sampler's) and truncated (bool).
    """
    from vllm import SamplingParams

    tp, rank = args.tensor_parallel_size, dist.get_rank()
    mine = range(rank // tp, len(problems), dist.get_world_size() // tp)
    params = [
        SamplingParams(
            n=num_samples,
            temperature=args.temperature,
            top_p=getattr(args, "top_p", 1.0),  # evaluations have it
            max_tokens=args.max_completion_length,
            seed=random.Random(f"{seed} {problems[i]['id']}").getrandbits(31),
            stop_token_ids=stop,
            logprobs=0,
            flat_logprobs=True,  # lists, not a dictionary for every token
            detokenize=False,
        )
        for i in mine
    ]
    wake(engine, "weights")
    wake(engine, "kv_cache")
    prompts = [{"prompt_token_ids": problems[i]["prompt_ids"]} for i in mine]
    outputs = engine.generate(prompts, params, use_tqdm=False) if prompts else []
    harness.note_memory()
    sleep(engine, args)
    samples = []
    for i, output in zip(mine, outputs):
        for g, y in enumerate(output.outputs):
            if (i * num_samples + g) % tp == rank % tp:
                samples.append(
                    dict(
                        index=i * num_samples + g,
                        ids=np.array(y.token_ids, dtype=np.int32),
                        logprobs=np.array(y.logprobs.logprobs, dtype=np.float32),
                        truncated=y.finish_reason == "length",
                    )
                )
    return samples


def gather(samples: list[dict]) -> list[dict]:
    """The samples of all ranks, on every rank, sorted by index."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, samples)
    return sorted((s for part in parts for s in part), key=lambda s: s["index"])


# ------------------------------------------------------------------------ 2. verify, and the canary


def verify(samples: list[dict], references: list[str], tokenizer, verifier, args) -> dict:
    """Add text, length, reward, boxed and thoughts to this rank's samples.

    A truncated response gets reward 0.

    Args:
        references: the reference answers of all samples of the step, by index.

    Returns:
        verify/timeouts and verify/errors, summed over the ranks.
    """
    texts = tokenizer.batch_decode([s["ids"] for s in samples], skip_special_tokens=True)
    wanted = [references[s["index"]] for s in samples]
    rewards, timeouts, errors = grading.verify(verifier, texts, wanted, args)
    for sample, text, reward in zip(samples, texts, rewards):
        sample["reward"] = 0.0 if sample["truncated"] else reward
        sample["text"], sample["length"] = text, len(sample["ids"])
        sample["boxed"] = grading.last_boxed(text) is not None
        sample["thoughts"] = thoughts.count(text)
    counts = torch.tensor([timeouts, errors])
    dist.all_reduce(counts)
    return {"verify/timeouts": int(counts[0]), "verify/errors": int(counts[1])}


def rollout_metrics(samples: list[dict], rewards: torch.Tensor, args) -> dict:
    """Metrics of the step's samples, as docs/flags.md lists them; rewards: [N]."""
    solved = rewards.view(-1, args.num_generations).mean(1)  # [P]
    lengths = [s["length"] for s in samples]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/solve_all": (solved == 1).float().mean().item(),
        "reward/solve_none": (solved == 0).float().mean().item(),
        "completion/length": float(np.mean(lengths)),
        "completion/truncated": float(np.mean([s["truncated"] for s in samples])),
        "completion/boxed": float(np.mean([s["boxed"] for s in samples])),
        # E[-log π(y_t | x, y_<t)] over y ~ π is the entropy: no full distribution is needed.
        "policy/entropy": float(-np.concatenate([s["logprobs"] for s in samples]).mean()),
        **thoughts.rates([s["thoughts"] for s in samples], lengths),
    }


@torch.no_grad()
def canary(policy, prompts: list[list[int]], samples: list[dict], args, device) -> dict:
    """Compare the trainer's log-probs given x with the sampler's, on up to 4 samples per rank.

    This is the canary. It runs before the update, when the engine should have the policy's weights.
    Then the gap is only rounding; a large gap means that the sync failed.

    Returns:
        sync/logprob_gap: the mean over tokens of |trainer's - sampler's log-prob|, in nats.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stride = max(1, len(samples) // (4 * world_size))
    responses, batch, width = [s["ids"] for s in samples], [], 0
    for i in range(rank * stride, len(samples), world_size * stride):
        width = max(width, len(prompts[i]) + len(responses[i]))
        if batch and width * (len(batch) + 1) > args.max_tokens_per_microbatch:
            break
        batch.append(i)
    batch = batch[:4]
    # Of all samples, not of this rank's: a prefix is a forward pass more, on every rank or on none
    prefix, contexts = split_prefix(prompts, responses, args)
    logp = policy(*collate(contexts, responses, batch, device), prefix)
    policy.reshard()  # FSDP's root stays gathered after a forward without backward
    gap = (logp - sampler_logprobs(samples, batch, device)).abs().cpu()
    total = torch.tensor([gap.sum(), len(gap)], dtype=torch.float64)
    dist.all_reduce(total)
    return {"sync/logprob_gap": (total[0] / total[1].clamp(min=1)).item()}


def sampler_logprobs(samples: list[dict], batch: list[int], device) -> torch.Tensor:
    """The engine's log-probs of the batch's response tokens, float32 [n]."""
    parts = [samples[i]["logprobs"] for i in batch] or [np.zeros(0, np.float32)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def check_canary(gap: float, args) -> None:
    """End the run if the engine's log-probs are too far from the trainer's.

    Args:
        gap: sync/logprob_gap, in nats.

    Raises:
        RuntimeError: the gap is over 0.001 in float32 or 0.1 in bfloat16, or is NaN.
    """
    limit = 0.001 if args.dtype == "float32" else 0.1
    if math.isnan(gap):
        raise RuntimeError(
            "sync/logprob_gap is NaN: a weight is not finite. Try a smaller --learning-rate or "
            "--dtype float32"
        )
    if not gap <= limit:
        raise RuntimeError(
            f"sync/logprob_gap is {gap:.4g}, over {limit:g}: the engine samples from another "
            "policy than the trainer's, so this step's update would be incorrect"
        )


# ----------------------------------------------------------------------------- 3. and 4. advantages


def advantages(rewards: torch.Tensor, group_size: int, kind: str) -> torch.Tensor:
    """Advantages A [N] from rewards r [N]; each `group_size` neighbours form a group.

    grpo: (r - group mean) / (group std + 1e-6), with the sample std (ddof 1), as in verl.
    mean: r - group mean. rloo: r - mean of the others in the group. reinforce++: (r - mean) /
    (std + 1e-6) over the whole batch. sign: 1 if correct, -1 if not (arXiv 2506.01347).

    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "mean")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "grpo")
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "rloo")
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    if kind == "sign":
        return 2 * rewards - 1
    if kind == "reinforce++":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    r = rewards.view(-1, group_size)  # [P, G]
    A = r - r.mean(1, keepdim=True)
    if kind == "grpo":
        A = A / (r.std(1, keepdim=True) + 1e-6)
    elif kind == "rloo":
        A = A * group_size / (group_size - 1)
    return A.flatten()


def sign_weights(A: torch.Tensor, weights: tuple[float, float]) -> torch.Tensor:
    """Weight [N] of each sample: the first of `weights` where A > 0, the second where A < 0.

    Where A = 0 it is 1 if neither weight is 0, else 0: then the sample is not in the loss's mean.

    >>> sign_weights(torch.tensor([2.0, -1.0, 0.0]), (0.1, 1.0))
    tensor([0.1000, 1.0000, 1.0000])
    >>> sign_weights(torch.tensor([2.0, -1.0, 0.0]), (0.0, 1.0))
    tensor([0., 1., 0.])
    """
    positive, negative = weights
    neither = torch.full_like(A, float(positive != 0 and negative != 0))
    return torch.where(A > 0, positive, torch.where(A < 0, negative, neither))


# ------------------------------------------------------------------------- 5. update: micro-batches


def split_prefix(contexts: list[list[int]], responses: list, args) -> tuple[list, list]:
    """Split off the prefix that all contexts share, such as few-shot examples.

    Policy then computes it once per micro-batch. Gradient checkpointing computes each layer again
    and has no cache to share, so with it the prefix is [].

    Returns:
        the prefix, [] if it is less than a third of all tokens, and the contexts without it.

    >>> from types import SimpleNamespace as Args
    >>> split_prefix([[1, 2, 3], [1, 2, 4]], [[5], [6]], Args(gradient_checkpointing=False))
    ([1, 2], [[3], [4]])
    """
    prefix = os.path.commonprefix(contexts)  # of lists as well
    total = sum(len(x) + len(y) for x, y in zip(contexts, responses))
    if args.gradient_checkpointing or 3 * len(prefix) * len(contexts) < total:
        prefix = []
    return prefix, [x[len(prefix) :] for x in contexts]


def split(in_loss: torch.Tensor, num_minibatches: int, step: int) -> list[torch.Tensor]:
    """The samples of each mini-batch, a list of bool [N]; the same on every rank."""
    order = torch.randperm(len(in_loss), generator=torch.Generator().manual_seed(step))
    minibatches = []
    for part in order.chunk(num_minibatches):
        chosen = torch.zeros_like(in_loss)
        chosen[part] = in_loss[part]
        minibatches.append(chosen)
    return minibatches


class Batch(NamedTuple):
    """A micro-batch of B samples with n response tokens in total. B is never 0.

    All ranks make the same number of micro-batches. A rank without samples gets a filler: a sample
    of the step whose per_token() values are 0, so that it adds nothing to the loss.
    """

    index: list[int]  # which of the step's samples they are
    tokens: torch.Tensor  # [B, L]
    is_response: torch.Tensor  # bool [B, L]
    lengths: torch.Tensor  # [B] response tokens
    is_filler: bool

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Values [n] of the response tokens from values [N] of the samples; 0 in a filler."""
        values = values[self.index].to(self.tokens.device).repeat_interleave(self.lengths)
        return torch.zeros_like(values) if self.is_filler else values

    def take(self, parts) -> torch.Tensor:
        """Values [n] of the response tokens, from parts[i], which has [T_i] for each sample i."""
        return torch.cat([parts[i] for i in self.index])


def microbatches(chosen: torch.Tensor, contexts, responses, args, device):
    """Yields this rank's Batches of the chosen samples (bool [N]); as many on every rank."""
    total = [len(x) + len(y) for x, y in zip(contexts, responses)]  # tokens of each sequence
    indices = chosen.nonzero()[:, 0].tolist()
    plan = plan_microbatches(indices, total, args.max_tokens_per_microbatch, dist.get_world_size())
    for index in plan[dist.get_rank()]:
        filler = [min(indices, key=lambda i: total[i])]
        batch = index or filler
        lengths = torch.tensor([len(responses[i]) for i in batch], device=device)
        yield Batch(batch, *collate(contexts, responses, batch, device), lengths, not index)


def plan_microbatches(indices: list[int], lengths: list[int], max_tokens: int, world_size: int):
    """Pack samples of similar length: a list of micro-batches (lists of indices) for each rank.

    A micro-batch has at most `max_tokens` with padding, unless one sample alone has more. FSDP's
    collectives must stay aligned, so every rank gets the same number: the largest are halved, and
    empty ones added, until that holds. Those that run at the same time have similar lengths.

    >>> plan_microbatches([0, 1, 2, 3], [5, 9, 4, 10], 20, 1)
    [[[3, 1], [0, 2]]]
    >>> plan_microbatches([0, 1, 2], [5, 9, 4], 100, 2)
    [[[1]], [[0, 2]]]
    """
    batches = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    while len(batches) % world_size:
        big = max(batches, key=lambda batch: len(batch) > 1 and lengths[batch[0]] * len(batch))
        at, half = batches.index(big), len(big) // 2
        batches[at : at + 1] = [big[:half], big[half:]] if half else [big, []]
    return [batches[rank::world_size] for rank in range(world_size)]


def collate(contexts: list[list[int]], responses: list[np.ndarray], batch: list[int], device):
    """Tokens [B, L], right-padded, and the response mask [B, L] of the samples in `batch`.

    An empty batch gives one row of two tokens, none of them marked.
    """
    width = max((len(contexts[i]) + len(responses[i]) for i in batch), default=2)
    tokens = np.zeros((max(1, len(batch)), width), dtype=np.int64)
    is_response = np.zeros_like(tokens, dtype=bool)
    for row, i in enumerate(batch):
        start, end = len(contexts[i]), len(contexts[i]) + len(responses[i])
        tokens[row, :start], tokens[row, start:end] = contexts[i], responses[i]
        is_response[row, start:end] = True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(is_response).to(device)


@torch.no_grad()
def old_logprobs(policy, minibatches, computed, prefix, contexts, responses, args, device) -> dict:
    """log π(y_t | context, y_<t) before the first update: {i: [T_i]} for this rank's samples i.

    Empty if there is one mini-batch: then the old policy is the current one.
    """
    found = {}
    for chosen in minibatches if len(minibatches) > 1 else ():
        for batch in microbatches(chosen & computed, contexts, responses, args, device):
            logp = policy(batch.tokens, batch.is_response, prefix)
            found.update(zip(batch.index, logp.split(batch.lengths.tolist())))
    return found


# -------------------------------------------------------------------- 5. update: loss and optimiser


def token_weights(in_loss: torch.Tensor, lengths: torch.Tensor, kind: str, max_length: int):
    """The weight in the loss of a token of each sample, [N]: --loss-aggregation.

    They are for the whole mini-batch, so the losses of micro-batches and ranks only add up. The two
    means' weights sum to 1.

    Args:
        in_loss: bool [N], the samples of the mini-batch; lengths: [N], response tokens.
        max_length: --max-completion-length, in tokens.

    >>> token_weights(torch.tensor([True, True]), torch.tensor([1, 3]), "token-mean", 8)
    tensor([0.2500, 0.2500])
    >>> token_weights(torch.tensor([True, True]), torch.tensor([1, 4]), "seq-mean-token-mean", 8)
    tensor([0.5000, 0.1250])
    """
    n = in_loss.sum().clamp(min=1)
    if kind == "token-mean":
        weight = torch.ones_like(lengths) / (lengths * in_loss).sum().clamp(min=1)
    elif kind == "seq-mean-token-mean":
        weight = 1 / (n * lengths.clamp(min=1))
    else:  # seq-mean-token-sum-norm
        weight = torch.ones_like(lengths) / (n * max_length)
    return weight * in_loss


DUAL_CLIP = 10.0  # bound of the ratio where A < 0 (paper: 10)


def clipped_objective(logp, old_logp, A, clip: tuple[float, float]):
    """PPO's clipped objective per token [n], with clip-higher and dual clip (to be maximised).

    logp, old_logp and A are [n]. On-policy, old_logp = logp: the value is A, the gradient A ∇logp.
    Dual clip (arXiv 1912.09729) keeps the objective above DUAL_CLIP * A where A < 0.

    >>> logp = torch.tensor([0.5, 0.5, 3.0])
    >>> clipped_objective(logp, torch.zeros(3), torch.tensor([1.0, -1.0, -1.0]), (0.2, 0.28))
    tensor([  1.2800,  -1.6487, -10.0000])
    """
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    objective = torch.minimum(ratio * A, clipped * A)
    return torch.where(A < 0, torch.maximum(objective, DUAL_CLIP * A), objective)


@torch.no_grad()
def batch_stats(batch, loss, logp, old_logp, args) -> torch.Tensor:
    """Sums [4] over a micro-batch: loss, logp, tokens outside the clip range, tokens."""
    ratio = (logp - old_logp).exp()
    outside = (ratio < 1 - args.clip[0]) | (ratio > 1 + args.clip[1])
    stats = torch.stack([loss, logp.sum(), outside.sum(), torch.ones_like(logp).sum()]).cpu()
    return torch.zeros_like(stats) if batch.is_filler else stats


MAX_GRAD_NORM = 1.0  # the paper's


def optimizer_step(policy, optimizer) -> float:
    """Clip the gradients and take a step if they are finite. Returns their norm before clipping."""
    norm = clip_gradients(policy, MAX_GRAD_NORM)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def clip_gradients(policy, max_norm: float) -> float:
    """Scale the gradients to `max_norm` if their norm is larger. Returns the norm before that."""
    harness.note_memory()
    if torch.cuda.is_available():
        # AdamW makes its moments in its first step. In blocks that the backward pass has freed they
        # would pin these for ever, and the KV cache could not have them.
        torch.cuda.empty_cache()
    return torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm).full_tensor().item()


def count_skipped(skipped: int, grad_norm: float, folder: Path, step: int, samples, A, say) -> int:
    """The number of updates in a row that were skipped because the gradient was not finite.

    Saves the samples of such a step to skipped/.

    Args:
        skipped: that number before this update.

    Raises:
        RuntimeError: this is the third in a row.
    """
    if math.isfinite(grad_norm):
        return 0
    path = folder / "skipped" / f"step_{step:06d}.pt"
    if dist.get_rank() == 0:
        path.parent.mkdir(exist_ok=True)
        torch.save({"samples": samples, "advantages": A}, path)
    say(f"step {step}: the gradient is not finite, so the update is skipped; samples in {path}")
    if skipped == 2:
        raise RuntimeError(
            f"the gradient was not finite 3 times in a row, last at step {step}: try a smaller "
            "--learning-rate or --dtype float32; the samples are in the folder skipped"
        )
    return skipped + 1


# ----------------------------------------------------------------------------------- 6. weight sync


def sync_weights(engine, policy) -> None:
    """Send the policy's weights to the engine, gathering one parameter at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # offloaded shards travel by the GPU
    dtype = engine.llm_engine.model_config.dtype
    weights = (  # cast first: half the bytes travel
        (name, parameter.detach().to(device).to(dtype).full_tensor())
        for name, parameter in policy.lm.named_parameters()
    )
    send_weights(engine, weights, policy.vocab_size, policy.lm.config)


def read_weights(path: str, config):
    """Yields (name, tensor) of each weight in the folder `path` that the model uses."""
    from safetensors import safe_open

    used = {name for name, _ in models.meta_model(config).named_parameters()}
    for file in models.weight_files(path):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name in used:
                    yield name, tensors.get_tensor(name)


def send_weights(engine, weights, vocab_size: int, config) -> dict[str, int]:
    """Replace the engine's weights by `weights`, an iterator of (name, whole tensor).

    Returns:
        bit sums of the weights that were sent, by group: for check_weights().
    """
    wake(engine, "weights")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # adding up is slow on a CPU
    dtype, sums = engine.llm_engine.model_config.dtype, {}
    copied = config.tie_word_embeddings and has_head(engine)

    def adapted():  # to the engine's dtype, untied head and unpadded vocabulary
        for name, weight in weights:
            weight = weight.to(device, dtype)
            if name.endswith(VOCABULARY):
                weight = weight[:vocab_size]
            if config.tie_word_embeddings and name == "lm_head.weight":
                continue
            names = [name]
            if copied and name.endswith("embed_tokens.weight"):
                names.append("lm_head.weight")
            for name in names:
                add_bits(sums, name, bits(weight) * copies(name, config, engine))
                yield name, weight

    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": adapted()})
    engine.reset_prefix_cache()
    return to_integers(sums)


VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # a row each token


def has_head(engine) -> bool:
    """Has the engine's model a head? vLLM's Gemma 2 and Cohere use the embeddings instead."""
    return engine.collective_rpc(lambda worker: hasattr(worker.get_model(), "lm_head"))[0]


def ranks_per_engine(engine) -> int:
    return engine.llm_engine.vllm_config.parallel_config.tensor_parallel_size


# Of matrices that are cut by rows: each rank has the whole bias. The last three: Phi-2, StarCoder 2
ROW_BIASES = ("o_proj.bias", "down_proj.bias", "dense.bias", "fc2.bias", "c_proj.bias")


def copies(name: str, config, engine) -> int:
    """How many ranks of a tensor-parallel engine hold each element of a parameter."""
    tp = ranks_per_engine(engine)
    if "norm" in name or name.endswith(ROW_BIASES):
        return tp
    if "k_proj" in name or "v_proj" in name:
        return max(1, tp // config.num_key_value_heads)
    return 1


def check_sync(engine, policy) -> None:
    """Check that every engine holds exactly the policy's weights, cast to the engine's dtype.

    Raises:
        RuntimeError: they differ. It names the layers, and is raised on every rank.
    """
    check_weights(engine, policy_bits(engine, policy))


def check_weights(engine, expected: dict[str, int]) -> None:
    """Compare each engine's bit sums, added over its ranks, with the expected ones by group.

    Raises:
        RuntimeError: they differ.
    """
    wake(engine, "weights")
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, engine.collective_rpc(engine_bits)[0])
    tp, wrong = ranks_per_engine(engine), set()
    for first in range(0, len(parts), tp):
        for group in {*expected, *parts[first]}:
            held = sum(part.get(group, 0) for part in parts[first : first + tp]) % 2**64
            if held != expected.get(group):
                wrong.add(group)
    if wrong:
        names = sorted(wrong)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise RuntimeError(
            f"the engine's weights are not the policy's ({shown}): it would sample from another "
            "policy. The weight sync failed, or vLLM stores this model's weights in another form"
        )


@torch.no_grad()
def policy_bits(engine, policy) -> dict[str, int]:
    """The bit sums that an engine's weights must have, from the policy's shards on all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, dtype, sums = policy.lm.config, engine.llm_engine.model_config.dtype, {}
    copied = config.tie_word_embeddings and has_head(engine)
    for name, parameter in policy.lm.named_parameters():
        weight = parameter.to_local().to(device).to(dtype)
        if name.endswith(VOCABULARY):
            first = rank * math.ceil(len(parameter) / world_size)  # row of this rank's shard
            weight = weight[: max(0, policy.vocab_size - first)]
        value = bits(weight) * copies(name, config, engine)
        add_bits(sums, name, value)
        if copied and name.endswith("embed_tokens.weight"):
            add_bits(sums, "lm_head.weight", value)
    parts = [None] * world_size
    dist.all_gather_object(parts, to_integers(sums))
    return {group: sum(part[group] for part in parts) % 2**64 for group in parts[0]}


def engine_bits(worker) -> dict[str, int]:
    """Bit sums of this rank's part of the engine's weights; vLLM calls it in its worker."""
    sums = {}
    for prefix, module in worker.get_model().named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.numel() == 0:  # see workarounds.remember_packed_weights()
                value = module.packed_bits
            else:
                if hasattr(module, "shard_indices"):  # of embedding and head: rows that only pad
                    weight = weight[: module.shard_indices.num_org_elements]
                value = bits(weight.to(worker.model_config.dtype))  # a CPU's bias may be float32
            add_bits(sums, f"{prefix}.{name}", value)
    return to_integers(sums)


def bits(weight: torch.Tensor) -> torch.Tensor:
    """Sum of the elements' bit patterns as integers, modulo 2^64.

    Packing, order, sharding and padding with zeros do not change it; a changed element does.

    >>> bits(torch.tensor([1.0, -2.0, 0.0])), bits(torch.tensor([[-2.0], [1.0]]))
    (tensor(-8388608), tensor(-8388608))
    """
    integers = {2: torch.int16, 4: torch.int32}[weight.itemsize]
    return weight.detach().contiguous().view(integers).sum(dtype=torch.int64)


def add_bits(sums: dict, name: str, value: torch.Tensor) -> None:
    """Add a weight's bits to those of its group: a layer, or a name such as embed_tokens."""
    layer = re.search(r"layers\.\d+", name)
    group = layer[0] if layer else name.split(".")[-2]
    sums[group] = sums.get(group, 0) + value


def to_integers(sums: dict[str, torch.Tensor]) -> dict[str, int]:
    """The tensors as integers in [0, 2^64), in one transfer from the device."""
    values = torch.stack(list(sums.values())).tolist() if sums else []
    return {group: value % 2**64 for group, value in zip(sums, values)}


# ------------------------------------------------------------------------------------ 7. evaluation


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k = 1 - C(n-c, k) / C(n, k), if c of n samples are correct (arXiv 2107.03374).

    >>> pass_at_k(8, 0, 8), pass_at_k(8, 1, 8), pass_at_k(4, 2, 1)
    (0.0, 1.0, 0.5)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarize(samples: list[dict], k: int) -> dict:
    """Metrics of an evaluation, from k verified samples per problem, sorted by index.

    Returns:
        avg@k; pass@m for m = 1, 2, 4, ... and k; standard_error of avg@k, over problems; number of
        problems; mean length in tokens; fractions truncated and boxed; thoughts/*.
    """
    correct = np.array([s["reward"] for s in samples]).reshape(-1, k)  # [problems, k]
    result = {f"avg@{k}": float(correct.mean())}
    for m in sorted({2**i for i in range(k.bit_length())} | {k}):
        result[f"pass@{m}"] = float(np.mean([pass_at_k(k, int(c), m) for c in correct.sum(1)]))
    n = len(correct)
    error = float(correct.mean(1).std(ddof=1) / n**0.5) if n > 1 else float("nan")
    result["standard_error"] = error
    lengths = [s["length"] for s in samples]
    result |= {"problems": n, "length": float(np.mean(lengths))}
    for key in ("truncated", "boxed"):
        result[key] = float(np.mean([s[key] for s in samples]))
    return result | thoughts.rates([s["thoughts"] for s in samples], lengths)


def sample_and_verify(engine, problems, k: int, stop, tokenizer, verifier, args) -> list[dict]:
    """Sample and verify k responses per problem; all samples on every rank, with fixed seeds."""
    samples = rollout(engine, problems, k, f"{args.seed} eval", stop, args)
    verify(samples, [p["answer"] for p in problems for _ in range(k)], tokenizer, verifier, args)
    return gather(samples)


def evaluate(engine, datasets: dict, stop, tokenizer, verifier, args) -> dict:
    """Metrics eval/NAME/KEY of each data set: avg@k, pass@k, length, truncated, boxed, thoughts.

    One rollout samples all sets, so that there is one wait for the longest response.

    Args:
        datasets: {NAME: problems of inputs.encode_prompts()}.
    """
    metrics, k = {}, args.eval_num_samples
    keys = f"avg@{k} pass@{k} length truncated boxed thoughts/reflection thoughts/transition"
    problems = [problem for each in datasets.values() for problem in each]
    samples = sample_and_verify(engine, problems, k, stop, tokenizer, verifier, args)
    start = 0
    for name, each in datasets.items():
        result = summarize(samples[start : start + len(each) * k], k)
        metrics |= {f"eval/{Path(name).stem}/{key}": result[key] for key in keys.split()}
        start += len(each) * k
    return metrics
