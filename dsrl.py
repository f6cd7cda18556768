"""DSRL, dual space RL ("policy reincarnation"), of "From P(y|x) to P(y)" (arXiv 2604.14142).

    python dsrl.py --model Qwen2.5-Math-7B          one node, one process per GPU
    python dsrl.py --preset lab                     the same code on a laptop's CPU, in minutes

Responses are always sampled with the prompt, y ~ π(·|x), and verified: r ∈ {0, 1}. For the first S
steps the update is NSR-PreRL's: it lowers log π(y_t | BOS, y_<t), without x, of the samples with
A < 0. From step S + 1 on it is GRPO's, with the same weights and optimiser state:

    (1)  A = r - group mean for s ≤ S, then (r - group mean) / (group std + 1e-6)
    (2)  ∇J = E[ Σ_t ∇log π(y_t | x^{1[s>S]}, y_<t) · A · 1[s > S or A < 0] ]
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

import common
import grad_alignment
import grading
import harness
import inputs


@dataclass
class Args:
    # Model and data
    model: str = "Qwen/Qwen3-4B"
    """hub id, local folder, or bare name of a known family (Qwen2.5-Math-7B)
    (paper: Qwen3-4B and 8B)"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the model's computation and of the engine; master weights are float32"""
    dataset: str = "math"
    """math, lab, arithmetic, a hub id, or a local .parquet or .jsonl file (paper: math)"""
    eval_datasets: tuple[str, ...] = ("aime24", "aime25", "amc23")
    """held-out data sets: aime24, aime25, amc23, math500, minerva, olympiadbench, or named as in
    --dataset (paper: these six)"""
    eval_num_samples: int = 8
    """responses per held-out problem, the k of avg@k and pass@k (paper: 32)"""
    seed: int = 1
    """seed of data order and sampling"""

    # Rollout
    num_prompts: int = 128
    """problems per step, over all ranks (paper: 128)"""
    num_generations: int = 8
    """responses per problem, the group size G (paper: 8)"""
    system_prompt: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """system prompt of every problem; empty: none (the default is the paper's)"""
    max_completion_length: int = 8192
    """most tokens of a response; reduced to fit the model's context (paper: 8192)"""
    temperature: float = 1.0
    """sampling temperature, also used for the log-probs in the loss (paper: 1)"""
    grader: Literal["math-verify", "boxed-string"] = "math-verify"
    """math-verify: spelling rules, then math-verify's algebra; boxed-string: the authors' string
    comparison (paper: boxed-string)"""

    # Method
    warmup_steps: int = 20
    """S, steps of NSR-PreRL before RL (paper: 20; 10 to 25 work well)"""
    advantage: Literal["grpo", "mean", "rloo", "reinforce++", "sign"] = "grpo"
    """grpo: (r - group mean) / (group std + 1e-6); mean: r - group mean; rloo: r - mean of the
    others in the group; reinforce++: (r - mean) / (std + 1e-6) of the batch; sign: 1 if correct, -1
    if not (paper: grpo given x, mean given BOS)"""
    bos_token: str = ""
    """token in place of the prompt in pre-train space; default: BOS, or <|im_start|> without BOS"""
    sign_weights: tuple[float, float] = (1.0, 1.0)
    """factors that multiply A > 0 and A < 0; 0 removes these samples from the loss (paper: 1 1)"""
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """token-mean: mean over all tokens; seq-mean-token-mean: mean of the responses' means;
    seq-mean-token-sum-norm: mean of their sums / --max-completion-length (paper: token-mean)"""
    num_minibatches: int = 1
    """optimiser updates per step; --clip has an effect only with more than 1 (paper: 1)"""
    clip: tuple[float, float] = (0.2, 0.2)
    """the ratio is clipped to [1 - first, 1 + second] (paper: GRPO 0.2 0.28, else 0.2 0.2)"""
    tis_cap: float = 0.0
    """upper bound of the importance weight π_trainer / π_sampler, in phase rl only; 0: off"""

    # Optimiser
    learning_rate: float = 1e-6
    """AdamW's learning rate, constant; its betas are 0.9 and 0.999 (paper: 1e-6)"""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay (paper: 0.01)"""

    # Run (--resume may change these)
    preset: Literal["paper", "lab", "smollm"] = "paper"
    """set of defaults: the paper's for Qwen3-4B, or one for a laptop; explicit flags override it"""
    num_steps: int = 348
    """training steps, each a rollout and an update (paper: 348, 6 epochs of MATH)"""
    output_dir: str = ""
    """folder of the run; default: runs/SCRIPT__MODEL__DATASET__sSEED__TIME"""
    resume: str = ""
    """checkpoint to continue from: a path, or auto for the latest in --output-dir"""
    save_every: int = 50
    """save a checkpoint for --resume, and the responses, every N steps; 0: never (paper: 50)"""
    eval_every: int = 20
    """evaluate every N steps, and before and after training; 0: never (paper: 5, later 25)"""
    alignment_every: int = 0
    """measure the cosine of the update's gradient with GRPO's every N steps; 0: never"""
    track: Literal["none", "wandb", "trackio"] = "none"
    """service to log to, in addition to metrics.jsonl and TensorBoard"""

    # Machine (--resume may change these)
    num_processes: int = 0
    """number of processes; 0: one per GPU, or one on a CPU"""
    tensor_parallel_size: int = 1
    """ranks per vLLM engine (paper: 2)"""
    gpu_memory_utilization: float = 0.6
    """fraction of a GPU's memory for vLLM during rollouts (paper: 0.6)"""
    max_tokens_per_microbatch: int = 16384
    """most tokens in one forward pass, padding included (paper: 10240 without padding)"""
    gradient_checkpointing: bool = True
    """recompute each layer's activations in the backward pass (paper: on)"""
    cpu_offload: bool = False
    """keep weights and optimiser state in host memory (paper: on)"""


