"""Helpers of the four training scripts: small, independent functions that a reader can skip.

The algorithms are in grpo_baseline.py, prerl.py, nsr_prerl.py and dsrl.py. In order of use: engine
and rollout, advantages and loss, policy and micro-batches, canary, evaluation. What a run reads is
in inputs.py; command line, output folder and checkpoints are in harness.py.
"""

import math
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import grading
import thoughts

# ------------------------------------------------------------------------------- engine and rollout


def make_engine(path: str, tokenizer, args):
    """vLLM in this process. Ranks r*TP .. r*TP+TP-1 form one tensor-parallel engine.

    Weights are not read from disk: the first sync brings them. The engine's vocabulary is cut to
    the tokenizer's, so that the ids Qwen pads its embeddings with can never be sampled.
    """
    if torch.cuda.is_available():
        # CUDA graphs stay on; sleep mode gives the memory back to the trainer between rollouts.
        extra = dict(
            gpu_memory_utilization=args.gpu_memory_utilization,
            enable_sleep_mode=True,
        )
        # In float32 vLLM's attention is Triton's, whose matrix products would be TF32.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    else:
        # A small function of vLLM's sampler would be compiled at the first token: seconds lost, and
        # a failure where there is no C++ compiler. The flag is read as vLLM is imported.
        torch._dynamo.config.disable = True
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
        from vllm.kernels import vllm_c

        # Tensor parallel: the ranks' shared memory gets a name of this run's own. All others would
        # have the same, also one that was killed and has left its memory behind.
        _CPUSHMDistributed.make_group_name = staticmethod(
            lambda group: f"{os.environ['MASTER_PORT']}-{group.unique_name}-{group.ranks}"
        )
        # Its CPU build has this kernel, but vLLM takes ten operations there unless it is told to.
        vllm_c.fused_add_rms_norm.supported = True
        length = args.max_prompt_length + args.max_completion_length
        extra = dict(
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 30,
            max_num_seqs=256,
            # A prompt cut in chunks makes vLLM rewind the sample's generator, which CPU ones can't.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(8192, length),
            ir_op_priority={"fused_add_rms_norm": ["vllm_c", "native"]},
        )
    from vllm import LLM

    set_num_threads = torch.set_num_threads
    engine = LLM(
        path,
        load_format="dummy",
        # Untied: vLLM's CPU kernels repack a tied head at load, and a reload would not reach it.
        hf_overrides={"vocab_size": len(tokenizer), "tie_word_embeddings": False},
        dtype="float32" if args.dtype == "float64" else args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        distributed_executor_backend="external_launcher",
        max_model_len=args.max_prompt_length + args.max_completion_length,
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
        seed=args.seed,
        disable_log_stats=True,
        **extra,
    )
    torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a stub in its place
    if not torch.cuda.is_available() and args.tensor_parallel_size > 1:
        # All ranks have the shared memory by now: without its name, it goes when they end.
        for memory in Path("/dev/shm").glob(f"{os.environ['MASTER_PORT']}-*"):
            memory.unlink(missing_ok=True)
    if torch.cuda.is_available():
        # Level 1 keeps a copy in host memory. Level 2 drops the weights, which would be right as
        # every sync replaces them, but has had bugs that return garbage.
        engine.sleep(level=1)
    return engine


def sync_weights(engine, policy, dtype: torch.dtype) -> None:
    """Send the trainer's weights to the engine: one parameter at a time is gathered and sent."""
    weights = (  # cast first: half the bytes travel
        (name, parameter.detach().to(dtype).full_tensor())
        for name, parameter in policy.lm.named_parameters()
    )
    send_weights(engine, weights, policy.vocab_size, policy.lm.config.tie_word_embeddings)


