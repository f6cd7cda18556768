"""Which methods' first update moves SmolLM2 from short answers to steps?

    python study/smollm_modes.py

The policy gets the plain prompt of lab/arithmetic.py, whose worked examples are short. The careless
text of a row is its own greedy response to that; the careful one is its response to a prompt that
asks for steps. grad_alignment.py --modes measures how the first update of each method moves the
log-odds of the two. Results come to study/results/switch_bases.csv and switch_updates.csv, as world
"SmolLM2", the texts to smollm_modes.jsonl. On one core it took an hour.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab import arithmetic, smollm2
from study import experiments, switch
from tests import warm

STEPS = "Solve the problem step by step. Write every step, and check the result before you answer."


@dataclass
class Args:
    num_problems: int = 32
    """rows of the file of modes"""
    length: int = 12
    """most tokens of a text: how the response begins tells the modes apart"""
    num_rollouts: int = 128
    """responses of the first updates"""
    folder: Path = experiments.ROOT / "runs" / "smollm_modes"


def respond(model, tokenizer, messages: list[dict], length: int) -> str:
    """The model's greedy response, its first tokens."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=length, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(args: Args) -> None:
    warm.python()
    path = smollm2.checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = []
    for problem in arithmetic.problems("test")[: args.num_problems]:
        messages = problem["problem"]
        asked = [{"role": "system", "content": STEPS}, messages[-1]]
        careful, careless = (
            respond(model, tokenizer, chat, args.length) for chat in (asked, messages)
        )
        rows.append({"problem": messages, "careful": careful, "careless": careless})
    texts = experiments.RESULTS / "smollm_modes.jsonl"
    experiments.write_problems(texts, rows)
    line = [sys.executable, "grad_alignment.py", "--preset", "smollm", "--modes", str(texts)]
    line += ["--num-rollouts", str(args.num_rollouts), "--num-generations", "8"]
    line += "--num-tokens 0 --num-finite-steps 0 --num-pages 0 --output-dir".split()
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    if experiments.do([*line, str(args.folder)], threads, log := Path(f"{args.folder}.log")):
        sys.exit(f"error: the measurement failed: {log}")
    result = json.loads((args.folder / "alignment.json").read_text())
    switch.record_base("SmolLM2", 1, result)


if __name__ == "__main__":
    main(tyro.cli(Args))
