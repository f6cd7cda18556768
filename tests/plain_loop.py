"""A script's whole loop with a plain engine in vLLM's place: a few seconds, in this process.

The engine knows no weights but those that it is sent, and samples as its SamplingParams say. All
else is the product's: FSDP2, sync and its check, rollout, verify, update, evaluation, checkpoints.

usage under torchrun: plain_loop.py SCRIPT FOLDER [FLAGS as JSON]
"""

import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import common
import grading
import harness
from lab import task

torch.set_num_threads(1)  # a second one helps little, and waits where the machine is busy


class PlainEngine:
    """What the scripts ask of vLLM."""

    def __init__(self, path: str, vocab_size: int, args, shared: bool = True, drift: float = 0.0):
        config = AutoConfig.from_pretrained(path)
        config.vocab_size, config.tie_word_embeddings = vocab_size, False
        self.lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.model_config = SimpleNamespace(dtype=torch.float32, enable_sleep_mode=False)
        parallel = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1))
        self.llm_engine = SimpleNamespace(model_config=self.model_config, vllm_config=parallel)
        self.drift = drift  # how far the log-probs that it reports are off
        self.asked = []  # (prompt ids, SamplingParams) of every request
        self.cache_is_stale = False

    def get_model(self):
        return self.lm

    def collective_rpc(self, method, kwargs=None) -> list:
        if method != "reload_weights":
            return [method(self)]
        own = dict(self.lm.named_parameters())
        for name, weight in kwargs["weights_iterator"]:
            assert own[name].shape == weight.shape and weight.dtype == torch.float32
            own[name].data.copy_(weight)
        self.cache_is_stale = True
        return [None]

    def reset_prefix_cache(self) -> None:
        self.cache_is_stale = False

    @torch.no_grad()
    def generate(self, prompts: list[dict], params: list, use_tqdm: bool) -> list:
        """Prompts of one length. A sample depends on its request's seed and its number only."""
        assert not self.cache_is_stale
        self.asked += [(p["prompt_token_ids"], s) for p, s in zip(prompts, params)]
        ids, noise = [], []
        for prompt, s in zip(prompts, params):
            for number in range(s.n):
                ids.append(prompt["prompt_token_ids"])
                draw = torch.Generator().manual_seed(1000 * s.seed + number)
                noise.append(torch.rand(s.max_tokens, self.lm.config.vocab_size, generator=draw))
        noise = -(-torch.stack(noise).log()).log()  # Gumbel's: the largest sum is a sample
        new, cache, found, logprobs = torch.tensor(ids), DynamicCache(), [], []
        stop = torch.tensor(params[0].stop_token_ids)
        ended = torch.zeros(len(ids), dtype=torch.bool)
        while len(found) < params[0].max_tokens and not ended.all():
            logits = self.lm(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1]
            table = (logits / params[0].temperature).log_softmax(-1)
            new = (table + noise[:, len(found)]).argmax(-1, keepdim=True)
            found.append(new)
            off = self.drift * torch.tensor(3.0 * len(found)).cos()
            logprobs.append(table.gather(1, new) + off)
            ended |= torch.isin(new[:, 0], stop)
        rows, off_rows = torch.cat(found, 1).tolist(), torch.cat(logprobs, 1).tolist()
        samples = iter([self.cut(*row, set(stop.tolist())) for row in zip(rows, off_rows)])
        return [SimpleNamespace(outputs=[next(samples) for _ in range(s.n)]) for s in params]

    @staticmethod
    def cut(ids: list[int], logprobs: list[float], stop: set[int]) -> SimpleNamespace:
        """A response up to its stop token, that included."""
        ends = [t for t, token in enumerate(ids, 1) if token in stop]
        length = ends[0] if ends else len(ids)
        return SimpleNamespace(
            token_ids=ids[:length],
            logprobs=SimpleNamespace(logprobs=logprobs[:length]),
            finish_reason="stop" if ends else "length",
        )


def plain_vllm() -> types.ModuleType:
    """The module as far as rollout() imports it: the real one's import takes 10 s and more."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.util.find_spec("vllm")  # where it lies is asked for, too
    module.SamplingParams = SimpleNamespace
    return module


class Judge:
    """Verdicts in this process, in the place of the pool of verifiers."""

    def schedule(self, function, args, timeout):
        verdict = grading.math_verify_equal(*args[:2])
        return SimpleNamespace(result=lambda: verdict)

    def stop(self) -> None:
        pass


def write_problems(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def train(script: str, folder: Path, drift: float = 0.0, **flags) -> PlainEngine:
    """Run a script's main() in float64: 3 steps of 8 of 12 problems, two evaluation sets."""
    data = Path(folder).parent
    problems = task.problems("train")
    values = dict(
        model=harness.PRESETS["lab"]["model"],
        dataset=write_problems(data / "train.jsonl", problems[:200:17]),
        eval_datasets=(
            write_problems(data / "first.jsonl", problems[3:6]),
            write_problems(data / "second.jsonl", problems[100:102]),
        ),
        system_prompt="",
        output_dir=str(folder),
        seed=2,
        num_steps=3,
        num_prompts=8,
        num_generations=4,
        max_completion_length=96,
        learning_rate=1e-3,
        weight_decay=0.1,
        eval_every=2,
        eval_num_samples=2,
        alignment_every=1,
        save_every=2,
        dtype="float64",
        gradient_checkpointing=False,
    )
    module, engines = importlib.import_module(script), []
    if script == "dsrl":
        values["warmup_steps"] = 2

    def make_engine(*words, **options):
        engines.append(PlainEngine(*words, **options, drift=drift))
        return engines[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", plain_vllm())
        patch.setattr(common, "make_engine", make_engine)
        patch.setattr(grading, "start_verifier", Judge)
        patch.setattr(harness, "say_summary", lambda *words: None)
        patch.setattr(harness, "catch_signals", lambda: None)
        patch.setattr(harness, "quiet", lambda folder: print)
        patch.setattr(harness, "shutdown", lambda engine: None)
        if dist.is_initialized():
            here = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
            patch.setattr(harness, "init_distributed", lambda: here)
        module.main(module.Args(**(values | flags)))
    while harness.LOCKS:  # as the process's end would
        harness.LOCKS.pop().close()
    return engines[0]


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), **json.loads("".join(sys.argv[3:]) or "{}"))
    sys.stdout.flush()
    os._exit(0)  # an orderly end may abort in gloo's threads: see two_ranks.py