def read_weights(path: str):
    """(name, tensor) of each weight of a checkpoint's *.safetensors."""
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def send_weights(engine, weights, vocab_size: int, tied: bool) -> None:
    """Replace the engine's weights by `weights`, an iterator of (name, whole tensor).

    On CUDA the weights wake first and the KV cache only in rollout(): they never peak together.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if engine.llm_engine.is_sleeping():
            engine.wake_up(tags=["weights"])

    def adapted():  # to the engine's untied head and unpadded vocabulary
        for name, weight in weights:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weight = weight[:vocab_size]
            if not (tied and name == "lm_head.weight"):
                yield name, weight
            if tied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", weight

    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": adapted()})
    engine.reset_prefix_cache()


def rollout(engine, problems: list[dict], num_samples: int, seed: str, args) -> list[dict]:
    """Sample y ~ π(·|x): `num_samples` responses to each problem, this rank's share of them.

    Each tensor-parallel group takes every n-th problem; each of its ranks keeps a part of the
    samples. A sample depends only on (seed, problem's id, its number), not on the ranks.

    Returns:
        dicts of index (problem * num_samples + number), ids (int32 [T], EOS included), logprobs
        (float32 [T], the sampler's) and truncated (bool).
    """
    from vllm import SamplingParams

    tp, rank = args.tensor_parallel_size, dist.get_rank()
    mine = range(rank // tp, len(problems), dist.get_world_size() // tp)
    params = [
        SamplingParams(
            n=num_samples,
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_completion_length,
            seed=random.Random(f"{seed} {problems[i]['id']}").getrandbits(31),
            logprobs=0,
            flat_logprobs=True,  # lists, not a dictionary for every token
            detokenize=False,
        )
        for i in mine
    ]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the trainer has freed is for the KV cache
        engine.wake_up(tags=["weights"])  # no effect right after a sync
        engine.wake_up(tags=["kv_cache"])
    prompts = [{"prompt_token_ids": problems[i]["prompt_ids"]} for i in mine]
    outputs = engine.generate(prompts, params, use_tqdm=False) if prompts else []
    if torch.cuda.is_available():
        engine.sleep(level=1)
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
    """Every rank's samples on every rank, by index."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, samples)
    return sorted((s for part in parts for s in part), key=lambda s: s["index"])


def judge(samples: list[dict], golds: list[str], tokenizer, pool, args) -> dict:
    """Add text, reward and thoughts to this rank's samples; a truncated response gets reward 0.

    Args:
        golds: the answer of each of the step's samples, by index.

    Returns:
        the counts timeouts and errors.
    """
    texts = tokenizer.batch_decode([s["ids"] for s in samples], skip_special_tokens=True)
    answers = [golds[s["index"]] for s in samples]
    rewards, timeouts, errors = grading.verify(pool, texts, answers, args)
    for sample, text, reward in zip(samples, texts, rewards):
        sample["reward"] = 0.0 if sample["truncated"] else reward
        sample["text"], sample["length"] = text, len(sample["ids"])
        sample["thoughts"] = thoughts.count(text)
    counts = torch.tensor([timeouts, errors])
    dist.all_reduce(counts)
    return {"verify/timeouts": int(counts[0]), "verify/errors": int(counts[1])}


def rollout_metrics(samples: list[dict], rewards: torch.Tensor, args) -> dict:
    """What the step's samples look like."""
    solved = rewards.view(-1, args.num_generations).mean(1)  # [P]
    lengths = [s["length"] for s in samples]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/solve_all": (solved == 1).float().mean().item(),
        "reward/solve_none": (solved == 0).float().mean().item(),
        "completion/length": float(np.mean(lengths)),
        "completion/truncated": float(np.mean([s["truncated"] for s in samples])),
        # E[-log π(y_t | x, y_<t)] over y ~ π is the entropy: no full distribution is needed.
        "policy/entropy": float(-np.concatenate([s["logprobs"] for s in samples]).mean()),
        **thoughts.rates([s["thoughts"] for s in samples], lengths),
    }


# ------------------------------------------------------------------------------ advantages and loss


def advantages(rewards: torch.Tensor, group_size: int, kind: str) -> torch.Tensor:
    """A [N] from r [N], whose groups of `group_size` neighbours answer the same problem.

    grpo: (r - group mean) / (group std + 1e-6), the sample's std (ddof 1), as verl. dr_grpo: r -
    group mean. rloo: r - mean of the others in the group. reinforce++: (r - mean) / (std + 1e-6)
    over the whole batch.

    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "dr_grpo")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "grpo")
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "rloo")
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    if kind == "reinforce++":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    r = rewards.view(-1, group_size)  # [P, G]
    A = r - r.mean(1, keepdim=True)
    if kind == "grpo":
        A = A / (r.std(1, keepdim=True) + 1e-6)
    elif kind == "rloo":
        A = A * group_size / (group_size - 1)
    return A.flatten()


def sign_weights(A: torch.Tensor, positive: float, negative: float) -> torch.Tensor:
    """Weight [N] of each sample: `positive` where A > 0, `negative` where A < 0.

    A sample with A = 0 belongs to neither sign; it counts (in the mean) when both signs do.

    >>> sign_weights(torch.tensor([2.0, -1.0, 0.0]), 0.1, 1.0)
    tensor([0.1000, 1.0000, 1.0000])
    >>> sign_weights(torch.tensor([2.0, -1.0, 0.0]), 0.0, 1.0)
    tensor([0., 1., 0.])
    """
    neither = torch.full_like(A, float(positive != 0 and negative != 0))
    return torch.where(A > 0, positive, torch.where(A < 0, negative, neither))


def token_weights(counted: torch.Tensor, lengths: torch.Tensor, kind: str, max_length: int):
    """What a token of each sample weighs in the loss [N]; the sum over the step makes a mean.

    One normaliser for the whole step, so micro-batches and ranks only add up.

    Args:
        counted: bool [N]; lengths: response tokens [N]; max_length: of a completion, in tokens.

    >>> token_weights(torch.tensor([True, True]), torch.tensor([1, 3]), "token-mean", 8)
    tensor([0.2500, 0.2500])
    >>> token_weights(torch.tensor([True, True]), torch.tensor([1, 4]), "seq-mean-token-mean", 8)
    tensor([0.5000, 0.1250])
    """
    n = counted.sum().clamp(min=1)
    if kind == "token-mean":
        weight = torch.ones_like(lengths) / (lengths * counted).sum().clamp(min=1)
    elif kind == "seq-mean-token-mean":
        weight = 1 / (n * lengths.clamp(min=1))
    else:  # seq-mean-token-sum-norm; for microbatch-token-mean, microbatch_weights() takes over
        weight = torch.ones_like(lengths) / (n * max_length)
    return weight * counted


def microbatch_weights(plan: list[list[list[int]]], lengths: torch.Tensor) -> torch.Tensor:
    """What a token of each sample weighs [N] if every micro-batch takes a mean of its own.

    As the authors' code: a micro-batch's mean over its tokens counts by its share of the samples.

    Args:
        plan: of plan_microbatches(); lengths: response tokens [N].

    >>> microbatch_weights([[[0, 1], [2]]], torch.tensor([1, 3, 2]))
    tensor([0.1667, 0.1667, 0.1667])
    >>> microbatch_weights([[[0], [1, 2]]], torch.tensor([1, 3, 2]))
    tensor([0.3333, 0.1333, 0.1333])
    """
    batches = [batch for part in plan for batch in part if batch]
    weight = torch.zeros(len(lengths))
    for batch in batches:
        weight[batch] = len(batch) / sum(map(len, batches)) / lengths[batch].sum()
    return weight


def clipped_objective(logp, old_logp, A, clip_low: float, clip_high: float, dual_clip: float):
    """PPO's clipped objective per token [n], with clip-higher and dual clip (to be maximised).

    On-policy old_logp = logp: the value is A and the gradient A ∇logp. Dual clip (arXiv 1912.09729)
    bounds the objective of A < 0 from below by dual_clip * A.

    >>> logp = torch.tensor([0.5, 0.5, 3.0])
    >>> clipped_objective(logp, torch.zeros(3), torch.tensor([1.0, -1.0, -1.0]), 0.2, 0.28, 10.0)
    tensor([  1.2800,  -1.6487, -10.0000])
    """
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * A, clipped * A)
    return torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)


@torch.no_grad()
def batch_stats(loss, logp, old_logp, args) -> torch.Tensor:
    """Of a micro-batch: loss, Σ logp, tokens whose ratio left the clip range, tokens; [4]."""
    ratio = (logp - old_logp).exp()
    outside = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
    return torch.stack([loss, logp.sum(), outside.sum(), torch.ones_like(logp).sum()]).cpu()


# ------------------------------------------------------------------------- policy and micro-batches


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[y], a chunk of tokens at a time.

    Neither pass holds more than one chunk of logits, in one buffer; the backward computes them
    again, but not their normaliser. The gradient of W adds up in place, where autograd would make
    a new [V, H] for every chunk.
    """

    @staticmethod
    def logits(h, W, temperature: float, chunk: int):
        """Of each chunk: its tokens (a slice), float32 logits [c, V], a like matrix in h's dtype.

        All chunks use the same memory: on a CPU, getting new memory takes longer than filling it.
        Rows begin at multiples of 8: a tokenizer's odd number of words would cost a GPU its fast
        kernels.
        """
        rows, words = min(chunk, len(h)), len(W)
        product = h.new_empty(rows, (words + 7) // 8 * 8)[:, :words]
        wide = product.to(torch.promote_types(h.dtype, torch.float32))  # itself, if h is float32
        for i in range(0, len(h), chunk):
            c = slice(i, min(i + chunk, len(h)))
            low, z = product[: c.stop - i], wide[: c.stop - i]
            z.copy_(torch.mm(h[c], W.T, out=low))
            yield c, z if temperature == 1 else z.div_(temperature), low

    @staticmethod
    def forward(ctx, h, W, y, temperature: float, chunk: int):
        ctx.temperature, ctx.chunk = temperature, chunk
        wide = torch.promote_types(h.dtype, torch.float32)
        chosen, norm = h.new_empty(len(h), dtype=wide), h.new_empty(len(h), 1, dtype=wide)
        for c, z, _ in TokenLogprobs.logits(h, W, temperature, chunk):
            chosen[c] = z.gather(1, y[c, None])[:, 0]
            top = z.amax(-1, keepdim=True)
            norm[c] = top + z.sub_(top).exp_().sum(-1, keepdim=True).log_()  # log Σ exp, in place
        ctx.save_for_backward(h, W, y, norm)
        return chosen - norm[:, 0]

    @staticmethod
    def backward(ctx, grad):
        h, W, y, norm = ctx.saved_tensors
        grad_h, part = torch.zeros_like(h), torch.empty_like(W)
        grad_W = torch.zeros(W.shape, dtype=norm.dtype, device=W.device)
        for c, z, d in TokenLogprobs.logits(h, W, ctx.temperature, ctx.chunk):
            g = grad[c, None] / ctx.temperature
            z.sub_(norm[c]).exp_().mul_(-g)  # ∂logp/∂logits = onehot(y) - softmax
            d.copy_(z.scatter_add_(1, y[c, None], g))
            grad_h[c] = d @ W
            grad_W += torch.mm(d.T, h[c], out=part)
        return grad_h, grad_W.to(W.dtype), None, None, None


class Policy(nn.Module):
    """A Hugging Face causal LM whose forward gives log-probs of chosen tokens, never full logits.

    A module of its own so that FSDP's root gathers embeddings and head around this very forward.
    """

    def __init__(self, lm, vocab_size: int, temperature: float, chunk: int = 2048):
        super().__init__()
        self.lm, self.vocab_size = lm, vocab_size
        self.temperature, self.chunk = temperature, chunk

    def forward(self, tokens: torch.Tensor, is_response: torch.Tensor, prefix: list[int] = ()):
        """log π(token_t | prefix, tokens_<t), float32 [n], at the n marked tokens.

        Args:
            tokens: [B, L], right-padded. Attention is causal, so padding needs no mask; positions
                start at 0, whichever the context is.
            is_response: bool [B, L].
            prefix: tokens that come before each of the B rows, computed once for all of them.
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
        head = self.lm.lm_head.weight[: self.vocab_size]  # without the padded vocabulary
        return TokenLogprobs.apply(
            hidden[marked], head, tokens[:, first:][marked], self.temperature, self.chunk
        )


def plain_attention(module, q, k, v, mask, scaling: float, **_):
    """softmax(q kᵀ scaling + mask) v as matrix products, in q's dtype.

    The queries of a key-value head, H/K heads of them, are rows of one matrix: keys and values are
    not repeated.

    Args:
        q: [B, H, L, D]; k, v: [B, K, S, D]; mask: added to the scores [B, H, L, S].

    Returns:
        [B, L, H, D], and None, as transformers asks.
    """
    B, H, L, D = q.shape
    scores = (q * scaling).reshape(B, k.shape[1], -1, D) @ k.mT  # [B, K, H/K * L, S]
    weights = scores.view(B, H, L, -1).add_(mask).softmax(-1)
    out = weights.view(scores.shape) @ v
    return out.view(B, H, L, D).transpose(1, 2).contiguous(), None


def load_policy(path: str, config, tokenizer, args, device) -> Policy:
    """The model sharded by FSDP2: compute in --dtype; master weights and reduce in float32.

    Rank 0 reads the checkpoint, the others receive their shards.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype)
    master = torch.promote_types(dtype, torch.float32)
    if device.type == "cuda" and dtype == torch.float32:
        # For grouped queries in float32 CUDA has the plain kernel only, which needs memory by the
        # length squared. With keys and values repeated it has another.
        from transformers.integrations import sdpa_attention

        sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    attention = "sdpa"
    if device.type == "cpu" and dtype == torch.bfloat16:
        # Plain matrix products are faster here, but need memory by the length squared.
        if args.max_prompt_length + args.max_completion_length <= 1024:
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.masking_utils import eager_mask

            attention = "plain"
            AttentionInterface.register(attention, plain_attention)
            AttentionMaskInterface.register(attention, eager_mask)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=master, attn_implementation=attention)
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, len(tokenizer), args.temperature).train()
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
    """AdamW with the paper's betas, over this rank's shards."""
    return torch.optim.AdamW(
        policy.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
    )


