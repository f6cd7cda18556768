"""Measure gradient alignment, the paper's theory (section 3 and figure 2).

    python grad_alignment.py --model Qwen3-4B --dataset amc23 --num-rollouts 400
    python grad_alignment.py --preset lab

A step that changes log π(y) also changes log π(y|x) if their gradients align. With θ' = θ + η g₁,

    ℓ_θ'(y|x) ≈ ℓ_θ(y|x) + η ⟨g₁, g₂⟩      g₁ = ∇ℓ(y|BOS), ℓ(y|BOS) = mean_t log π(y_t | BOS, y_<t)
                                           g₂ = ∇ℓ(y|x), ℓ(y|x) = mean_t log π(y_t | x, y_<t)

For every rollout y ~ π(·|x) this measures ⟨g₁, g₂⟩ and the cosine over all parameters; for some,
both sides of the line above; for the whole batch, the cosines of the methods' updates with GRPO's;
for some tokens, the cosine of ∇ log π(y_t | BOS, y_<t) and ∇ log π(y_t | x, y_<t). With --modes it
also measures how far each method's first update moves the policy from one mode of response to
another, such as from short answers to careful ones, per step of equal length.

Writes alignment.json (every number), alignment.png, tokens.html (responses coloured by what the
prompt adds to each token) and rollouts.parquet. All ranks work on the same rollout, so more GPUs
lower the memory per GPU but not the time.
"""

import html
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import common
import data
import grading
import harness
import inputs


@dataclass
class Args:
    # Model and data
    model: str = "Qwen/Qwen3-4B"
    """hub id, local folder, or bare name of a known family"""
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    """dtype of the gradients; the engine samples in float32 where this is float64"""
    dataset: str = "amc23"
    """problems, named as in training (paper: AMC 2023)"""
    seed: int = 1
    """seed of sampling"""

    # Rollout
    num_rollouts: int = 400
    """responses in all (paper: 400)"""
    num_generations: int = 10
    """responses per problem, the group size G"""
    system_prompt: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """system prompt of every problem; empty: none"""
    max_completion_length: int = 8192
    """most tokens of a response; reduced to fit the model's context"""
    temperature: float = 1.0
    """sampling temperature, also used for the log-probs"""
    grader: Literal["math-verify", "boxed-string"] = "math-verify"
    """math-verify: spelling rules, then math-verify's algebra; boxed-string: the authors' string
    comparison"""

    # Measurement
    bos_token: str = ""
    """token in place of the prompt in pre-train space; default: BOS, or <|im_start|> without BOS"""
    num_finite_steps: int = 20
    """rollouts for which the step θ + η g₁ is taken and its effect measured"""
    finite_step: float = 1e-3
    """increase of mean_t log π(y_t | BOS, y_<t) by that step, to first order, in nats"""
    num_tokens: int = 200
    """single tokens whose two gradients are compared"""
    modes: str = ""
    """.jsonl file, a row for each prompt with problem and two responses, careful and careless, or
    only how they begin: measure which methods' first update makes the careful one likelier"""

    # Run
    preset: Literal["paper", "lab", "smollm"] = "paper"
    """set of defaults, as in training"""
    output_dir: str = ""
    """folder of the results; default: runs/grad_alignment__MODEL__DATASET__sSEED__TIME"""
    num_pages: int = 10
    """responses in tokens.html"""

    # Machine
    num_processes: int = 0
    """number of processes; 0: one per GPU, or one on a CPU"""
    tensor_parallel_size: int = 1
    """ranks per vLLM engine"""
    gpu_memory_utilization: float = 0.4
    """fraction of a GPU's memory for vLLM"""
    max_tokens_per_microbatch: int = 16384
    """most tokens in one forward pass, padding included"""
    gradient_checkpointing: bool = True
    """recompute each layer's activations in the backward pass"""
    cpu_offload: bool = False
    """keep the weights in host memory"""


