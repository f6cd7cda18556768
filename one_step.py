"""One step of each method in plain PyTorch, without inference engine and sharding.

    python one_step.py                          the lab's base model
    python one_step.py --preset smollm          SmolLM2-135M with worked examples
    python one_step.py --model FOLDER --problem 'What is 17 + 25?' --answer 42

The program samples a group of responses to each problem, verifies them, and takes each method's
first optimiser step from the same weights. one_step.html shows every value. The four scripts do
this with vLLM and FSDP2; tests/test_scripts.py compares three steps of each with this file in
float64.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig

import flags
import grading
import harness
import inputs
import models
from lab import page

# The methods. r: rewards [P, G]; xs: the N = P * G prompts; bos: the start token. A method gives
# A [P, G], which samples are in the loss [P, G], and the context of each response [N].


def grpo(r, xs, bos):
    A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)  # equation (1)
    in_loss = torch.ones_like(A, dtype=torch.bool)
    contexts = xs  # log π(y_t | x, y_<t)
    return A, in_loss, contexts


def prerl(r, xs, bos):
    A = r - r.mean(1, keepdim=True)  # equation (1)
    in_loss = torch.ones_like(A, dtype=torch.bool)
    contexts = [[bos]] * len(xs)  # log π(y_t | BOS, y_<t): x is dropped
    return A, in_loss, contexts


def nsr_prerl(r, xs, bos):
    A = r - r.mean(1, keepdim=True)  # equation (1)
    in_loss = A < 0
    contexts = [[bos]] * len(xs)
    return A, in_loss, contexts


def dsrl(r, xs, bos, step, warmup_steps):
    return nsr_prerl(r, xs, bos) if step <= warmup_steps else grpo(r, xs, bos)


def log_probs(model, context: list[int], y: list[int]) -> torch.Tensor:
    """log π(y_t | context, y_<t), [T]; context and y are token ids."""
    logits = model(torch.tensor([context + y])).logits[0, len(context) - 1 : -1]  # [T, V]
    return logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None])[:, 0]


def backward(model, A, in_loss, contexts, ys) -> float:
    """The loss: minus the mean of A log π over the tokens in the loss. Also computes its gradient.

    Args:
        A, in_loss: [P, G]; contexts, ys: token ids of the N = P * G contexts and responses.
    """
    num_tokens = sum(len(y) for y, kept in zip(ys, in_loss.flatten()) if kept)
    total = 0.0
    for A_i, kept, context, y in zip(A.flatten(), in_loss.flatten(), contexts, ys):
        if kept:
            loss = -(A_i * log_probs(model, context, y)).sum() / num_tokens  # equation (2)
            loss.backward()
            total += loss.item()
    return total


def step(model, optimizer, A, in_loss, contexts, ys) -> tuple[float, torch.Tensor]:
    """One update. Returns the loss and the gradient before clipping, as one vector."""
    optimizer.zero_grad()
    loss = backward(model, A, in_loss, contexts, ys)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss, gradient


@torch.no_grad()
def sample(model, x: list[int], count: int, max_tokens: int, stop: list[int]) -> list[list[int]]:
    """Sample `count` responses y ~ π(·|x) as token ids. The stop token is part of y."""
    ids, cache = torch.tensor([x]), DynamicCache(config=model.config)
    if len(x) > 1:
        model(ids[:, :-1], past_key_values=cache)  # x once, not once for each response
        cache.batch_repeat_interleave(count)
    ids = model.generate(
        ids.repeat(count, 1),
        attention_mask=torch.ones(count, len(x), dtype=torch.long),
        past_key_values=cache,
        generation_config=GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=max_tokens,
            eos_token_id=stop, pad_token_id=stop[0],
        ),
    )  # fmt: skip
    ys = ids[:, len(x) :].tolist()
    ends = [next((t for t, token in enumerate(y, 1) if token in stop), len(y)) for y in ys]
    return [y[:end] for y, end in zip(ys, ends)]


def reward(y: list[int], answer: str, tokenizer, stop: list[int]) -> float:
    """1 if the response ends and the last \\boxed{} has a correct answer, else 0."""
    boxed = grading.last_boxed(tokenizer.decode(y, skip_special_tokens=True))
    return float(y[-1] in stop and bool(boxed) and grading.math_verify_equal(boxed, answer))


# ------------------------------------------------------------------------------------ the program


@dataclass
class Args:
    preset: Literal["lab", "smollm"] = "lab"
    """set of defaults: the lab's base model, or SmolLM2-135M with worked examples"""
    model: str = str(Path(__file__).resolve().parent / "lab" / "base")
    """local folder, hub id, or smollm2; trained in float32 on the CPU"""
    dataset: str = "lab"
    """lab, arithmetic, math, a hub id, or a local .parquet or .jsonl file"""
    problem: str = ""
    """problem to use instead of the data set; needs --answer"""
    answer: str = ""
    """reference answer of --problem"""
    problems: int = 2
    """problems on the page"""
    responses: int = 4
    """responses per problem, the group size G"""
    system_prompt: str = ""
    """system prompt of every problem; empty: none"""
    max_completion_length: int = 192
    """most tokens of a response"""
    bos_token: str = ""
    """token in place of the prompt in pre-train space; default: BOS, or <|im_start|> without BOS"""
    learning_rate: float = 3e-4
    """AdamW's learning rate"""
    seed: int = 1
    """seed of the problems' order and of sampling"""
    output: str = "one_step.html"
    """HTML file to write"""


