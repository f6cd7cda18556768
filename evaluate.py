"""Avg@k and unbiased pass@k of any checkpoint, on the paper's benchmarks or on local problems.

    python evaluate.py --model runs/x/model --datasets aime24 aime25 amc23 --num-samples 32
    python evaluate.py --preset lab --model runs/y/model

Samples responses with vLLM on every rank and verifies them. The training scripts evaluate with the
same functions, so the same weights, seed and lengths give the same numbers. Writes results.json and
completions.parquet. --resume continues an evaluation that was killed, unless the model's files or
the data have changed since.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import torch.distributed as dist

import common
import grading
import harness
import inputs
import thoughts


@dataclass
class Args:
    # Model and data
    model: str = "Qwen/Qwen3-4B"
    """local folder (RUN/model), hub id, or bare name of a known family"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the engine"""
    datasets: tuple[str, ...] = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")
    """the default's names, lab, arithmetic, hub ids, or local .parquet or .jsonl files"""
    num_samples: int = 32
    """responses per problem, the k of avg@k (paper: 32)"""
    seed: int = 1
    """seed of sampling"""

    # Rollout
    system_prompt: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """system prompt of every problem; empty: none"""
    max_completion_length: int = 8192
    """most tokens of a response; reduced to fit the model's context"""
    temperature: float = 1.0
    """sampling temperature"""
    top_p: float = 1.0
    """nucleus sampling: sample from the likeliest tokens with this total probability"""
    grader: Literal["math-verify", "boxed-string"] = "math-verify"
    """math-verify: spelling rules, then math-verify's algebra; boxed-string: the authors' string
    comparison"""

    # Run (--resume may change these)
    preset: Literal["paper", "lab", "smollm"] = "paper"
    """set of defaults, as in training: model, data sets, lengths, system prompt, dtype"""
    output_dir: str = ""
    """folder of the results; default: runs/evaluate__MODEL__DATASETS__sSEED__TIME"""
    resume: bool = False
    """continue the evaluation in --output-dir; finished problems are not sampled again"""

    # Machine (--resume may change these)
    num_processes: int = 0
    """number of processes; 0: one per GPU, or one on a CPU"""
    tensor_parallel_size: int = 1
    """ranks per vLLM engine; each engine gets a part of the problems"""
    gpu_memory_utilization: float = 0.9
    """fraction of a GPU's memory for vLLM"""


def main(args: Args) -> None:
    rank, world_size, _ = harness.init_distributed()
    harness.check_args(args)
    path, config, tokenizer = inputs.load_model_files(args)
    problems = {name: inputs.load_problems(name, "test") for name in args.datasets}
    vocab_size = inputs.num_tokens(tokenizer, config)
    stop = inputs.find_stop_tokens(path, tokenizer, vocab_size)
    problems = {n: inputs.encode_prompts(p, tokenizer, args) for n, p in problems.items()}
    inputs.fix_content(path, problems, args)
    verifier = grading.start_verifier()
    problems = {n: inputs.check_references(n, p, verifier, args) for n, p in problems.items()}
    inputs.fit_context(list(problems.values()), config, args)
    folder = harness.make_output_dir(args)
    say = harness.quiet(folder)
    say(f"{args.model} on {world_size} ranks, output in {folder}")
    say(f"a response ends at {' or '.join(tokenizer.convert_ids_to_tokens(stop))}")

    engine = common.make_engine(path, vocab_size, args, shared=False)
    sent = common.send_weights(engine, common.read_weights(path, config), vocab_size, config)
    common.check_weights(engine, sent)

    parts = folder / "parts"
    if rank == 0:
        parts.mkdir(exist_ok=True)
    # About 1,024 responses per engine and part: what a kill loses, at most
    size = max(1, 1024 // args.num_samples) * (world_size // args.tensor_parallel_size)
    for name, rows in problems.items():
        rows = unfinished(parts, Path(name).stem, rows)
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            samples = common.sample_and_verify(
                engine, chunk, args.num_samples, stop, tokenizer, verifier, args
            )
            if rank == 0:
                part = parts / f"{Path(name).stem}_{chunk[0]['id']:06d}.parquet"
                save_part(part, Path(name).stem, chunk, samples, args.num_samples, tokenizer)
            say(f"{name}: {start + len(chunk)} of {len(rows)} problems")

    if rank == 0:
        table = pyarrow.concat_tables(
            pyarrow.parquet.read_table(part) for part in sorted(parts.glob("*.parquet"))
        )
        pyarrow.parquet.write_table(table, folder / "completions.parquet")
        results = {Path(n).stem: results_of(table, Path(n).stem, args) for n in problems}
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        say(results_table(results, args.num_samples))
        say(f"all metrics are in {folder / 'results.json'}")
    verifier.stop()
    harness.shutdown(engine)


def unfinished(parts: Path, dataset: str, problems: list[dict]) -> list[dict]:
    """The problems that no file in `parts` has; these may come from another number of ranks."""
    done = [set()]
    if dist.get_rank() == 0:
        for part in parts.glob("*.parquet"):
            table = pyarrow.parquet.read_table(part, columns=["dataset", "problem"])
            done[0] |= {row["problem"] for row in table.to_pylist() if row["dataset"] == dataset}
    dist.broadcast_object_list(done)
    return [problem for problem in problems if problem["id"] not in done[0]]


def save_part(part: Path, dataset: str, problems, samples, k: int, tokenizer) -> None:
    """Write one row per response to `part`. The file gets its name once it is complete."""
    rows = []
    for s in samples:
        problem = problems[s["index"] // k]
        rows.append(
            dict(
                dataset=dataset,
                problem=problem["id"],
                sample=s["index"] % k,
                prompt=tokenizer.decode(problem["prompt_ids"]),
                answer=problem["answer"],
                response=s["text"],
                reward=s["reward"],
                length=s["length"],
                truncated=s["truncated"],
            )
        )
    temporary = part.with_suffix(".tmp")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    temporary.rename(part)


def results_of(table: pyarrow.Table, dataset: str, args) -> dict:
    """The metrics of one data set from its rows: common.summarize()."""
    rows = [row for row in table.to_pylist() if row["dataset"] == dataset]
    rows.sort(key=lambda row: (row["problem"], row["sample"]))
    for row in rows:
        row["thoughts"] = thoughts.count(row["response"])
        row["boxed"] = grading.last_boxed(row["response"]) is not None
    return common.summarize(rows, args.num_samples)


def results_table(results: dict, k: int) -> str:
    """One line per data set and the mean of their avg@k, which the paper's tables also have."""
    keys = {
        f"avg@{k}": f"avg@{k}",
        "+-": "standard_error",
        "pass@1": "pass@1",
        f"pass@{k}": f"pass@{k}",
        "length": "length",
        "truncated": "truncated",
        "reflections": "thoughts/reflection",
        "transitions": "thoughts/transition",
    }
    lines = [" " * 28 + "problems" + "".join(f"{title:>12}" for title in keys)]
    for name, result in results.items():
        values = "".join(f"{result[key]:12.3f}" for key in keys.values())
        lines.append(f"{name:28}{result['problems']:8}{values}")
    if len(results) > 1:
        mean = sum(result[f"avg@{k}"] for result in results.values()) / len(results)
        lines.append(f"{'mean over data sets':36}{mean:12.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    harness.launch(main, harness.parse_args(Args))
