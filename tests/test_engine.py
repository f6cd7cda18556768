"""The engine against the trainer: weight sync, tensor and data parallel, the padded vocabulary."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from conftest import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]

FRESH_ENGINE = """
import os, sys, torch
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
folder, out = sys.argv[1:]
result = torch.load(out + "/result.pt", weights_only=False)
engine = LLM(folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 28,
             max_model_len=200, hf_overrides={"vocab_size": 96})
rows = [{"prompt_token_ids": list(map(int, x)) + list(map(int, y))}
        for x, y in zip(result["prompts"], result["ids"])]
outputs = engine.generate(rows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
logprobs = []
for x, row, output in zip(result["prompts"], rows, outputs):
    ids = row["prompt_token_ids"]
    logprobs.append([output.prompt_logprobs[t][ids[t]].logprob for t in range(len(x), len(ids))])
torch.save(logprobs, out + "/fresh.pt")
"""


def padded_model(tiny_model_dir: Path, folder: Path) -> Path:
    """The tiny model with enormous logits for the ids that its tokenizer does not have."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert len(tokenizer) < model.config.vocab_size
    with torch.no_grad():
        direction = torch.sign(model.lm_head.weight[len(tokenizer) :])
        model.lm_head.weight[len(tokenizer) :] = 100 * direction
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("world_size", "tp", "kv_heads", "tied"), [(1, 1, 2, True), (2, 2, 1, False), (4, 2, 2, False)]
)
def test_sync_and_parallelism(tmp_path, world_size, tp, kv_heads, tied):
    """Also one key-value head for two ranks, which both of them hold."""
    tiny = save_tiny_model(tmp_path / "tiny", kv_heads=kv_heads, tied=tied)
    model = padded_model(tiny, tmp_path / "padded")
    out = tmp_path / "out"
    out.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*warm.python(), "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", "tests/engine_check.py"]
    command += [str(model), str(out), str(tp)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = torch.load(out / "result.pt", weights_only=False)
    # The trainer agrees with the engine after each sync, and sees it when one is missing.
    assert result["gaps"]["before"] < 1e-5 and result["gaps"]["after"] < 1e-5
    assert result["gaps"]["stale"] > 1e-2
    # The exact check names what differs, whatever is packed, sharded, copied or padded.
    for fault, groups in {
        "one element": "layers.1",
        "not sent": "layers.1",
        "a bias not sent": "layers.0",
        "another layer": "layers.0, layers.1",
        "not synced": "norm",
    }.items():
        assert f"weights are not the policy's ({groups})" in result["seen"][fault]
    assert result["seen"][""] == ""
    assert result["max_id"] < len(AutoTokenizer.from_pretrained(model))
    # A stop token that is not EOS ends a response and is its last token, with its log-prob.
    ends = {2, result["stop"]}
    for y, whole, logprobs, truncated in zip(
        result["ids"], result["whole"], result["logprobs"], result["truncated"], strict=True
    ):
        assert y.tolist() == whole[: len(y)].tolist() and len(logprobs) == len(y)
        assert not ends & set(y[:-1].tolist())
        assert truncated == (y[-1] not in ends) and (len(y) == 32 or not truncated)
    assert any(y[-1] == result["stop"] for y in result["ids"])
    if world_size == 1:
        check_requests(result["asked"], result["prompts"][::4])
    # Identical within a tensor-parallel group, different across groups.
    groups = result["groups"]
    assert all(groups[r] == groups[r // tp * tp] for r in range(world_size))
    assert len({str(group) for group in groups}) == world_size // tp

    if world_size > 2:
        return
    # A fresh engine on the exported checkpoint gives the log-probs the synced one had, once those
    # are taken over the tokenizer's ids and at the temperature of sampling: so does transformers.
    trained = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    vocabulary = len(AutoTokenizer.from_pretrained(out / "model"))
    fresh = fresh_logprobs(out, env)
    for x, y, engine, new in zip(result["prompts"], result["ids"], result["logprobs"], fresh):
        ids = torch.tensor([list(x) + list(map(int, y))])
        with torch.no_grad():
            logits = trained(ids).logits[0, len(x) - 1 : -1]  # [T, V]
        picked = ids[0, len(x) :, None]
        cut = (logits[:, :vocabulary] / 0.8).log_softmax(-1).gather(1, picked)[:, 0]
        assert torch.allclose(cut, torch.from_numpy(engine), atol=1e-4)
        whole = logits.log_softmax(-1).gather(1, picked)[:, 0]
        assert torch.allclose(whole, torch.tensor(new), atol=1e-4)


def check_requests(asked: list[tuple], prompts: list[list[int]]) -> None:
    """Of three rollouts: in order and reversed with step 1's seed, then with step 2's."""
    xs, seeds = [row[0] for row in asked], [row[-1] for row in asked]
    assert xs == prompts + prompts[::-1] + prompts
    assert all(row[1:3] == (2, 0.8) and row[4:6] == (32, [2, 6]) for row in asked)
    assert [row[3] for row in asked] == [1.0] * 6 + [0.9] * 12
    # A seed is the problem's and the step's, in whatever order they come
    assert seeds[:6] == seeds[11:5:-1] and len(set(seeds)) == 12


def fresh_logprobs(out: Path, env: dict) -> list[list[float]]:
    command = [*warm.python(), "-c", FRESH_ENGINE, str(out / "model"), str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "fresh.pt", weights_only=False)