def clip_gradients(policy, max_norm: float) -> float:
    """Scale the gradients to `max_norm` if their norm is larger. Returns the norm before."""
    if torch.cuda.is_available():
        # AdamW makes its moments in its first step. In blocks that the backward pass has freed they
        # would pin these for ever, and the KV cache could not have them.
        torch.cuda.empty_cache()
    return torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm).full_tensor().item()


def skip_update(folder: Path, step: int, samples: list[dict], A, skipped: int, say) -> int:
    """The gradient is not finite: save the step's samples for inspection instead of updating.

    Returns:
        how many updates in a row were skipped. The third ends the run.
    """
    path = folder / "skipped" / f"step_{step:06d}.pt"
    if dist.get_rank() == 0:
        path.parent.mkdir(exist_ok=True)
        torch.save({"samples": samples, "advantages": A}, path)
    say(f"step {step}: the gradient is not finite, no update is made; samples in {path}")
    if skipped == 2:
        raise RuntimeError(
            f"the gradient was not finite 3 times in a row, last at step {step}: a smaller "
            "--learning-rate, or float32, may help; the samples are in the folder skipped"
        )
    return skipped + 1


def sampler_logprobs(samples: list[dict], batch: list[int], device) -> torch.Tensor:
    """The engine's log-probs of the batch's response tokens, float32 [n]."""
    parts = [samples[i]["logprobs"] for i in batch] or [np.zeros(0, np.float32)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def split_prefix(contexts: list[list[int]], responses: list, args) -> tuple[list, list]:
    """Take off what all contexts begin with, as few-shot prompts do, if that is much of the work.

    Under gradient checkpointing, which computes each layer anew, there is no cache to share.

    Returns:
        the prefix ([] if it is less than a third of all tokens), and the contexts without it.

    >>> from types import SimpleNamespace as Args
    >>> split_prefix([[1, 2, 3], [1, 2, 4]], [[5], [6]], Args(gradient_checkpointing=False))
    ([1, 2], [[3], [4]])
    """
    prefix = os.path.commonprefix(contexts)  # of lists as well
    total = sum(len(x) + len(y) for x, y in zip(contexts, responses))
    if args.gradient_checkpointing or 3 * len(prefix) * len(contexts) < total:
        prefix = []
    return prefix, [x[len(prefix) :] for x in contexts]


def plan_microbatches(indices: list[int], lengths: list[int], max_tokens: int, world_size: int):
    """Pack samples of like length: a list of micro-batches (lists of indices) for each rank.

    No micro-batch pads to more than `max_tokens` (unless one sample alone does); every rank gets
    the same number, since FSDP's collectives must stay aligned: largest ones are halved, and empty
    ones added, until it fits. Those that run side by side on different ranks are of like length.

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


# -------------------------------------------------------------------- canary and gradient alignment


@torch.no_grad()
def score(policy, prompts: list[list[int]], samples: list[dict], args, device) -> dict:
    """The canary: up to 4 of the step's samples a rank, scored by the trainer, with the prompt.

    Runs before the update: the engine has these very weights, so the gap is rounding only; a large
    one means that the sync failed.

    Returns:
        sync/logprob_gap, the mean |trainer's - sampler's log-prob| per token.
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
    x, y = ([each[i] for i in batch] for each in (prompts, responses))
    prefix, x = split_prefix(x, y, args)
    logp = policy(*collate(x, y, range(len(batch)), device), prefix)
    policy.reshard()  # FSDP's root stays gathered after a forward without backward
    gap = (logp - sampler_logprobs(samples, batch, device)).abs().cpu()
    total = torch.tensor([gap.sum(), len(gap)], dtype=torch.float64)
    dist.all_reduce(total)
    return {"sync/logprob_gap": (total[0] / total[1].clamp(min=1)).item()}


def check_gap(gap: float, args) -> None:
    """Stop if the engine's log-probs have left the trainer's (not comparable for top-p < 1)."""
    limit = args.max_logprob_gap or (0.001 if args.dtype == "float32" else 0.1)
    if math.isnan(gap):
        raise RuntimeError(
            "sync/logprob_gap is NaN: a weight is not finite. The last checkpoint is sound; a "
            "smaller --learning-rate may help"
        )
    if args.top_p == 1 and not gap <= limit:
        raise RuntimeError(
            f"sync/logprob_gap is {gap:.4g}, over {limit:g}: the engine does not sample from the "
            "trainer's weights, so this step would train on a lie. The weight sync is broken"
        )


def batch_gradient(policy, contexts, responses, weights: list, args, device) -> list:
    """∇ Σ_i Σ_t weights_it log π(y_it | context_i, y_i<t), without touching the weights.

    Args:
        weights: of each response's tokens, [T_i]; a response with only zeros is left out.

    Returns:
        this rank's shard of the gradient of each parameter. Gradients are None afterwards.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = [len(x) + len(y) for x, y in zip(contexts, responses)]
    active = [i for i, w in enumerate(weights) if w.any()]
    plan = plan_microbatches(active, total, args.max_tokens_per_microbatch, world_size)
    for batch in plan[rank]:
        logp = policy(*collate(contexts, responses, batch, device))
        w = torch.cat([weights[i] for i in batch] or [logp.new_empty(0)]).to(logp)
        (world_size * (w * logp).sum()).backward()  # FSDP averages over ranks
    gradient = []
    for parameter in policy.parameters():
        grad = parameter if parameter.grad is None else parameter.grad
        grad = grad.to_local().detach()
        gradient.append(torch.zeros_like(grad) if parameter.grad is None else grad)
        parameter.grad = None
    return gradient


def dot(a: list, b: list) -> float:
    """Inner product of two sharded vectors, over all ranks, in float64."""
    total = sum((u.double() * v.double()).sum() for u, v in zip(a, b)).cpu()
    dist.all_reduce(total)
    return total.item()


def cosine(a: list, b: list) -> float:
    """Of the angle between two sharded vectors; NaN if one is zero."""
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norms if norms else float("nan")


def alignment(policy, contexts, prompts, responses, weights, rewards, args, device) -> dict:
    """How far this update points along GRPO's: the cosine of the two batch gradients.

    Args:
        weights: A [N] of the update in its space, 0 for samples that do not count; rewards: [N].
    """
    grpo = advantages(rewards, args.num_generations, "grpo")
    each = [torch.ones(len(y)) for y in responses]
    own, other = (
        batch_gradient(policy, x, responses, [a * e for a, e in zip(A, each)], args, device)
        for x, A in ((contexts, weights), (prompts, grpo))
    )
    return {"alignment/cosine_to_grpo": cosine(own, other)}


# --------------------------------------------------------------------------------------- evaluation


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased 1 - C(n-c, k) / C(n, k): the chance that k of n samples hold one of c right ones.

    >>> pass_at_k(8, 0, 8), pass_at_k(8, 1, 8), pass_at_k(4, 2, 1)
    (0.0, 1.0, 0.5)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarize(samples: list[dict], k: int) -> dict:
    """Figures of an evaluation: k judged samples to each problem, by index.

    Returns:
        avg@k; pass@m for m = 1, 2, 4, ... and k; standard_error of avg@k, over problems; problems;
        length (tokens); truncated (share); thoughts/*.
    """
    right = np.array([s["reward"] for s in samples]).reshape(-1, k)  # [problems, k]
    result = {f"avg@{k}": float(right.mean())}
    for m in sorted({2**i for i in range(k.bit_length())} | {k}):
        result[f"pass@{m}"] = float(np.mean([pass_at_k(k, int(c), m) for c in right.sum(1)]))
    n = len(right)
    result["standard_error"] = float(right.mean(1).std(ddof=1) / n**0.5) if n > 1 else float("nan")
    lengths = [s["length"] for s in samples]
    result |= {"problems": n, "length": float(np.mean(lengths))}
    result["truncated"] = float(np.mean([s["truncated"] for s in samples]))
    return result | thoughts.rates([s["thoughts"] for s in samples], lengths)


def sample_and_judge(engine, problems, k: int, tokenizer, pool, args) -> list[dict]:
    """k judged samples to each problem, on every rank; the same seeds at every call."""
    samples = rollout(engine, problems, k, f"{args.seed} eval", args)
    judge(samples, [p["answer"] for p in problems for _ in range(k)], tokenizer, pool, args)
    return gather(samples)


def evaluate(engine, datasets: dict, tokenizer, pool, args) -> dict:
    """eval/NAME/avg@k, pass@k, length, truncated and thoughts of each data set."""
    metrics, k = {}, args.eval_num_samples
    keys = f"avg@{k} pass@{k} length truncated thoughts/reflection thoughts/transition".split()
    for name, problems in datasets.items():
        result = summarize(sample_and_judge(engine, problems, k, tokenizer, pool, args), k)
        metrics |= {f"eval/{Path(name).stem}/{key}": result[key] for key in keys}
    return metrics
