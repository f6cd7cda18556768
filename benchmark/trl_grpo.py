"""TRL's GRPOTrainer on the work that benchmark/fixed_work.py gives to ours, to measure it.

    .venv-trl/bin/python benchmark/trl_grpo.py --model FOLDER --prompts FILE.jsonl --report OUT.json

It runs in an environment with TRL, which benchmark/vs_trl.py makes. A line of FILE is a chat as
JSON; every step takes the next --num-prompts of them. Every response has exactly --new-tokens
tokens (EOS is ignored), every second one of a group is right. The report, also printed as one JSON
line, holds step_seconds (from on_step_begin to on_step_end: generation and update), peak_gib
(resident memory of this process and its children), checks that the work was done, and versions.
"""

import json
import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
import tyro
from datasets import Dataset
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
    per_device_batch: int = 8
    """sequences in one forward pass; gradients accumulate over the step's"""
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    compile: bool = False


class Clock(TrainerCallback):
    """Wall-clock seconds of each optimiser step."""

    def __init__(self):
        self.step_seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.step_seconds.append(time.perf_counter() - self.start)
        print(f"step {len(self.step_seconds)}: {self.step_seconds[-1]:.1f} s", flush=True)


def watch_memory() -> list[float]:
    """[peak so far], kept up to date by a thread: GiB resident, children included."""
    me, peak = psutil.Process(), [0.0]

    def resident(process) -> int:
        try:
            return process.memory_info().rss
        except psutil.NoSuchProcess:
            return 0

    def watch() -> None:
        while True:
            now = sum(map(resident, [me, *me.children(recursive=True)])) / 2**30
            peak[0] = max(peak[0], now)
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    return peak


def make_trainer(args: Args, reward, clock: Clock, folder: str) -> GRPOTrainer:
    """TRL's trainer: one update a step over all its samples, no KL term, as ours."""
    batch = args.num_prompts * args.num_generations
    generation_kwargs = {"ignore_eos": True} if args.generation == "vllm" else {"eos_token_id": -1}
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
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
        torch_compile=args.compile,
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
    peak, clock = watch_memory(), Clock()
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
