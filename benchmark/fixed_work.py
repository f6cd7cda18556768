"""Run a script with a fixed amount of work per step, to measure its speed and memory.

    python benchmark/fixed_work.py grpo_baseline.py --new-tokens 128 --report out.json [FLAGS]

FLAGS are the script's own; the default is --preset smollm --dtype bfloat16. Every response has
exactly --new-tokens tokens, as EOS is ignored. Every second response of a group is correct, so half
of the samples are negatives and every group has a gradient. Everything else is the script's own
main(), in as many processes as it starts. benchmark/step_breakdown.py reads the report:

    step_seconds    wall-clock seconds of each step; steps: the rows of metrics.jsonl
    prompt_tokens   tokens of each prompt of a step; prefix_tokens: those of the shared prefix
    engine_calls    seconds of generate, sleep and wake_up, and on a GPU the memory in use around it
    update_gib      memory in use at the end of each update, on a GPU
    peak_gib        resident memory of all processes together
    matmul_flops    FLOP/s of the fastest matrix product in --dtype, summed over the ranks

The run's own output is deleted, unless --output-dir names a folder.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import harness  # noqa: E402
import inputs  # noqa: E402
from benchmark.resident import watch_memory  # noqa: E402


def used_gib() -> float | None:
    """GiB of the GPU's memory in use by all processes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def note_calls(engine, name: str, calls: list[dict]) -> None:
    """Record each call of a method of the engine: tags, seconds, tokens, GiB before and after."""
    method = getattr(engine, name)

    def noted(*rest, **options):
        before, start = used_gib(), time.perf_counter()
        result = method(*rest, **options)
        call = {"call": name, "tags": options.get("tags")}
        call |= {"before_gib": before, "after_gib": used_gib()}
        call["seconds"] = time.perf_counter() - start
        if name == "generate":
            call["tokens"] = sum(len(y.token_ids) for one in result for y in one.outputs)
        calls.append(call)
        return result

    setattr(engine, name, noted)


def hold_fixed(new_tokens: int) -> dict[str, list]:
    """Fix lengths and rewards in this process. Returns the report's lists, which the run fills."""
    notes = {key: [] for key in "marks prompt_tokens prefix_tokens engine_calls update_gib".split()}
    make_engine, rollout, verify = common.make_engine, common.rollout, common.verify
    split_prefix, clip_gradients = common.split_prefix, common.clip_gradients
    timer, stop_if_asked = harness.timer, harness.stop_if_asked

    def fixed_engine(*rest):
        engine = make_engine(*rest)
        for name in ("generate", "sleep", "release_kv_cache_memory", "wake_up"):
            if hasattr(engine, name):  # vLLM 0.25 has no release
                note_calls(engine, name, notes["engine_calls"])
        generate = engine.generate

        def fixed_generate(prompts, params, **options):
            for p in params:
                p.ignore_eos, p.stop_token_ids = True, []
            return generate(prompts, params, **options)

        engine.generate = fixed_generate
        return engine

    def noted_rollout(engine, problems, *rest):
        notes["prompt_tokens"].append([len(problem["prompt_ids"]) for problem in problems])
        return rollout(engine, problems, *rest)

    def noted_prefix(*rest):
        prefix, contexts = split_prefix(*rest)
        notes["prefix_tokens"].append(len(prefix))
        return prefix, contexts

    def noted_clip(*rest):  # caches are still full here
        notes["update_gib"].append(used_gib())
        return clip_gradients(*rest)

    def fixed_verify(samples, *rest):
        counts = verify(samples, *rest)
        for sample in samples:
            assert len(sample["ids"]) == new_tokens
            sample["reward"] = float(sample["index"] % 2)
        return counts

    def marked_timer():
        notes["marks"].append([time.perf_counter()])
        return timer()

    def marked_stop(*rest):
        stop_if_asked(*rest)
        notes["marks"][-1].append(time.perf_counter())

    common.make_engine, common.rollout, common.verify = fixed_engine, noted_rollout, fixed_verify
    common.split_prefix, common.clip_gradients = noted_prefix, noted_clip
    harness.timer, harness.stop_if_asked = marked_timer, marked_stop
    return notes


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product of several, tried for at most 20 seconds."""
    cuda, best, until = torch.cuda.is_available(), 0.0, time.perf_counter() + 20
    for n in (4096, 8192, 16384) if cuda else (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device="cuda" if cuda else "cpu").to(dtype) for _ in range(2))
        for _ in range(10):
            if time.perf_counter() > until:
                return best
            used_gib()  # waits for the GPU
            start = time.perf_counter()
            a @ b
            used_gib()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", help="file of the script to run")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each response")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    own, flags = parser.parse_known_args()
    whole = sys.argv
    if "FIXED_WORK" not in os.environ:  # the ranks use the launcher's
        os.environ["FIXED_WORK"] = tempfile.mkdtemp()
    folder = os.environ["FIXED_WORK"]
    flags = ([] if "--preset" in flags else ["--preset", "smollm", "--dtype", "bfloat16"]) + flags
    flags += [] if "--output-dir" in flags else ["--output-dir", folder]
    flags += ["--max-completion-length", str(own.new_tokens), "--eval-every", "0"]
    sys.argv = [own.script, *flags]
    script = importlib.import_module(Path(own.script).stem)
    args = harness.parse_args(script.Args)
    sys.argv = whole

    def measured_run(args) -> None:
        notes = hold_fixed(own.new_tokens)
        script.main(args)
        flops = matmul_flops(getattr(torch, args.dtype)) * int(os.environ["WORLD_SIZE"])
        if int(os.environ["RANK"]) == 0:
            rows = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
            seconds = [end - start for start, end in notes.pop("marks")]
            report = notes | {"step_seconds": seconds, "steps": [json.loads(row) for row in rows]}
            report |= {"model": inputs.resolve_model(args.model), "matmul_flops": flops}
            report |= {"command": [own.script, *flags], "new_tokens": own.new_tokens}
            own.report.write_text(json.dumps(report))

    # The launcher goes on after its ranks, which run this very command and end in launch().
    peak = watch_memory(os.getpid()) if "RANK" not in os.environ else []
    harness.launch(measured_run, args)
    report = json.loads(own.report.read_text())
    own.report.write_text(json.dumps(report | {"peak_gib": round(peak[0], 2)}))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
