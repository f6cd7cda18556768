"""What the forks of study/switch.py put in the place of the scripts' optimiser and evaluation."""

import math
from pathlib import Path

import numpy as np
import torch

import common
import grad_alignment
from lab import task
from study.experiments import stated


class FixedLength(torch.optim.Optimizer):
    """Every step has the same length: `lr`, over all weights, along the gradient or its signs.

    Methods whose gradients differ in norm are then compared at equal steps. A step along the signs
    is what AdamW does first: m / sqrt(v) is 1 or -1 in every weight.
    """

    def __init__(self, parameters, lr: float, signs: bool = False):
        super().__init__(parameters, {"lr": lr, "signs": signs})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            steps = [p.grad.sign() if group["signs"] else p.grad for p in parameters]
            norm = torch.nn.utils.get_total_norm(steps)  # of all shards, if there are some
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if norm > 0:
                for p, along in zip(parameters, steps):
                    p.add_(along, alpha=-group["lr"] / norm.item())


def evaluate(policy, engine, datasets: dict, stop, tokenizer, verifier, args) -> dict:
    """common.evaluate, and what tells the careful mode from the careless one.

    Beside its keys, per data set: eval/NAME/let and eval/NAME/restated, fractions of the samples,
    and eval/NAME/p_KIND, the probability that the style is "Let", given the right opening and what
    lab.task.contexts_of says stands before it. The world is the name of the data set's folder.
    """
    metrics, k = {}, args.eval_num_samples
    keys = f"avg@{k} pass@{k} length truncated boxed thoughts/reflection thoughts/transition"
    let = tokenizer.convert_tokens_to_ids("Let ")
    device = next(policy.parameters()).device
    for path, problems in datasets.items():
        name, world = Path(path).stem, task.WORLDS[Path(path).parent.name]
        samples = common.sample_and_verify(engine, problems, k, stop, tokenizer, verifier, args)
        result = common.summarize(samples, k)
        found = {key: result[key] for key in keys.split()}
        asked = [p["problem"].partition("Q ")[2].removesuffix(" A") for p in problems]
        asked = [name for name in asked for _ in range(k)]
        found["let"] = np.mean([". Let " in s["text"] for s in samples])
        found["restated"] = np.mean([stated(s["text"]) == a for s, a in zip(samples, asked)])
        for kind, rows in task.contexts_of(problems, world).items():
            contexts = [tokenizer.encode(context + start) for context, start in rows]
            answers = [np.array([let])] * len(rows)
            logp = grad_alignment.logprobs(policy, contexts, answers, args, device)
            found[f"p_{kind}"] = np.mean([math.exp(one[0]) for one in logp])
        metrics |= {f"eval/{name}/{key}": float(value) for key, value in found.items()}
    return metrics
