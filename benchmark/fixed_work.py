"""Run a script with the work of a step held fixed, to measure it.

    python benchmark/fixed_work.py grpo_baseline.py --new-tokens 128 --report out.json [FLAGS]

FLAGS are the script's own; --preset smollm --dtype bfloat16 unless others are given. Every response
has exactly --new-tokens tokens (EOS is ignored), and every second one of a group is right, so half
of the samples are negatives and no group is without a gradient. All else is the script as it is:
its own main() runs, in as many processes as it starts by itself.

The report holds step_seconds (whole steps by the wall clock), steps (the lines of metrics.jsonl),
prompt_tokens (the lengths of each step's prompts), prefix_tokens (what they all begin with, if the
update computes it once), new_tokens, model (the folder it began from), peak_gib (resident memory of
all processes together), engine_calls (seconds of each generate, and on a GPU of each sleep and
wake_up, with the memory in use before and after), update_gib (memory in use at the end of each
update, on a GPU) and matmul_flops, the FLOP/s of this machine's best matrix product in --dtype,
measured by every rank at the end of the run, and added up. The run's own output is thrown away,
unless --output-dir names a folder.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import harness  # noqa: E402
import inputs  # noqa: E402
from benchmark.resident import watch_memory  # noqa: E402


def used_gib() -> float | None:
    """The GPU's memory in use, by all processes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def note_calls(engine, name: str, calls: list[dict]) -> None:
    """Note each call of a method of the engine: tags, seconds, tokens, used GiB around it."""
    method = getattr(engine, name)

    def noted(*rest, **options):
        before, start = used_gib(), time.perf_counter()
        result = method(*rest, **options)
        after = used_gib()
        seconds = time.perf_counter() - start
        call = {"call": name, "tags": options.get("tags"), "seconds": seconds}
        if name == "generate":
            call["tokens"] = sum(len(y.token_ids) for one in result for y in one.outputs)
        calls.append(call | {"before_gib": before, "after_gib": after})
        return result

    setattr(engine, name, noted)


def hold_fixed(
    new_tokens: int, marks: list, prompts: list, prefixes: list, calls: list, updates: list
) -> None:
    """Fix lengths and rewards in this process, and fill the lists, of a step or call each.

    Args:
        marks: begin and end; prompts: their lengths; prefixes: length of what they share; calls:
            of the engine; updates: used GiB before the gradient is clipped, caches still full.
    """
    make_engine, rollout, verify = common.make_engine, common.rollout, common.verify
    split_prefix, clip_gradients = common.split_prefix, common.clip_gradients
    timer, stop_if_asked = harness.timer, harness.stop_if_asked

    def fixed_engine(*rest):
        engine = make_engine(*rest)
        for name in ("generate", "sleep", "release_kv_cache_memory", "wake_up"):
            if hasattr(engine, name):  # vLLM 0.25 has no release
                note_calls(engine, name, calls)
        generate = engine.generate

        def fixed_generate(prompts, params, **options):
            for p in params:
                p.ignore_eos, p.stop_token_ids = True, []
            return generate(prompts, params, **options)

        engine.generate = fixed_generate
        return engine

    def noted_rollout(engine, problems, *rest):
        prompts.append([len(problem["prompt_ids"]) for problem in problems])
        return rollout(engine, problems, *rest)

    def noted_prefix(*rest):
        prefix, contexts = split_prefix(*rest)
        prefixes.append(len(prefix))
        return prefix, contexts

    def noted_clip(*rest):
        updates.append(used_gib())
        return clip_gradients(*rest)

    def fixed_verify(samples, *rest):
        counts = verify(samples, *rest)
        for sample in samples:
            assert len(sample["ids"]) == new_tokens
            sample["reward"] = float(sample["index"] % 2)
        return counts

    def marked_timer():
        marks.append([time.perf_counter()])
        return timer()

    def marked_stop(*rest):
        stop_if_asked(*rest)
        marks[-1].append(time.perf_counter())

    common.make_engine, common.rollout, common.verify = fixed_engine, noted_rollout, fixed_verify
    common.split_prefix, common.clip_gradients = noted_prefix, noted_clip
    harness.timer, harness.stop_if_asked = marked_timer, marked_stop


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of some square matrix products, the best of ten tries each.

    No try begins after 20 s: a CPU may have no instructions for bfloat16.
    """
    best, until = 0.0, time.perf_counter() + 20
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(10):
            if time.perf_counter() > until:
                return best
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--report", type=Path, required=True)
    own, flags = parser.parse_known_args()
    whole = sys.argv
    if "FIXED_WORK" not in os.environ:  # the ranks use the launcher's
        os.environ["FIXED_WORK"] = tempfile.mkdtemp()
    folder = os.environ["FIXED_WORK"]
    if "--preset" not in flags:
        flags = ["--preset", "smollm", "--dtype", "bfloat16", *flags]
    flags += ["--max-completion-length", str(own.new_tokens), "--eval-every", "0"]
    if "--output-dir" not in flags:
        flags += ["--output-dir", folder]
    sys.argv = [own.script, *flags]
    script = importlib.import_module(Path(own.script).stem)
    args = harness.parse_args(script.Args)
    sys.argv = whole

    def measured_run(args) -> None:
        marks, prompts, prefixes, calls, updates = [], [], [], [], []
        hold_fixed(own.new_tokens, marks, prompts, prefixes, calls, updates)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        script.main(args)
        flops = matmul_flops(getattr(torch, args.dtype), device)
        if rank:
            return
        rows = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
        report = {
            "command": [own.script, *flags],
            "model": inputs.resolve_model(args.model),
            "world_size": world_size,
            "new_tokens": own.new_tokens,
            "prompt_tokens": prompts,
            "prefix_tokens": prefixes,
            "step_seconds": [end - start for start, end in marks],
            "steps": [json.loads(row) for row in rows],
            "engine_calls": calls,
            "update_gib": updates,
            "matmul_flops": flops * world_size,
        }
        own.report.write_text(json.dumps(report))

    # The launcher goes on after its ranks, which run this very command and end in launch().
    peak = watch_memory(os.getpid()) if "RANK" not in os.environ else []
    harness.launch(measured_run, args)
    report = json.loads(own.report.read_text())
    own.report.write_text(json.dumps(report | {"peak_gib": round(peak[0], 2)}))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