def main(args: Args) -> None:
    # 0. Every rank runs this same function: one engine per tensor-parallel group, one shard each
    rank, world_size, device = harness.init_distributed()
    harness.check_args(args)
    path, config, tokenizer = inputs.load_model_files(args)
    train = inputs.load_problems(args.dataset, "train")
    evals = {name: inputs.load_problems(name, "test") for name in args.eval_datasets}
    bos = inputs.find_bos(tokenizer, args.bos_token)
    vocab_size = inputs.num_tokens(tokenizer, config)
    stop = inputs.find_stop_tokens(path, tokenizer, vocab_size)
    train = inputs.encode_prompts(train, tokenizer, args)
    evals = {name: inputs.encode_prompts(e, tokenizer, args) for name, e in evals.items()}
    inputs.fix_content(path, {f"{args.dataset} (train)": train, **evals}, args)
    verifier = grading.start_verifier()
    train = inputs.check_references(args.dataset, train, verifier, args, args.num_prompts)
    evals = {name: inputs.check_references(name, e, verifier, args) for name, e in evals.items()}
    inputs.fit_context([train, *evals.values()], config, args)
    folder = harness.make_output_dir(args)
    harness.check_disk(folder, path, args)
    checkpoint = harness.find_checkpoint(folder, args)
    say = harness.quiet(folder)
    say(f"{args.model}: {len(train)} problems, {world_size} ranks, output in {folder}")
    say(f"a prompt ends in {tokenizer.decode(train[0]['prompt_ids'][-20:])!r}")
    say(f"a response ends at {' or '.join(tokenizer.convert_ids_to_tokens(stop))}")
    say(f"BOS, which replaces the prompt, is token {bos}, {tokenizer.convert_ids_to_tokens(bos)!r}")

    engine = common.make_engine(path, vocab_size, args)
    policy = common.load_policy(path, config, vocab_size, args, device)
    optimizer = common.make_optimizer(policy, args)
    done = harness.load_checkpoint(folder, policy, optimizer, checkpoint)
    log, warn = harness.make_logger(folder, args), harness.make_warner(args, say)
    common.sync_weights(engine, policy)
    common.check_sync(engine, policy)
    if args.eval_every and not done:
        scores = common.evaluate(engine, evals, stop, tokenizer, verifier, args)
        log(0, {"step": 0, **scores})
        say(f"step 0  {harness.eval_line(scores)}")
        warn({"step": 0, **scores})

    harness.catch_signals()
    skipped = 0
    for step in range(done + 1, args.num_steps + 1):
        clock = harness.timer()
        warmup = step <= args.warmup_steps  # s ≤ S

        # 1. Rollout: y ~ π(·|x), always with the prompt; G responses to each of P problems
        problems = inputs.pick_problems(train, step, args.num_prompts, args.seed)
        samples = common.rollout(
            engine, problems, args.num_generations, f"{args.seed} {step}", stop, args
        )
        clock.lap("time/rollout")

        # 2. Verify: r ∈ {0, 1}. From here on every rank holds all N = P * G samples
        references = [p["answer"] for p in problems for _ in range(args.num_generations)]
        counts = common.verify(samples, references, tokenizer, verifier, args)
        samples = common.gather(samples)
        prompts = [p["prompt_ids"] for p in problems for _ in range(args.num_generations)]  # x
        responses = [s["ids"] for s in samples]  # y
        lengths = torch.tensor([s["length"] for s in samples])  # [N]
        rewards = torch.tensor([s["reward"] for s in samples])  # [N]
        clock.lap("time/verify")

        # The canary: does the engine sample from the trainer's policy?
        measured = common.canary(policy, prompts, samples, args, device)
        common.check_canary(measured["sync/logprob_gap"], args)
        clock.lap("time/canary")

        # 3. Advantage A [N]: equation (1)
        kind = "mean" if warmup and args.advantage != "sign" else args.advantage
        A = common.advantages(rewards, args.num_generations, kind)

        # 4. Equation (2): which samples are in the loss, in which space. Methods differ in 3 and 4
        in_loss = (A < 0) | (not warmup)  # [N], 1[s > S or A < 0]
        contexts = [[bos]] * len(prompts) if warmup else prompts  # x^{1[s>S]}
        phase = "pretrain" if warmup else "rl"

        weight = common.sign_weights(A, args.sign_weights)  # [N]
        in_loss &= weight != 0
        A = weight * A
        if args.alignment_every and step % args.alignment_every == 0:
            measured |= grad_alignment.alignment(
                policy, contexts, prompts, responses, A * in_loss, rewards, args, device
            )

        # 5. Update: one optimiser step per mini-batch. Where A = 0 nothing but the mean changes, so
        # nothing is computed; a fork whose loss has another term computes all of in_loss
        computed = in_loss & (A != 0)  # [N]
        prefix, contexts = common.split_prefix(contexts, responses, args)  # tokens all begin with
        work = (contexts, responses, args, device)
        minibatches = common.split(in_loss, args.num_minibatches, step)
        old_logps = common.old_logprobs(policy, minibatches, computed, prefix, *work)
        stats = torch.zeros(4, dtype=torch.float64)  # Σ loss, Σ logp, clipped tokens, tokens
        grad_norm, updates = float("nan"), 0
        for chosen in (c for c in minibatches if (c & computed).any()):  # bool [N]
            share = common.token_weights(  # [N], of a token; they sum to a mean over `chosen`
                chosen, lengths, args.loss_aggregation, args.max_completion_length
            )
            for batch in common.microbatches(chosen & computed, *work):
                logp = policy(batch.tokens, batch.is_response, prefix)  # [n] log π(y_t | ·, y_<t)
                old_logp = batch.take(old_logps) if old_logps else logp.detach()  # [n]
                # [n]. On-policy the ratio is 1, so the gradient is A ∇log π
                objective = common.clipped_objective(logp, old_logp, batch.per_token(A), args.clip)
                if args.tis_cap and phase == "rl":  # E_sampler -> E_trainer, truncated
                    sampler = common.sampler_logprobs(samples, batch.index, device)
                    objective = objective * (old_logp - sampler).exp().clamp(max=args.tis_cap)
                loss = -(batch.per_token(share) * objective).sum()  # equation (2): ∇loss ∝ -∇J
                (loss * world_size).backward()  # FSDP averages over ranks; the loss is a sum
                stats += common.batch_stats(batch, loss, logp, old_logp, args)
            grad_norm = common.optimizer_step(policy, optimizer)
            updates += math.isfinite(grad_norm)
            skipped = common.count_skipped(skipped, grad_norm, folder, step, samples, A, say)
        dist.all_reduce(stats)
        clock.lap("time/update")

        # 6. Sync: the engine gets the new weights, and has them to the bit
        if updates:
            common.sync_weights(engine, policy)
        common.check_sync(engine, policy)
        clock.lap("time/sync")

        # 7. Log, evaluate, save
        metrics = {"step": step, "phase": phase}
        metrics |= common.rollout_metrics(samples, rewards, args) | counts | measured
        metrics |= {
            "policy/loss": stats[0].item(),
            "policy/grad_norm": grad_norm,
            "policy/counted_samples": int(in_loss.sum()),
            "policy/counted_tokens": int(lengths[in_loss].sum()),
            "policy/logprob": (stats[1] / stats[3]).item(),
            "policy/clip_fraction": (stats[2] / stats[3]).item(),
        }
        metrics |= harness.speed_metrics(clock, int(lengths.sum()), int(stats[3]))
        if args.eval_every and (step % args.eval_every == 0 or step == args.num_steps):
            metrics |= common.evaluate(engine, evals, stop, tokenizer, verifier, args)
        log(step, metrics)
        say(harness.progress_line(metrics, args.num_steps))
        warn(metrics)
        save = args.save_every and step % args.save_every == 0
        if save or step in (1, args.num_steps):
            harness.save_completions(folder, step, prompts, samples, A, in_loss, tokenizer)
        if save:  # after the log: what a resumed run begins from has its line in metrics.jsonl
            harness.save_checkpoint(folder, step, policy, optimizer, args)
        harness.stop_if_asked(folder, step, policy, optimizer, args, engine, verifier, say)

    harness.save_model(folder, policy, config, tokenizer, path, getattr(torch, args.dtype))
    harness.say_summary(folder, say)
    verifier.stop()
    harness.shutdown(engine)


if __name__ == "__main__":
    harness.launch(main, harness.parse_args(Args))