def draw_group(model, x, answer: str, tokenizer, stop, args) -> tuple[list[list[int]], list[float]]:
    """G different responses and their rewards; both rewards are among them if both were sampled."""
    ys = sample(model, x, 8 * args.responses, args.max_completion_length, stop)
    ys = list({tuple(y): y for y in ys}.values())
    rewards = [reward(y, answer, tokenizer, stop) for y in ys]
    kept = list(range(len(ys)))[: args.responses]
    others = [i for i, r in enumerate(rewards) if r != rewards[0]]
    if others and others[0] not in kept:
        kept[-1] = others[0]
    return [ys[i] for i in kept], [rewards[i] for i in kept]


def main(args: Args) -> None:
    if bool(args.problem) != bool(args.answer):
        harness.fail("--problem needs --answer, and --answer needs --problem: give both or neither")
    if args.responses < 2:
        harness.fail("--responses must be 2 or more, because A compares a response with its group")
    for name in ("problems", "max_completion_length", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            harness.fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if reason := flags.unwritable(Path(args.output)):
        harness.fail(f"--output {args.output} cannot be written: {reason}")
    if not 0 <= args.seed < 2**32:
        harness.fail(f"--seed must be from 0 to {2**32 - 1}, not {args.seed}")
    torch.manual_seed(args.seed)
    try:
        kinds = [*inputs.SMALL_FILES, "model*.safetensors"]
        path = inputs.local_folder(inputs.resolve_model(args.model), kinds)
        models.check_folder(args.model, path)
        config = AutoConfig.from_pretrained(path)
        # transformers would fill up a missing weight with random numbers
        models.check_checkpoint(args.model, path, models.meta_model(config))
        tokenizer = inputs.load_tokenizer(path)
        vocab_size = inputs.num_tokens(tokenizer, config)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except Exception as error:
        inputs.refuse_model(args.model, error)
    model.resize_token_embeddings(vocab_size)  # ids that only pad the embeddings are never sampled
    bos = inputs.find_bos(tokenizer, args.bos_token)
    stop = inputs.find_stop_tokens(path, tokenizer, vocab_size)
    rows = [{"problem": args.problem, "answer": args.answer}]
    if not args.problem:
        rows = inputs.load_problems(args.dataset, "train")
        random.Random(args.seed).shuffle(rows)
    rows = inputs.encode_prompts(rows, tokenizer, args)

    problems, xs, ys, r = [], [], [], []
    for problem in rows[: 10 * args.problems]:
        x = problem["prompt_ids"]
        group, rewards = draw_group(model, x, problem["answer"], tokenizer, stop, args)
        if len(group) == args.responses and len(set(rewards)) == 2:
            problems, r = [*problems, problem], [*r, rewards]
            xs, ys = xs + [x] * args.responses, ys + group
        if len(r) == args.problems:
            break
    if not r:
        harness.fail(
            f"no group of {args.responses} different responses has correct and incorrect ones, so "
            "A is 0: give an easier or harder problem, more --responses, or another --seed"
        )
    r = torch.tensor(r)  # [P, G]

    @torch.no_grad()
    def both_spaces():  # log π(y_t | x, y_<t) and log π(y_t | BOS, y_<t) of each response
        return [(log_probs(model, x, y), log_probs(model, [bos], y)) for x, y in zip(xs, ys)]

    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    before, updates = both_spaces(), {}
    for name, method in {"GRPO": grpo, "PreRL": prerl, "NSR-PreRL": nsr_prerl}.items():
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
        A, in_loss, contexts = method(r, xs, bos)
        loss, gradient = step(model, optimizer, A, in_loss, contexts, ys)
        updates[name] = (A, in_loss, contexts is xs, loss, gradient, both_spaces())
    values = page.collect(args, tokenizer, bos, problems, ys, r, before, updates)
    Path(args.output).write_text(page.render(values))
    for m in values["methods"]:
        print(
            f"{m['name']:10} loss {m['loss']:+.4f}  gradient norm {m['norm']:.3f}  "
            f"cosine with GRPO's {m['cosine']:.3f}"
        )
    print(f"every value is in {args.output}")


if __name__ == "__main__":
    main(harness.parse_args(Args))
