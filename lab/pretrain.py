"""Pre-train the lab's base model from random weights, or measure a checkpoint.

`python lab/pretrain.py` writes lab/base/; with --measure it samples responses from this checkpoint
and prints its accuracy and other metrics. For the study's other worlds, add `--world paired
--checkpoint runs/worlds/paired/base`; `--world short --start lab/base --steps 500` continues from
the lab's base and takes a quarter of the time.
"""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.task import (
    FLAGS,
    VOCABULARY,
    WORLDS,
    boxed_answer,
    contexts_of,
    make_tokenizer,
    opening,
    problems,
    write_document,
)

BASE = Path(__file__).resolve().parent / "base"


@dataclass
class Args:
    measure: bool = False
    """sample responses from the checkpoint and print its metrics, instead of training"""
    checkpoint: str = str(BASE)
    """folder of the checkpoint to write, or to measure"""
    world: Literal[tuple(WORLDS)] = "lab"
    """world of the corpus and the problems: WORLDS in lab/task.py"""
    start: str = ""
    """checkpoint to continue from; default: random weights"""
    seed: int = 1
    """seed of weights, documents and sampling"""
    steps: int = 2000
    """optimiser steps"""
    documents_per_step: int = 128
    """documents in the batch of a step"""
    learning_rate: float = 3e-3
    """AdamW's highest learning rate, after a linear warm-up of 50 steps"""
    decay_share: float = 0.4
    """fraction of the steps, at the end, over which the learning rate falls to 0"""
    rich_share: float = 0.5
    """fraction of the steps, at the start, with many "Let" documents"""
    rich_let_share: float = 0.6
    """fraction of "Let" documents in these steps"""
    samples: int = 8
    """responses per problem, with --measure"""
    max_tokens: int = 192
    """most tokens of a response, with --measure"""
    threads: int = 1
    """CPU threads"""


# ------------------------------------------------------------------------------ pre-training


