"""grad_alignment.py against plain autograd over flattened gradients, in float64, and 2 ranks."""

import json
import os
import re
import subprocess
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import warm
from test_scripts import metrics, run, same, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import grad_alignment
from lab import task

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "lab" / "base"
GROUP = 4


def write_modes(path: Path) -> list[dict]:
    """Two ways to begin a response; in the second row they have different lengths."""
    problems = task.problems("test")[:3]
    rows = [{"problem": p["problem"], "careful": f"{task.opening(p['problem'])}Let "}
            | {"careless": f"{task.opening(p['problem'])}So "} for p in problems]  # fmt: skip
    rows[1]["careless"] += "1:"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def measure(folder: Path, *flags: str) -> dict:
    write_modes(modes := folder.with_suffix(".jsonl"))
    command = "grad_alignment.py --preset lab --dtype float64 --num-rollouts 24 --num-generations 4"
    command += " --num-tokens 12 --num-finite-steps 3 --seed 3"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*warm.python(), *command.split(), "--modes", str(modes)]
        + ["--output-dir", str(folder), *flags],
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


def test_modes_equal_finite_differences(measured, tmp_path):
    """Steps of small length along each method's gradient, and along its signs."""
    result, folder = measured
    found, modes = result["modes"], write_modes(tmp_path / "modes.jsonl")
    tokenizer, plain = AutoTokenizer.from_pretrained(BASE), Plain()
    context = {"x": lambda x: tokenizer.encode(x), "bos": lambda x: [result["bos"]]}

    def log_odds(space: str) -> torch.Tensor:
        return sum(
            sign * plain.logps(context[space](row["problem"]), tokenizer.encode(row[name])).sum()
            for row in modes
            for name, sign in (("careful", 1), ("careless", -1))
        ) / len(modes)

    grad_m = {space: plain.gradient(log_odds(space)) for space in context}
    assert found["cosine"] == pytest.approx(cosine(*grad_m.values()), abs=1e-8)
    for space in context:
        assert found[f"log_odds_{space}"] == pytest.approx(log_odds(space).item(), rel=1e-8)
    rows = pyarrow.parquet.read_table(folder / "rollouts.parquet").to_pylist()
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64).view(-1, GROUP)
    mean = rewards - rewards.mean(1, keepdim=True)
    grpo = (mean / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
    A = mean.flatten()
    dealt = A[torch.randperm(24, generator=torch.Generator().manual_seed(3))]
    assert (dealt < 0).sum() == (A < 0).sum() and not torch.equal(dealt, A)
    updates = {
        "GRPO": ("x", grpo),
        "PSR-RL": ("x", A.clamp(min=0)),
        "NSR-RL": ("x", A.clamp(max=0)),
        "NSR-RL, random": ("x", dealt.clamp(max=0)),
        "PreRL": ("bos", A),
        "PSR-PreRL": ("bos", A.clamp(min=0)),
        "NSR-PreRL": ("bos", A.clamp(max=0)),
        "NSR-PreRL, random": ("bos", dealt.clamp(max=0)),
    }
    assert found["updates"].keys() == updates.keys()
    for name, (space, A) in updates.items():
        total = 0.0
        for a, row in zip(A, rows):
            x = row["prompt_ids"] if space == "x" else [result["bos"]]
            total += a * plain.gradient(plain.logps(x, row["response_ids"]).sum())
        ours = found["updates"][name]
        assert ours["norm"] == pytest.approx(total.norm().item(), rel=1e-8)
        for kind, along in (("", total), ("_signs", total.sign())):
            along = along / along.norm()
            # Larger steps would bend, smaller ones drown: the norms of the model are float32
            values = {space: [] for space in context}
            for change in (5e-3, -1e-2, 5e-3):
                plain.add(change * along)
                with torch.no_grad():
                    for space in context:
                        values[space].append(log_odds(space).item())
            for space, (after, before, _) in values.items():
                moved = ours[space + kind]
                assert moved == pytest.approx((grad_m[space] @ along).item(), rel=1e-5, abs=1e-8)
                assert moved == pytest.approx((after - before) / 1e-2, rel=0.02, abs=1e-3), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no rows"),
        ("{", "line 1 is not one JSON object"),
        ("[1]", "line 1 is not one JSON object"),
        ('{"problem": "Q 81#3 A", "short": "8"}', "careful is no text; its columns are problem, s"),
        ('{"problem": "Q 81#3 A", "careful": "8", "careless": ["8"]}', "careless is no text"),
        ('{"problem": "Q 81#3 A", "careful": "", "careless": "8"}', "a text without tokens"),
        (None, "No such file"),
    ],
)
def test_modes_that_cannot_be_read(tmp_path, text, message, capsys):
    path = tmp_path / "modes.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        grad_alignment.read_modes(str(path), AutoTokenizer.from_pretrained(BASE), None)
    said = capsys.readouterr().err
    assert said.startswith(f"error: --modes {path}") and message in said and said.count("\n") == 1


def test_modes_of_a_chat(tmp_path):
    """Also where the problem is a list of messages, as in study/results/smollm_modes.jsonl."""
    chat = [{"role": "user", "content": text} for text in ("Q 8", "1#3 A")]
    row = {"problem": chat, "careful": "81", "careless": "8"}
    (tmp_path / "modes.jsonl").write_text(json.dumps(row))
    args = types.SimpleNamespace(system_prompt="")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    [mode] = grad_alignment.read_modes(str(tmp_path / "modes.jsonl"), tokenizer, args)
    assert mode["prompt_ids"] == tokenizer.encode("Q 8\n\n1#3 A")
    assert mode["careful"].tolist() == tokenizer.encode("81", add_special_tokens=False)


def test_two_ranks_equal_one(measured, tmp_path):
    one, two = measured[0], measure(tmp_path, "--num-processes", "2")
    for key in ("rollouts", "finite_steps", "tokens"):
        assert len(one[key]) == len(two[key])
        for a, b in zip(one[key], two[key]):
            assert a == pytest.approx(b, rel=1e-8, abs=1e-8)
    assert one["cosine_to_grpo"] == pytest.approx(two["cosine_to_grpo"], rel=1e-8)
    for name, moved in one["modes"].pop("updates").items():
        assert moved == pytest.approx(two["modes"]["updates"].pop(name), rel=1e-8, abs=1e-8)
    assert two["modes"].pop("updates") == {}
    assert one["modes"] == pytest.approx(two["modes"], rel=1e-8)


def test_picture_and_page(measured):
    folder = measured[1]
    assert (folder / "alignment.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "tokens.html").read_text()
    assert page.count("<h2>") == 10 and "http" not in page  # self-contained
    assert page.count('<pre class="prompt">Q ') == 10
    assert len(set(re.findall(r"\n<pre>(.*?)</pre>", page, re.S))) == 10  # texts that differ
    assert "log π(y_t|BOS)" in page and "{" not in page.split("</style>")[1].replace("\\boxed{", "")


@pytest.mark.slow
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
