"""grad_alignment.py against plain autograd over flattened gradients, in float64, and 2 ranks."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import warm
from test_scripts import metrics, run, same, weights
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "lab" / "base"
GROUP = 4


def measure(folder: Path, *flags: str) -> dict:
    command = "grad_alignment.py --preset lab --dtype float64 --num-rollouts 24 --num-generations 4"
    command += " --num-tokens 12 --num-finite-steps 3 --seed 3"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*warm.python(), *command.split(), "--output-dir", str(folder), *flags],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "alignment.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment") / "run"
    return measure(folder), folder


class Plain:
    """The base model in float64, one sequence at a time, full logits, one flat gradient."""

    def __init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64)

    def logps(self, x: list[int], y: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]  # [T, V]
        return logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None])[:, 0]

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        self.model.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone()

    def add(self, vector: torch.Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(
                self.model.parameters(),
                vector.split([p.numel() for p in self.model.parameters()]),
            ):
                p += part.view_as(p)


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def test_every_number_equals_plain_autograd(measured):
    result, folder = measured
    rows = pyarrow.parquet.read_table(folder / "rollouts.parquet").to_pylist()
    plain, bos = Plain(), [result["bos"]]
    assert len(rows) == len(result["rollouts"]) == 24 and bos == [1]
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    assert 0 < rewards.mean() < 1
    groups = rewards.view(-1, GROUP)
    r_bar = (groups - groups.mean(1, keepdim=True)).flatten()
    standard = groups.std(1, keepdim=True).expand_as(groups).flatten() + 1e-6
    updates = {name: 0.0 for name in ("GRPO", "NSR-RL", "PreRL", "NSR-PreRL", "PSR-PreRL")}
    inners, cosines, differences = [], [], []
    for i, (row, ours) in enumerate(zip(rows, result["rollouts"])):
        x, y = row["prompt_ids"], row["response_ids"]
        logp = {"x": plain.logps(x, y), "bos": plain.logps(bos, y)}
        g = {space: plain.gradient(value.mean()) for space, value in logp.items()}
        expected = {
            "reward": row["reward"],
            "length": len(y),
            "inner_product": (g["bos"] @ g["x"]).item(),
            "cosine": cosine(g["bos"], g["x"]),
            "norm_bos": g["bos"].norm().item(),
            "norm_x": g["x"].norm().item(),
            "logprob_bos": logp["bos"].mean().item(),
            "logprob_x": logp["x"].mean().item(),
        }
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert ours[key] == pytest.approx(value, rel=1e-8, abs=1e-10), (i, key)
        inners.append(expected["inner_product"])
        cosines.append(expected["cosine"])
        differences.append(expected["logprob_x"] - expected["logprob_bos"])
        G = {space: len(y) * gradient for space, gradient in g.items()}
        updates["GRPO"] += (r_bar / standard)[i] * G["x"]
        updates["PreRL"] += r_bar[i] * G["bos"]
        if r_bar[i] < 0:
            updates["NSR-RL"] += r_bar[i] * G["x"]
            updates["NSR-PreRL"] += r_bar[i] * G["bos"]
        else:
            updates["PSR-PreRL"] += r_bar[i] * G["bos"]
        if i < 3:
            eta = 1e-3 / g["bos"].norm().item() ** 2
            plain.add(eta * g["bos"])
            after = plain.logps(x, y).mean().item()
            plain.add(-eta * g["bos"])
            step = result["finite_steps"][i]
            assert step["predicted"] == pytest.approx(eta * expected["inner_product"], rel=1e-8)
            assert step["actual"] == pytest.approx(after - expected["logprob_x"], rel=1e-5)
            assert step["ratio"] == pytest.approx(1, abs=0.05)
    assert len(result["finite_steps"]) == 3
    assert set(result["cosine_to_grpo"]) == set(updates) - {"GRPO"}
    for name, value in result["cosine_to_grpo"].items():
        assert value == pytest.approx(cosine(updates[name], updates["GRPO"]), abs=1e-8), name
    groups = {"all": rewards >= 0, "correct": rewards == 1, "incorrect": rewards == 0}
    for name, chosen in groups.items():
        chosen, ours = chosen.numpy(), result["summary"][name]
        expected = {
            "rollouts": chosen.sum(),
            "inner_product_mean": np.mean(np.array(inners)[chosen]),
            "inner_product_max": np.max(np.array(inners)[chosen]),
            "inner_product_min": np.min(np.array(inners)[chosen]),
            "fraction_negative": np.mean(np.array(inners)[chosen] < 0),
            "cosine_mean": np.mean(np.array(cosines)[chosen]),
            "logprob_difference_mean": np.mean(np.array(differences)[chosen]),
        }
        assert ours == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_tokens_equal_plain_autograd(measured):
    result, folder = measured
    rows = pyarrow.parquet.read_table(folder / "rollouts.parquet").to_pylist()
    plain = Plain()
    assert len(result["tokens"]) == 12
    for token in result["tokens"]:
        row, t = rows[token["rollout"]], token["position"]
        y, g = row["response_ids"], {}
        for space, x in (("x", row["prompt_ids"]), ("bos", [result["bos"]])):
            logp = plain.logps(x, y)[t]
            g[space] = plain.gradient(logp)
            assert token[f"prob_{space}"] == pytest.approx(logp.exp().item(), rel=1e-8)
            assert token[f"norm_{space}"] == pytest.approx(g[space].norm().item(), rel=1e-8)
        assert token["cosine"] == pytest.approx(cosine(g["x"], g["bos"]), abs=1e-8)


def test_two_ranks_equal_one(measured, tmp_path):
    one, two = measured[0], measure(tmp_path, "--num-processes", "2")
    for key in ("rollouts", "finite_steps", "tokens"):
        assert len(one[key]) == len(two[key])
        for a, b in zip(one[key], two[key]):
            assert a == pytest.approx(b, rel=1e-8, abs=1e-8)
    assert one["cosine_to_grpo"] == pytest.approx(two["cosine_to_grpo"], rel=1e-8)


def test_picture_and_page(measured):
    folder = measured[1]
    assert (folder / "alignment.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "tokens.html").read_text()
    assert page.count("<h2>") == 10 and "http" not in page  # self-contained
    assert page.count('<pre class="prompt">Q ') == 10
    assert len(set(re.findall(r"\n<pre>(.*?)</pre>", page, re.S))) == 10  # texts that differ
    assert "log π(y_t|BOS)" in page and "{" not in page.split("</style>")[1].replace("\\boxed{", "")


@pytest.mark.parametrize("script", ["prerl", "dsrl"])
def test_alignment_in_training_disturbs_nothing(tmp_path, script):
    """With and without --alignment-every: bitwise the same weights and metrics."""
    flags = ["--num-steps", "3", "--eval-every", "0"]
    flags += ["--warmup-steps", "2"] if script == "dsrl" else []
    run(script, tmp_path / "without", *flags)
    run(script, tmp_path / "with", *flags, "--alignment-every", "1")
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))
    cosines = [row["alignment/cosine_to_grpo"] for row in metrics(tmp_path / "with")]
    assert len(cosines) == 3 and all(-1 < value <= 1.000001 for value in cosines)
    if script == "prerl":
        assert min(cosines) > 0.5
    else:
        assert max(cosines[:2]) < 0.9
    if script == "dsrl":  # from here on the update is GRPO's
        assert cosines[2] == pytest.approx(1, abs=1e-6)
