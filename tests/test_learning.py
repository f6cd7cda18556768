"""Does it learn? The lab at a high learning rate for 12 steps, as a user runs it.

The margins leave room: study/experiments.py runs the same with three seeds (guard-*), and
study/tables.md has what these gained.
"""

import math

import pytest
from test_scripts import metrics, run

from study import switch

LAB = "--num-prompts 16 --num-generations 8 --max-completion-length 192 --eval-num-samples 8"
LAB += " --learning-rate 1e-3 --num-steps 12 --eval-every 12"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "margin", "flags"),
    [("grpo_baseline", 0.3, ""), ("dsrl", 0.3, "--warmup-steps 4")],
)
def test_held_out_accuracy_rises(tmp_path, script, margin, flags):
    run(script, tmp_path, *LAB.split(), *flags.split())
    before, *rows = metrics(tmp_path)
    assert rows[-1]["eval/lab/avg@8"] > before["eval/lab/avg@8"] + margin
    for row in rows:
        # The entropy is -log π(y|x) per token, so only a likelihood without x is far below it: a
        # response alone does not tell which problem it restates.
        nats = -row["policy/logprob"] / row["policy/entropy"]
        assert nats > 2 if row["phase"] == "pretrain" else nats < 1.5, (row["step"], nats)
        assert math.isfinite(row["policy/grad_norm"])


@pytest.mark.slow
def test_the_careful_mode_comes_back(tmp_path):
    """In the switch world NSR-PreRL raises the mode that the prompt holds down at 3%."""
    args = switch.Args(only=("nsr-prerl",), optimizers=("length-0.1",), worlds=("switch",))
    args.bases, args.seeds, args.steps, args.folder, args.jobs = (2,), (2,), 5, tmp_path, 1
    try:
        switch.main(args)
    finally:
        (switch.ROOT / switch.script_name("nsr-prerl", "length-0.1")).unlink(missing_ok=True)
    (taken,) = switch.chosen(args)
    before, *_, after = metrics(switch.run_folder(args, taken))
    assert before["eval/lab/p_N"] < 0.05 and after["eval/lab/p_N"] > 0.3
    assert after["eval/lab/avg@8"] > before["eval/lab/avg@8"] + 0.1
