"""The programs of benchmark/ run, in their smallest form. Speed and memory are not judged here."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmark import hardware  # noqa: E402


def last_line(*command: str) -> dict:
    """The JSON that a program of benchmark/ ends with."""
    command = [*warm.python(), f"benchmark/{command[0]}", *command[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", ["grpo_baseline.py", "dsrl.py"])
def test_step_breakdown(script):
    """The work of a step is what was asked for, and the parts are shares of the whole."""
    lab = "--preset lab --num-prompts 2 --num-generations 4"
    flags = ["--script", script, "--num-steps", "2", "--new-tokens", "16", f"--flags={lab}"]
    result = last_line("step_breakdown.py", *flags)
    assert 0 < result["update_peak_fraction"] < 1
    assert 0 < result["sync_share"] < result["other_share"] < 1
    assert result["rollout_tokens_per_s"] > 0 and result["peak_gib"] > 0


def test_checks(tmp_path):
    """Every step's weights reach the engine, and the canary would see others."""
    flags = "--preset lab --num-steps 2 --eval-every 0 --advantage sign --num-prompts 2 "
    flags += "--num-generations 4 --max-completion-length 16"
    result = last_line("gpu_parts.py", "checks", f"--folder={tmp_path / 'run'}", f"--flags={flags}")
    assert result["syncs"] == 3 and not result["check_failures"]
    assert max(result["check_gaps"]) < 1e-3 < min(result["check_stale_gaps"])


def test_memory():
    """Full logits of 32,000 words need more memory than ours, even for few tokens."""
    flags = "--vocabs 32000 --tokens 4096 --hidden 64 --layers 1 --repeats 1".split()
    points = last_line("memory.py", *flags)["points"]
    peaks = {point["head"]: point["peak_gib"] for point in points}
    assert set(peaks) == {"chunked", "log_softmax", "cross_entropy"}
    assert peaks["chunked"] < min(peaks["log_softmax"], peaks["cross_entropy"])


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
                        max_prompt_length=0,
                        max_completion_length=m.length,
                        max_tokens_per_microbatch=tokens,
                    )
                    needed = common.trainer_bytes(m.parameters, 2, config, args, gpus)
                    stay = m.engine(1) + needed <= 0.9 * gib * hardware.GIB
                    assert stay == hardware.weights_stay(m, gpus, 1, tokens, offload, gib)
    assert hardware.plan(m, 8, 80)[1]