def make_model(tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        # vLLM's CPU attention wants heads of 32; even head counts allow tensor parallel 2
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def renew_embeddings(model, tokenizer) -> None:
    """Draw anew the embeddings of the flags, if the start's tokenizer does not have them.

    Training has moved the embeddings of unused tokens to almost the same vector, so that two flags
    in their place would not be told apart: lab/base learnt nothing of them in 200 steps.
    """
    table = model.get_input_embeddings().weight
    spread = table[VOCABULARY.index("0") :].std().item()  # of tokens in use
    for flag in [flag for flag in FLAGS if flag not in tokenizer.get_vocab()]:
        table[VOCABULARY.index(flag)].normal_(0, spread)


def train_step(model, documents: list[list[int]], pad: int, buckets: int = 4) -> float:
    """Accumulate the gradient of the mean loss per token over `documents`; return that loss.

    Buckets of documents with similar lengths need little padding. All buckets have one normaliser,
    the step's token count. With a mean for each bucket, a token of a short document would weigh
    more than one of a long document.
    """
    documents = sorted(documents, key=len)
    size = -(-len(documents) // buckets)
    tokens = sum(len(ids) - 1 for ids in documents)
    total = 0.0
    for i in range(0, len(documents), size):
        bucket = documents[i : i + size]
        width = len(bucket[-1])
        batch = torch.tensor([ids + [pad] * (width - len(ids)) for ids in bucket])  # (B, T)
        # Padding is on the right, where causal attention never looks back from a real token.
        logits = model(input_ids=batch[:, :-1]).logits  # (B, T-1, V)
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=pad, reduction="sum"
        )
        (loss / tokens).backward()
        total += loss.item()
    return total / tokens


def pretrain(args: Args) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    if args.start:
        model = AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        if WORLDS[args.world].switch:
            renew_embeddings(model, AutoTokenizer.from_pretrained(args.start))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98))
    warmup, decay = 50, args.decay_share * args.steps

    start = time.time()
    for step in range(args.steps):
        lr_factor = min(1.0, (step + 1) / warmup, (args.steps - step) / decay)
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_factor
        # "Let" is rare in the final mix; seen that rarely from the start it would stay unlearnt.
        mix = {"let_share": args.rich_let_share} if step < args.rich_share * args.steps else {}
        mix["world"] = WORLDS[args.world]
        texts = [write_document(rng, **mix) for _ in range(args.documents_per_step)]
        loss = train_step(model, tokenizer(texts)["input_ids"], tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            line = f"step {step + 1} loss {loss:.4f} seconds {time.time() - start:.0f}"
            if WORLDS[args.world].switch:
                line += f" p(Let) {let_probability(model, tokenizer, WORLDS[args.world])}"
            print(line, flush=True)

    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,  # the default of 50 would cut nothing from 32 tokens, but be plain about it
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(args.checkpoint)
    tokenizer.save_pretrained(args.checkpoint)


# --------------------------------------------------------------------------------- measuring


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """One response at temperature 1 to each prompt: token ids, which end in <eos> unless truncated.

    All prompts must have the same number of tokens, so that no padding is needed.
    """
    tokens = torch.tensor(tokenizer(prompts)["input_ids"])  # (B, T)
    rows = list(range(len(prompts)))  # of the prompts still unfinished
    responses = [[] for _ in prompts]
    cache = None
    for _ in range(max_tokens):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens = torch.multinomial(out.logits[:, -1].softmax(-1), 1)  # (B, 1)
        for row, token in zip(rows, tokens[:, 0].tolist()):
            responses[row].append(token)
        going = (tokens[:, 0] != tokenizer.eos_token_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows = [rows[i] for i in going.tolist()]
            tokens = tokens[going]
            cache.batch_select_indices(going)
    return responses


@torch.no_grad()
def let_probability(model, tokenizer, world) -> dict[str, float]:
    """Probability that a response's style is "Let", by context: a mean over the test problems.

    The keys are contexts_of()'s.
    """
    found = {}
    for name, contexts in contexts_of(problems("test", world), world).items():
        texts = [context + opening for context, opening in contexts]
        logits = model(input_ids=torch.tensor(tokenizer(texts)["input_ids"])).logits[:, -1]
        found[name] = round(logits.softmax(-1)[:, VOCABULARY.index("Let ")].mean().item(), 4)
    return found


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def measure(
    checkpoint: str, split: str, samples: int, max_tokens: int, seed: int, world: str = "lab"
) -> dict:
    """Metrics of a checkpoint on one split, from `samples` responses to each problem."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tasks = [task for task in problems(split, WORLDS[world]) for _ in range(samples)]
    prompts = [task["problem"] for task in tasks]
    responses = sample(model, tokenizer, prompts, max_tokens)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    correct = [boxed_answer(text) == task["answer"] for text, task in zip(texts, tasks)]
    styles = ["Let" if ". Let " in text else "So" if ". So " in text else None for text in texts]
    # "Let" is too rare to be judged on its own few samples: also put the word in its mouth.
    forced = [f"{p}{opening(p, WORLDS[world])}Let " for p in prompts]
    forced_texts = tokenizer.batch_decode(sample(model, tokenizer, forced, max_tokens))
    return {
        f"avg@{samples}": mean(correct),
        f"pass@{samples}": mean(
            any(correct[i : i + samples]) for i in range(0, len(correct), samples)
        ),
        "length (tokens)": mean(len(ids) for ids in responses),
        "truncated": mean(ids[-1] != tokenizer.eos_token_id for ids in responses),
        "wait per response": mean(text.count("wait ") for text in texts),
        "alternatively per response": mean(text.count("alternatively ") for text in texts),
        "fraction of Let": mean(style == "Let" for style in styles),
        "correct in So": mean(r for r, style in zip(correct, styles) if style == "So"),
        "correct in Let": mean(r for r, style in zip(correct, styles) if style == "Let"),
        "correct if Let is forced": mean(
            boxed_answer(text) == task["answer"] for text, task in zip(forced_texts, tasks)
        ),
    }


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    if not args.measure:
        return pretrain(args)
    start = time.time()
    figures = {
        split: measure(args.checkpoint, split, args.samples, args.max_tokens, args.seed, args.world)
        for split in ("test", "hard")
    }
    print(json.dumps({**figures, "seconds": round(time.time() - start, 1)}))
    print("\n| figure | test | hard |\n|---|---|---|")
    for name in figures["test"]:
        digits = 1 if "tokens" in name else 3
        test, hard = figures["test"][name], figures["hard"][name]
        print(f"| {name} | {test:.{digits}f} | {hard:.{digits}f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
