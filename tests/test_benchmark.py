"""The programs of benchmark/ run, in their smallest form. Speed and memory are not judged here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import grading  # noqa: E402
from benchmark import hardware, vs_trl  # noqa: E402
from study import graders, verify  # noqa: E402


def run_benchmark(program: str, *words: str) -> str:
    """What a program of benchmark/ prints."""
    command = [*warm.python(), f"benchmark/{program}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def last_line(program: str, *words: str) -> dict:
    """The JSON that it ends with."""
    return json.loads(run_benchmark(program, *words).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["grpo_baseline.py", "dsrl.py"])
def test_step_breakdown(script, tmp_path):
    """The work of a step is what was asked for, and the parts are fractions of the whole."""
    flags = "--preset lab --num-prompts 2 --num-generations 4 --num-steps 2 --new-tokens 16".split()
    run_benchmark("fixed_work.py", script, "--report", str(tmp_path / "out.json"), *flags)
    result = last_line("step_breakdown.py", "--report", str(tmp_path / "out.json"))
    assert 0 < result["update_peak_fraction"] < 1
    assert 0 < result["sync_fraction"] < result["other_fraction"] < 1
    assert result["rollout_tokens_per_s"] > 0 and result["peak_gib"] > 0


def test_checks(tmp_path):
    """Every step's weights reach the engine, and the canary would see others."""
    flags = "--preset lab --num-steps 2 --eval-every 0 --advantage sign --num-prompts 2 "
    flags += "--num-generations 4 --max-completion-length 16"
    result = last_line("gpu_parts.py", "checks", f"--folder={tmp_path / 'run'}", f"--flags={flags}")
    assert result["syncs"] == 3 and not result["check_failures"]
    assert result["seeded_seconds"] > 0 and result["unseeded_seconds"] > 0
    assert max(result["check_gaps"]) < 1e-3 < min(result["check_stale_gaps"])


@pytest.mark.slow
def test_memory():
    """Full logits of 32,000 words need more memory than ours, even for few tokens."""
    flags = "--vocab 32000 --tokens 4096 --hidden 64 --layers 1 --repeats 1".split()
    result = last_line("memory.py", *flags)
    peaks = {head: row["peak_gib"] for head, row in result["heads"].items()}
    assert set(peaks) == {"chunked", "log_softmax", "cross_entropy"}
    assert peaks["chunked"] < min(peaks["log_softmax"], peaks["cross_entropy"])
    assert 0 < result["peak_ratio"] < 1 and result["time_ratio"] > 0


def test_verify(tmp_path, monkeypatch):
    """The references of a file, ordinary and hostile answers."""
    monkeypatch.setattr(grading, "TIMEOUT", 5.0)  # measure_answers sets it
    golds = ["5", "", r"\frac{1}{2}", "}{"]
    rows = [{"reward_model": {"ground_truth": gold}} for gold in golds]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    verifier = grading.start_verifier()
    found = verify.measure_references(verifier, tmp_path / "data.parquet")
    assert (found["references"], found["met"], found["empty"]) == (4, 2, 1)
    assert found["not_met"] == ["}{"]
    pairs = [(r"\frac{2}{4}", "1/2"), ("x+1", "x+2"), ("9^{9^{9^{9}}}", "1")]
    found = verify.measure_answers(verifier, pairs, timeout=0.5)
    verifier.stop()
    assert (found["answers"], found["correct"], found["timeouts"], found["errors"]) == (3, 1, 1, 0)


def test_graders():
    """study/graders.py tells graders apart: the authors' strings reject what ours accept."""
    equal, wrong = graders.sets()["sums"]
    ours, strings = (
        [graders.accept(grader, cases[:5])[0] for cases in (equal, wrong)]
        for grader in (graders.GRADERS["this project"], graders.authors_strings)
    )
    assert ours == [5, 0] and strings == [0, 0]


def test_vs_trl(tmp_path):
    """Medians and quotients, from reports of each program; the first step warms up."""
    for name, seconds, peak in (("trl", 30, 4), ("grpo", 10, 5), ("nsr_prerl", 6, 2)):
        for i in (1, 2):
            report = {"step_seconds": [999, seconds + i], "peak_gib": peak}
            (tmp_path / f"{name}-{i}.json").write_text(json.dumps(report))
    result = vs_trl.summarize(tmp_path)
    assert result["trl"]["seconds"] == 31.5 and result["trl"]["speedup"] == 1
    assert result["grpo"]["speedup"] == pytest.approx(31.5 / 11.5, abs=0.01)
    assert (result["grpo"]["memory"], result["nsr_prerl"]["memory"]) == (1.25, 0.5)


@pytest.mark.slow
def test_gpu(tmp_path):
    """The parts of gpu.sh in tiny form, as far as they need no GPU; each reports its figures."""
    parts = "lab qwen profile memory".split()
    done = subprocess.run(
        ["bash", "benchmark/gpu.sh", "--cpu", *parts],
        cwd=ROOT, env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    logs = "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert re.findall(r"^(\w+) +ok", done.stdout, re.M) == parts, done.stdout + logs
    assert len(result["lab"]["dsrl"]["reward"]) == 3
    assert len((tmp_path / "dsrl" / "metrics.jsonl").read_text().splitlines()) == 3
    assert result["qwen"]["rollout_ratio_to_vllm"] > 0 and result["qwen"]["sync_s"] > 0
    assert result["profile"]["microbatch_seconds"] > 0 and result["memory"]["peak_ratio"] > 0


@pytest.mark.parametrize("name", hardware.MODELS)
def test_weights_stay_only_where_they_fit(name):
    """The rule asks for no less than the update's own terms."""
    m = hardware.MODELS[name]
    for card, gib in hardware.CARDS.items():
        for gpus in (1, 2, 4, 8):
            for tokens in (8192, 16384, 65536):
                for offload in (False, True):
                    if hardware.weights_stay(m, gpus, 1, tokens, offload, gib):
                        update = hardware.update_terms(m, gpus, tokens, offload, m.engine(1))
                        assert update["peak"] * (1 + hardware.SPARE) < gib * hardware.GIB
                    # and it is the one that common.py decides by
                    config = SimpleNamespace(
                        num_hidden_layers=m.layers,
                        hidden_size=m.hidden,
                        intermediate_size=m.intermediate,
                        vocab_size=m.vocab,
                    )
                    args = SimpleNamespace(
                        cpu_offload=offload,
                        gradient_checkpointing=True,
                        context=m.length,
                        max_tokens_per_microbatch=tokens,
                    )
                    needed = common.trainer_bytes(m.parameters, 2, config, args, gpus)
                    stay = m.engine(1) + needed <= 0.9 * gib * hardware.GIB
                    assert stay == hardware.weights_stay(m, gpus, 1, tokens, offload, gib)
    assert hardware.plan(m, 8, 80)[1]