def main(args: Args) -> None:
    rank, world_size, device = harness.init_distributed()
    harness.check_args(args)
    path, config, tokenizer = inputs.load_model_files(args)
    problems = inputs.load_problems(args.dataset, "test")
    bos = inputs.find_bos(tokenizer, args.bos_token)
    vocab_size = inputs.num_tokens(tokenizer, config)
    stop = inputs.find_stop_tokens(path, tokenizer, vocab_size)
    problems = inputs.encode_prompts(problems, tokenizer, args)
    modes = read_modes(args.modes, tokenizer, args) if args.modes else []
    wanted = max(1, args.num_rollouts // args.num_generations)
    if wanted < len(problems):
        problems = random.Random(args.seed).sample(problems, wanted)
    verifier = grading.start_verifier()
    problems = inputs.check_references(args.dataset, problems, verifier, args)
    inputs.fit_context([problems], config, args)
    if longest := max((len(m["prompt_ids"]) + len(m[k]) for m in modes for k in MODES), default=0):
        if longest > config.max_position_embeddings:
            harness.fail(f"--modes {args.modes}: a row has {longest} tokens, over the context")
    folder = harness.make_output_dir(args)
    say = harness.quiet(folder)
    say(f"{args.model}: {len(problems)} problems x {args.num_generations}, output in {folder}")

    engine = common.make_engine(path, vocab_size, args)
    policy = common.load_policy(path, config, vocab_size, args, device)
    common.sync_weights(engine, policy)
    common.check_sync(engine, policy)
    samples = common.sample_and_verify(
        engine, problems, args.num_generations, stop, tokenizer, verifier, args
    )
    verifier.stop()
    prompts = [p["prompt_ids"] for p in problems for _ in range(args.num_generations)]  # x
    responses = [s["ids"] for s in samples]  # y
    rewards = torch.tensor([s["reward"] for s in samples], dtype=torch.float64)  # [N]
    correct = rewards.mean().item()
    say(f"{len(samples)} rollouts, fraction correct {correct:.3f}; computing their gradients")

    logps = {  # of every response's tokens, [N][T]
        "bos": logprobs(policy, [[bos]] * len(prompts), responses, args, device),
        "x": logprobs(policy, prompts, responses, args, device),
    }
    result = {"model": args.model, "dataset": args.dataset, "bos": bos, "reward": correct}
    result |= compare_rollouts(policy, prompts, responses, rewards, bos, logps, args, device, say)
    say("computing gradients of single tokens")
    result["tokens"] = compare_tokens(policy, prompts, responses, bos, logps, args, device)
    result["summary"] = summary(result["rollouts"])
    if modes:
        say("now the modes")
        result["modes"] = compare_modes(
            policy, prompts, responses, rewards, bos, modes, args, device
        )
    if rank == 0:
        (folder / "alignment.json").write_text(json.dumps(result, indent=1) + "\n")
        import pyarrow.parquet  # here: the training scripts, which import this file, start faster

        rows = [
            dict(prompt_ids=x, response_ids=y.tolist(), response=s["text"], reward=s["reward"])
            for x, y, s in zip(prompts, responses, samples)
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "rollouts.parquet")
        draw(result, folder / "alignment.png")
        first = {s["text"]: i for i, s in reversed(list(enumerate(samples)))}  # texts that differ
        different = sorted(first.values())
        chosen = [i for i in different if rewards[i] == 1][: args.num_pages // 2]
        incorrect = [i for i in different if rewards[i] != 1]
        chosen += incorrect[: args.num_pages - len(chosen)]
        page = tokens_page(result, prompts, responses, logps, tokenizer, chosen)
        (folder / "tokens.html").write_text(page)
        say(report(result))
        say(f"alignment.json, alignment.png and tokens.html are in {folder}")
    harness.shutdown(engine)


# ---------------------------------------------------------------------------------------- gradients


def batch_gradient(policy, contexts, responses, weights: list, args, device) -> list:
    """∇ Σ_i Σ_t weights_it log π(y_it | context_i, y_i<t); the model stays as it is.

    Args:
        weights: a tensor [T_i] for each response; a response with only zeros is not computed.

    Returns:
        this rank's shard of the gradient of each parameter. The parameters' .grad is None again.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = [len(x) + len(y) for x, y in zip(contexts, responses)]
    active = [i for i, w in enumerate(weights) if w.any()]
    plan = common.plan_microbatches(active, total, args.max_tokens_per_microbatch, world_size)
    for batch in plan[rank]:
        logp = policy(*common.collate(contexts, responses, batch, device))
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
    """Inner product of two sharded vectors: lists of shards, summed over all ranks in float64."""
    total = sum((u.double() * v.double()).sum() for u, v in zip(a, b)).cpu()
    dist.all_reduce(total)
    return total.item()


def cosine(a: list, b: list) -> float:
    """Cosine of the angle between two sharded vectors; NaN if one of them is zero."""
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norms if norms else float("nan")


def alignment(policy, contexts, prompts, responses, weights, rewards, args, device) -> dict:
    """The cosine of this update's batch gradient with GRPO's on the same samples.

    Args:
        weights: A [N] of the update, 0 for samples outside its loss; rewards: [N].
    """
    grpo = common.advantages(rewards, args.num_generations, "grpo")
    each = [torch.ones(len(y)) for y in responses]
    own, other = (
        batch_gradient(policy, x, responses, [a * e for a, e in zip(A, each)], args, device)
        for x, A in ((contexts, weights), (prompts, grpo))
    )
    return {"alignment/cosine_to_grpo": cosine(own, other)}


# ---------------------------------------------------------------------------------- the measurement


@torch.no_grad()
def logprobs(policy, contexts, responses, args, device) -> list[np.ndarray]:
    """log π(y_t | context, y_<t) of every response, [N][T], on every rank."""
    total = [len(x) + len(y) for x, y in zip(contexts, responses)]
    plan = common.plan_microbatches(
        range(len(total)), total, args.max_tokens_per_microbatch, dist.get_world_size()
    )
    found = {}
    for batch in plan[dist.get_rank()]:
        logp = policy(*common.collate(contexts, responses, batch, device))
        found.update(zip(batch, logp.split([len(responses[i]) for i in batch])))
    policy.reshard()  # FSDP's root stays gathered after a forward without backward
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {i: logp.cpu().double().numpy() for i, logp in found.items()})
    return [part[i] for i in range(len(total)) for part in parts if i in part]


def compare_rollouts(policy, prompts, responses, rewards, bos, logps, args, device, say) -> dict:
    """g₁ and g₂ of each rollout, the finite steps, and the cosines of the batch's updates.

    Returns:
        rollouts, finite_steps and cosine_to_grpo, as in alignment.json.
    """
    r_bar = common.advantages(rewards, args.num_generations, "mean")
    updates = {  # name -> space and A [N]
        "GRPO": ("x", common.advantages(rewards, args.num_generations, "grpo")),
        "NSR-RL": ("x", r_bar.clamp(max=0)),
        "PreRL": ("bos", r_bar),
        "NSR-PreRL": ("bos", r_bar.clamp(max=0)),
        "PSR-PreRL": ("bos", r_bar.clamp(min=0)),
    }
    summed = {name: None for name in updates}
    weights = [parameter.to_local().detach() for parameter in policy.parameters()]
    rollouts, steps = [], []
    for i, y in enumerate(responses):
        mean = [torch.full((len(y),), 1 / len(y), dtype=torch.float64)]
        g = {
            space: batch_gradient(policy, [x], [y], mean, args, device)
            for space, x in (("bos", [bos]), ("x", prompts[i]))
        }
        inner = dot(g["bos"], g["x"])
        norms = {space: dot(gradient, gradient) ** 0.5 for space, gradient in g.items()}
        rollouts.append(
            {
                "reward": rewards[i].item(),
                "length": len(y),
                "inner_product": inner,
                "cosine": inner / (norms["bos"] * norms["x"]),
                "norm_bos": norms["bos"],
                "norm_x": norms["x"],
                "logprob_bos": logps["bos"][i].mean(),
                "logprob_x": logps["x"][i].mean(),
            }
        )
        for name, (space, A) in updates.items():  # Σ_i A_i Σ_t ∇ log π
            if A[i] != 0:
                part = [A[i].item() * len(y) * u for u in g[space]]
                summed[name] = [a + b for a, b in zip(summed[name], part)] if summed[name] else part
        if i < args.num_finite_steps:  # θ' = θ + η g₁, and back
            eta = args.finite_step / norms["bos"] ** 2
            saved = [weight.clone() for weight in weights]
            for weight, u in zip(weights, g["bos"]):
                weight.add_(u, alpha=eta)
            after = logprobs(policy, [prompts[i]], [y], args, device)[0].mean()
            for weight, old in zip(weights, saved):
                weight.copy_(old)
            actual, predicted = after - logps["x"][i].mean(), eta * inner
            steps.append(dict(actual=actual, predicted=predicted, ratio=actual / predicted))
        if (i + 1) % 50 == 0:
            say(f"{i + 1} of {len(responses)} rollouts")
    cosines = {
        name: cosine(summed[name], summed["GRPO"])
        for name in updates
        if name != "GRPO" and summed[name] and summed["GRPO"]
    }
    return {"rollouts": rollouts, "finite_steps": steps, "cosine_to_grpo": cosines}


def compare_tokens(policy, prompts, responses, bos, logps, args, device) -> list[dict]:
    """The two gradients of single tokens: a random rollout, then a random position in it."""
    rng, rows = random.Random(args.seed), []
    for _ in range(args.num_tokens):
        i = rng.randrange(len(responses))
        t = rng.randrange(len(responses[i]))
        y = [responses[i][: t + 1]]  # what comes later plays no part
        only = [torch.eye(t + 1, dtype=torch.float64)[t]]
        g1 = batch_gradient(policy, [[bos]], y, only, args, device)
        g2 = batch_gradient(policy, [prompts[i]], y, only, args, device)
        rows.append(
            {
                "rollout": i,
                "position": t,
                "prob_bos": float(np.exp(logps["bos"][i][t])),
                "prob_x": float(np.exp(logps["x"][i][t])),
                "cosine": cosine(g1, g2),
                "norm_bos": dot(g1, g1) ** 0.5,
                "norm_x": dot(g2, g2) ** 0.5,
            }
        )
    return rows


MODES = ("careful", "careless")


def read_modes(path: str, tokenizer, args) -> list[dict]:
    """The rows of --modes: prompt_ids of the problem, token ids of the two texts."""
    try:
        rows = list(data.read_jsonl(Path(path)))
    except (OSError, ValueError) as error:
        harness.fail(f"--modes {path}: {harness.first_line(error)}")
    modes = []
    columns = {"problem": str | list, **dict.fromkeys(MODES, str)}  # a list: chat messages
    for number, row in enumerate(rows):
        for column, kinds in columns.items():
            if not isinstance(row.get(column), kinds):
                harness.fail(
                    f"--modes {path}, row {number}: it needs text in the columns problem, careful "
                    f"and careless, but {column} is no text; its columns are {', '.join(row)}"
                )
        texts = {k: tokenizer.encode(row[k], add_special_tokens=False) for k in MODES}
        modes.append({"problem": row["problem"], **{k: np.array(ids) for k, ids in texts.items()}})
    if not modes or not all(len(mode[name]) for mode in modes for name in MODES):
        harness.fail(f"--modes {path}: it has no rows, or a text without tokens")
    return inputs.encode_prompts(modes, tokenizer, args)


def compare_modes(policy, prompts, responses, rewards, bos, modes, args, device) -> dict:
    """How far each method's first update moves the log-odds of the careful mode.

    The log-odds are m(x) = log π(careful | x) - log π(careless | x), a mean over the rows of
    --modes, and m(BOS) without the prompt. What both texts begin with cancels out.

    Args:
        modes: of read_modes().

    Returns:
        log_odds_x, log_odds_bos: m before any update; cosine: of ∇m(x) and ∇m(BOS). updates: for
        each method the norm of its gradient, and dm(x) and dm(BOS) in nats per unit of length of a
        step along this gradient (x, bos) and along its signs (x_signs, bos_signs; AdamW's first
        step). "random" are NSR with the batch's advantages dealt anew among its samples: as many
        negatives, without a meaning. A method without a gradient is left out.
    """
    rows, pairs = range(len(modes)), [(name, s) for name, s in zip(MODES, (1, -1))]
    texts = [modes[i][name] for name, _ in pairs for i in rows]
    even = [np.full(len(modes[i][name]), s / len(modes)) for name, s in pairs for i in rows]
    weights = [torch.from_numpy(w) for w in even]
    contexts = {"x": [m["prompt_ids"] for m in modes] * 2, "bos": [[bos]] * len(texts)}
    result, grad_m = {}, {}
    for space, context in contexts.items():
        logp = logprobs(policy, context, texts, args, device)
        result[f"log_odds_{space}"] = sum(w @ p for w, p in zip(even, logp))
        grad_m[space] = batch_gradient(policy, context, texts, weights, args, device)
    result["cosine"] = cosine(grad_m["x"], grad_m["bos"])

    A = common.advantages(rewards, args.num_generations, "mean")
    order = torch.randperm(len(A), generator=torch.Generator().manual_seed(args.seed))
    negative, positive, random_negative = A.clamp(max=0), A.clamp(min=0), A[order].clamp(max=0)
    updates = {  # name -> space and A [N]
        "GRPO": ("x", common.advantages(rewards, args.num_generations, "grpo")),
        "PSR-RL": ("x", positive),
        "NSR-RL": ("x", negative),
        "NSR-RL, random": ("x", random_negative),
        "PreRL": ("bos", A),
        "PSR-PreRL": ("bos", positive),
        "NSR-PreRL": ("bos", negative),
        "NSR-PreRL, random": ("bos", random_negative),
    }
    result["updates"] = {}
    for name, (space, A) in updates.items():
        context = prompts if space == "x" else [[bos]] * len(responses)
        each = [torch.from_numpy(np.full(len(y), a.item())) for a, y in zip(A, responses)]
        g = batch_gradient(policy, context, responses, each, args, device)
        norm, signs = dot(g, g) ** 0.5, [u.sign() for u in g]
        if norm:
            length = dot(signs, signs) ** 0.5
            result["updates"][name] = {"norm": norm}
            for space, m in grad_m.items():
                moved = {space: dot(g, m) / norm, f"{space}_signs": dot(signs, m) / length}
                result["updates"][name] |= moved
    return result


def summary(rollouts: list[dict]) -> dict:
    """The numbers of the paper's figure 2, for all, correct and incorrect rollouts."""
    groups = {
        "all": rollouts,
        "correct": [r for r in rollouts if r["reward"] == 1],
        "incorrect": [r for r in rollouts if r["reward"] != 1],
    }
    result = {}
    for name, rows in groups.items():
        if rows:
            inner = np.array([r["inner_product"] for r in rows])
            result[name] = {
                "rollouts": len(rows),
                "inner_product_mean": inner.mean(),
                "inner_product_max": inner.max(),
                "inner_product_min": inner.min(),
                "fraction_negative": float((inner < 0).mean()),
                "cosine_mean": np.mean([r["cosine"] for r in rows]),
                "logprob_difference_mean": np.mean(
                    [r["logprob_x"] - r["logprob_bos"] for r in rows]
                ),
            }
    return result


def report(result: dict) -> str:
    """The table and lines that the console shows."""
    summaries = result["summary"]
    lines = [f"{'':28}" + "".join(f"{name:>12}" for name in summaries)]
    for key in summaries["all"]:
        values = (summaries[name][key] for name in summaries)
        lines.append(f"{key:28}" + "".join(f"{value:12.4g}" for value in values))
    for name, value in result["cosine_to_grpo"].items():
        lines.append(f"cosine of the batch's {name} update with GRPO's: {value:.3f}")
    ratios = [step["ratio"] for step in result["finite_steps"]]
    if ratios:
        lines.append(
            f"log π(y|x) after a step along g₁, measured / predicted, {len(ratios)} rollouts: "
            f"mean {np.mean(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}"
        )
    if "modes" in result:
        found = result["modes"]
        lines.append(
            f"log-odds of the careful mode: {found['log_odds_x']:.3f} given x, "
            f"{found['log_odds_bos']:.3f} given BOS; cosine of their gradients "
            f"{found['cosine']:.3f}. Their change by the first update, per unit of its length:"
        )
        keys = {
            "x": "given x",
            "bos": "given BOS",
            "x_signs": "signs, x",
            "bos_signs": "signs, BOS",
        }
        lines.append(f"{'':28}" + "".join(f"{label:>12}" for label in keys.values()))
        for name, moved in found["updates"].items():
            lines.append(f"{name:28}" + "".join(f"{moved[key]:12.4g}" for key in keys))
    return "\n".join(lines)


def short_name(model: str) -> str:
    """The last two parts of a path or hub id.

    >>> short_name("/home/me/lab/base"), short_name("Qwen/Qwen3-4B")
    ('lab/base', 'Qwen/Qwen3-4B')
    """
    return "/".join(model.rstrip("/").split("/")[-2:])


def draw(result: dict, path: Path) -> None:
    """alignment.png: inner products, cosine against probability, cosine over position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blue, orange, grey = "#0072B2", "#D55E00", "#555555"  # told apart by colour-blind readers too
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    rows, all_ = result["rollouts"], result["summary"]["all"]
    inner = [[r["inner_product"] for r in rows if (r["reward"] == 1) == k] for k in (True, False)]
    bins = np.histogram_bin_edges(np.concatenate(inner), bins=30)
    for values, colour, name in zip(inner, (blue, orange), ("correct", "incorrect")):
        style = dict(histtype="stepfilled", fc=(colour, 0.25), ec=colour, lw=1.5)
        axes[0].hist(values, bins=bins, label=f"{name} ({len(values)})", **style)
    axes[0].axvline(0, color=grey, linewidth=1)
    axes[0].set_title(
        f"⟨g₁, g₂⟩: mean {all_['inner_product_mean']:.3g}, negative {all_['fraction_negative']:.1%}"
    )
    axes[0].set_xlabel("inner product of ∇ log π(y) and ∇ log π(y|x)")
    axes[0].set_ylabel("rollouts")
    axes[0].legend()

    tokens = result["tokens"]
    cosine = np.array([t["cosine"] for t in tokens])
    position = np.array([t["position"] for t in tokens])
    for key, colour, label in (("prob_bos", orange, "BOS"), ("prob_x", blue, "x")):
        probability = np.clip([t[key] for t in tokens], 1e-6, 1 - 1e-6)
        style = dict(s=14, color=colour, alpha=0.5, linewidths=0)
        axes[1].scatter(probability, cosine, **style, label=f"π(y_t | {label}, y_<t)")
    axes[1].set_xscale("logit")  # most tokens are nearly certain
    axes[1].set_xticks([1e-6, 1e-4, 0.01, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6])
    axes[1].set_xticklabels(["0", ".0001", ".01", ".5", ".99", ".9999", "1"])
    axes[1].minorticks_off()
    axes[1].set_title(f"{len(tokens)} single tokens: against probability")
    axes[1].set_xlabel("the token's probability (log odds; cut at 1e-6 from 0 and 1)")
    axes[1].legend(loc="best")
    axes[1].set_ylabel("cosine of the token's two gradients")

    axes[2].scatter(position, cosine, s=14, color=blue, alpha=0.3, linewidths=0)
    edges = np.unique(np.quantile(position, np.linspace(0, 1, 9))) if len(tokens) else []
    middles, means = [], []
    for low, high in zip(edges, edges[1:]):
        inside = (position >= low) & ((position < high) | (high == edges[-1]))
        middles.append(position[inside].mean())
        means.append(cosine[inside].mean())
    axes[2].plot(middles, means, color=orange, marker="o", label="mean of eight bins")
    axes[2].set_title("the same tokens: over the response")
    axes[2].set_xlabel("position t in the response (tokens)")
    axes[2].set_ylabel("cosine of the token's two gradients")
    axes[2].legend(loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Gradient alignment of P(y) and P(y|x): {short_name(result['model'])}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tokens_page(result: dict, prompts, responses, logps, tokenizer, chosen: list[int]) -> str:
    """tokens.html: prompts, and responses coloured by log π(y_t|x, ·) - log π(y_t|BOS, ·)."""
    parts = []
    for i in chosen:
        row, spans = result["rollouts"][i], []
        for token, x, b in zip(responses[i].tolist(), logps["x"][i], logps["bos"][i]):
            strength = min(1.0, abs(x - b) / 3)
            colour = f"rgba({'0,114,178' if x > b else '213,94,0'},{0.75 * strength:.2f})"
            text = html.escape(tokenizer.decode([token]))
            tip = f"log π(y_t|x) {x:.3f}&#10;log π(y_t|BOS) {b:.3f}&#10;difference {x - b:+.3f}"
            spans.append(f'<span style="background:{colour}" title="{tip}">{text}</span>')
        verdict = "correct" if row["reward"] == 1 else "incorrect"
        prompt = html.escape(tokenizer.decode(prompts[i]).strip())
        parts.append(
            f"<h2>Rollout {i}: {verdict}, {row['length']} tokens, cosine {row['cosine']:.3f}</h2>\n"
            f'<pre class="prompt">{prompt}</pre>\n<pre>{"".join(spans)}</pre>'
        )
    return PAGE.format(model=html.escape(short_name(result["model"])), body="\n".join(parts))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>What the prompt adds to each token: {model}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff; }}
h1 {{ font-size: 1.4rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .3rem; }}
pre {{ font: 15px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid #ccc; border-radius: 6px; padding: .7rem; margin: 0; }}
pre.prompt {{ border-style: dashed; background: #f5f5f5; max-height: 9rem; overflow-y: auto;
  display: flex; flex-direction: column-reverse; }} /* a long prompt shows its end, the problem */
span.key {{ padding: .1rem .4rem; }}
</style>
</head>
<body>
<h1>What the prompt adds to each token: {model}</h1>
<p>Each prompt (dashed), and a response sampled with it. A token's colour is
log π(y_t | x, y_&lt;t) − log π(y_t | BOS, y_&lt;t):
<span class="key" style="background:rgba(0,114,178,.75)">3 nats likelier with the prompt</span>
<span class="key">the same</span>
<span class="key" style="background:rgba(213,94,0,.75)">3 nats likelier without</span>.
Hover over a token for both values.</p>
{body}
</body>
</html>
"""

if __name__ == "__main__":
    harness.launch(main, harness.parse_args(Args))
