"""The four scripts' loop in float64 with a plain engine (plain_loop.py): seconds, not minutes.

The oracle is one_step.py, on the samples that a run saves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_loop import PlainEngine, plain_vllm, train

# These tests read nothing but a run's folder: the runs here are another engine's.
from test_scripts import (  # noqa: F401
    SCRIPTS,
    completions,
    learned,
    metrics,
    same,
    test_dsrl_begins_as_nsr_prerl,
    test_rewards_are_true,
    weights,
)
from transformers import AutoModelForCausalLM

import common
import inputs
import one_step

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "lab" / "base")
METHODS = {"grpo_baseline": one_step.grpo, "prerl": one_step.prerl, "nsr_prerl": one_step.nsr_prerl}
pytestmark = pytest.mark.usefixtures("one_rank")


class Runs(dict):
    """Script -> folder of a run of 3 steps, made when a test asks for it."""

    def __init__(self, place: Path):
        self.place, self.engines = place, {}

    def __missing__(self, script: str) -> Path:
        self[script] = self.place / script / "run"
        self[script].parent.mkdir()
        self.engines[script] = train(script, self[script])
        return self[script]


@pytest.fixture(scope="module")
def runs(one_rank, tmp_path_factory):
    folders = Runs(tmp_path_factory.mktemp("loop"))
    return folders, folders.engines


class Oracle:
    """The base model in float64 with an AdamW of its own."""

    def __init__(self, weight_decay: float):
        self.model = AutoModelForCausalLM.from_pretrained(BASE).double()
        self.before = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=weight_decay
        )

    def gradient(self, A, in_loss, contexts, ys) -> torch.Tensor:
        self.optimizer.zero_grad()
        one_step.backward(self.model, A, in_loss, contexts, ys)
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def assert_reached(self, folder: Path) -> None:
        """The run's model is this one."""
        trained = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        own = torch.cat([p.detach().flatten() for p in trained.parameters()])
        here = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        assert (own - here).norm() < 1e-3 * (here - self.before).norm()


def read_step(folder: Path, step: int):
    """Samples of a step: prompts, responses, and rewards [8, 4]."""
    samples = completions(folder, step)
    r = torch.tensor([s["reward"] for s in samples], dtype=torch.float64).view(8, 4)
    return samples, [s["prompt_ids"] for s in samples], [s["response_ids"] for s in samples], r


@pytest.mark.parametrize("script", SCRIPTS)
def test_three_steps(runs, script):
    """Advantages, loss, gradient, cosine with GRPO's, counts and weights, DSRL's switch."""
    folder, oracle = runs[0][script], Oracle(weight_decay=0.1)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        samples, xs, ys, r = read_step(folder, row["step"])
        if script == "dsrl":
            A, in_loss, contexts = one_step.dsrl(r, xs, 1, row["step"], 2)
        else:
            A, in_loss, contexts = METHODS[script](r, xs, 1)
        assert A.flatten().tolist() == pytest.approx([s["advantage"] for s in samples], abs=1e-6)
        assert in_loss.flatten().tolist() == [s["in_loss"] for s in samples]
        assert row["policy/counted_samples"] == in_loss.sum()
        counted = [y for y, kept in zip(ys, in_loss.flatten()) if kept]
        assert row["policy/counted_tokens"] == sum(len(y) for y in counted)
        grpo = oracle.gradient(*one_step.grpo(r, xs, 1), ys)
        logps = [
            one_step.log_probs(oracle.model, context, y).detach()
            for a, kept, context, y in zip(A.flatten(), in_loss.flatten(), contexts, ys)
            if kept and a
        ]
        assert row["policy/logprob"] == pytest.approx(torch.cat(logps).mean().item(), rel=1e-5)
        loss, gradient = one_step.step(oracle.model, oracle.optimizer, A, in_loss, contexts, ys)
        assert row["policy/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
        cosine = torch.cosine_similarity(gradient, grpo, dim=0).item()
        assert row["alignment/cosine_to_grpo"] == pytest.approx(cosine, abs=1e-5)
        # On-policy the ratio is 1: the loss is minus the mean of A over tokens
        means = sum(a * len(y) for a, y in zip(A[in_loss].tolist(), counted)) / sum(
            map(len, counted)
        )
        assert row["policy/loss"] == pytest.approx(-means, abs=1e-6)
        assert row["policy/clip_fraction"] == 0 and row["sync/logprob_gap"] < 1e-5
    oracle.assert_reached(folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_frame(runs, script):
    """Problems by seed and step, a seed for each step and problem, when it evaluates and saves."""
    folder = runs[0][script]
    engine, rows = runs[1][script], metrics(folder)
    train_set = inputs.load_problems(str(folder.parent / "train.jsonl"), "train")
    for i, problem in enumerate(train_set):
        problem["id"] = i
    prompts = [p for p, s in engine.asked if s.n == 4]
    seeds = [s.seed for _, s in engine.asked if s.n == 4]
    assert len(train_set) == 12 and len(seeds) == len(set(seeds)) == 24
    assert len({str(p) for p in prompts}) <= 12 < len(prompts)
    for step in (1, 2, 3):
        wanted = inputs.pick_problems(train_set, step, 8, 2)
        wanted = [p["problem"] for p in wanted for _ in range(4)]
        assert [s["prompt"] for s in completions(folder, step)] == wanted
    # Evaluations: the same seeds at steps 0, 2 and 3
    evals = [s.seed for _, s in engine.asked if s.n == 2]
    assert len(set(evals)) == 3 and evals == 3 * evals[:5] and not set(evals) & set(seeds)
    assert [row["step"] for row in rows if "eval/first/avg@2" in row] == [0, 2, 3]
    phases = {"grpo_baseline": ["rl"] * 3, "dsrl": ["pretrain", "pretrain", "rl"]}
    assert [row["phase"] for row in rows[1:]] == phases.get(script, ["pretrain"] * 3)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]


def test_minibatches_clip_and_importance_weights(tmp_path):
    """Two updates on one batch, negatives at half weight, an engine whose log-probs are off."""
    flags = dict(num_steps=1, num_minibatches=2, negative_weight=0.5, eval_every=0)
    flags |= dict(clip_low=0.02, clip_high=0.03, tis_cap=1.02, weight_decay=10.0)
    train("grpo_baseline", tmp_path / "run", drift=0.1, **flags, alignment_every=0)
    samples, xs, ys, r = read_step(tmp_path / "run", 1)
    A = one_step.grpo(r, xs, 1)[0].flatten()
    A = torch.where(A > 0, A, 0.5 * A).tolist()
    oracle = Oracle(weight_decay=10.0)
    model, optimizer = oracle.model, oracle.optimizer
    with torch.no_grad():
        old = [one_step.log_probs(model, x, y) for x, y in zip(xs, ys)]
    order = torch.randperm(len(A), generator=torch.Generator().manual_seed(1))
    outside, tokens = 0, 0
    for minibatch in order.chunk(2):
        count = sum(len(ys[i]) for i in minibatch.tolist())
        optimizer.zero_grad()
        for i in minibatch.tolist():
            ratio = (one_step.log_probs(model, xs[i], ys[i]) - old[i]).exp()
            outside += ((ratio < 0.98) | (ratio > 1.03)).sum().item() if A[i] else 0
            tokens += len(ys[i]) if A[i] else 0
            objective = torch.minimum(ratio * A[i], ratio.clamp(0.98, 1.03) * A[i])
            tis = (old[i] - torch.tensor(samples[i]["logprobs"])).exp()
            assert tis.max() > 1.05 > 0.95 > tis.min()
            (-(objective * tis.clamp(max=1.02)).sum() / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
    (row,) = metrics(tmp_path / "run")
    assert row["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert row["policy/clip_fraction"] == pytest.approx(outside / tokens) and outside
    oracle.assert_reached(tmp_path / "run")


def test_a_sign_that_is_left_out(tmp_path):
    """--negative-weight 0: the mean is over the samples with A > 0."""
    train("prerl", tmp_path / "run", num_steps=1, eval_every=0, negative_weight=0.0)
    samples, xs, ys, r = read_step(tmp_path / "run", 1)
    A, _, contexts = one_step.prerl(r, xs, 1)
    assert [s["in_loss"] for s in samples] == (A.flatten() > 0).tolist()
    gradient = Oracle(0.0).gradient(A, A > 0, contexts, ys)
    (row,) = metrics(tmp_path / "run")
    assert row["policy/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_resumed(runs, tmp_path):
    """Stopped after step 2 and gone on with: lines, weights and the engine's seeds are the same."""
    flags = dict(save_every=1, eval_every=3)
    train("dsrl", tmp_path / "run", num_steps=2, **flags)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # as a kill before the checkpoint
        file.write('{"step": 3}\n{"step": ')
    engine = train("dsrl", tmp_path / "run", resume="auto", **flags)
    whole = [learned(row) for row in metrics(runs[0]["dsrl"])]
    resumed = [learned(row) for row in metrics(tmp_path / "run")]
    assert [row["step"] for row in resumed] == [0, 1, 2, 3]
    for a, b in zip(whole, resumed):
        assert all(a[key] == b[key] for key in a.keys() & b.keys())
    assert same(weights(tmp_path / "run"), weights(runs[0]["dsrl"]))
    assert len([s for _, s in engine.asked if s.n == 4]) == 8  # of one step
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_000002", "step_000003"]


def test_two_ranks(runs, tmp_path):
    """Every figure of every step is one rank's; micro-batches of one sample, some are fillers."""
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 tests/plain_loop.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    env.pop("RANK", None)
    flags = json.dumps({"max_tokens_per_microbatch": 1})
    done = subprocess.run(
        [sys.executable, *command.split(), "nsr_prerl", str(tmp_path / "run"), flags],
        cwd=ROOT, env=env, text=True, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = metrics(runs[0]["nsr_prerl"]), metrics(tmp_path / "run")
    for a, b in zip(one, two, strict=True):
        a, b = ({k: v for k, v in learned(row).items() if k != "phase"} for row in (a, b))
        gap = "sync/logprob_gap"  # of other samples
        assert a.pop(gap, 0) < 1e-5 and b.pop(gap, 0) < 1e-5
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    for step in (1, 2, 3):
        ours, theirs = (
            [(s["response_ids"], s["reward"]) for s in completions(folder, step)]
            for folder in (runs[0]["nsr_prerl"], tmp_path / "run")
        )
        assert ours == theirs


class Recorder:
    """An engine that notes what it is asked, and gives the same two responses to every prompt."""

    def __init__(self):
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=False))
        self.asked = []

    def generate(self, prompts, params, use_tqdm):
        self.asked += zip(prompts, params)
        y = [
            SimpleNamespace(
                token_ids=ids,
                logprobs=SimpleNamespace(logprobs=[-0.5 * len(ids)] * len(ids)),
                finish_reason=reason,
            )
            for ids, reason in (([7, 8, 2], "stop"), ([9, 9], "length"))
        ]
        return [SimpleNamespace(outputs=y) for _ in prompts]


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", plain_vllm())
    return Recorder()


def test_rollout(recorder):
    """What the engine is asked for, and what becomes of its answers."""
    args = SimpleNamespace(tensor_parallel_size=1, temperature=0.7, max_completion_length=5)
    problems = [{"id": 10 + i, "prompt_ids": [i, 3, 4]} for i in range(3)]
    samples = common.rollout(recorder, problems, 2, "5 1", [2, 6], args)
    args.top_p = 0.9
    common.rollout(recorder, problems[::-1], 2, "5 1", [2, 6], args)
    common.rollout(recorder, problems, 2, "5 2", [2, 6], args)
    asked = [(p["prompt_token_ids"], s) for p, s in recorder.asked]
    assert [x for x, _ in asked[:6]] == [p["prompt_ids"] for p in problems + problems[::-1]]
    for _, s in asked:
        assert (s.n, s.temperature, s.max_tokens, s.stop_token_ids) == (2, 0.7, 5, [2, 6])
    assert [s.top_p for _, s in asked] == [1.0] * 3 + [0.9] * 6
    seeds = [s.seed for _, s in asked]  # by the problem and the step, in whatever order
    assert seeds[:3] == seeds[5:2:-1] and len(set(seeds)) == 6
    assert [s["index"] for s in samples] == list(range(6))
    assert [s["ids"].tolist() for s in samples] == 3 * [[7, 8, 2], [9, 9]]
    assert [s["logprobs"].tolist() for s in samples] == 3 * [[-1.5] * 3, [-1.0] * 2]
    assert [s["truncated"] for s in samples] == 3 * [False, True]


def test_evaluation_of_two_sets(recorder, monkeypatch):
    """Each set's figures are of its own samples and answers; the seeds are those of --seed."""
    verify = lambda pool, texts, wanted, args: ([float(w == "1") for w in wanted], 0, 0)  # noqa: E731
    monkeypatch.setattr(common.grading, "verify", verify)
    tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["" for _ in ids])
    args = SimpleNamespace(tensor_parallel_size=1, temperature=1.0, max_completion_length=5)
    args.seed, args.eval_num_samples, args.top_p = 1, 2, 1.0
    sets = {
        name: [{"id": i, "prompt_ids": [3], "answer": a} for i, a in enumerate(answers)]
        for name, answers in {"x/a.jsonl": "1000", "b": "011"}.items()
    }
    first, again = (common.evaluate(recorder, sets, [2], tokenizer, None, args) for _ in range(2))
    args.seed = 2
    common.evaluate(recorder, sets, [2], tokenizer, None, args)
    # Of two samples the second is truncated and scores 0
    assert first["eval/a/avg@2"] == 0.125 and first["eval/a/pass@2"] == 0.25
    assert first["eval/b/avg@2"] == pytest.approx(1 / 3) and first == again
    assert first["eval/b/pass@2"] == pytest.approx(2 / 3)
    assert first["eval/a/length"] == 2.5 and first["eval/a/truncated"] == 0.5
    seeds = [s.seed for _, s in recorder.asked]
    assert seeds[:7] == seeds[7:14] and not set(seeds[:7]) & set(seeds[14:])


@pytest.mark.parametrize("tied", [False, True])
def test_sync_and_its_check(request, tied):
    """All weights arrive, cut to the vocabulary; one other element, or none sent, is seen."""
    folder = request.getfixturevalue("tied_model_dir" if tied else "tiny_model_dir")
    args = SimpleNamespace(
        dtype="float32", temperature=1.0, gradient_checkpointing=False, cpu_offload=False
    )
    args.model, args.tensor_parallel_size = folder, 1
    path, config, tokenizer = inputs.load_model_files(args)
    policy = common.load_policy(path, config, len(tokenizer), args, torch.device("cpu"))
    engine = PlainEngine(path, len(tokenizer), args)
    with pytest.raises(RuntimeError, match="weights are not the policy's"):
        common.check_sync(engine, policy)
    common.sync_weights(engine, policy)
    common.check_sync(engine, policy)
    assert not engine.cache_is_stale
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    vocabulary = len(tokenizer)
    assert torch.allclose(engine.lm(ids).logits, plain(ids).logits[..., :vocabulary], atol=1e-5)
    for name, group in (
        ("model.layers.1.mlp.up_proj.weight", "layers.1"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "norm"),
    ):
        weight = engine.lm.get_parameter(name).data
        right = weight.clone()
        weight.flatten()[5] = torch.nextafter(weight.flatten()[5], torch.tensor(9.0))
        with pytest.raises(RuntimeError, match=rf"not the policy's \({group}\)"):
            common.check_sync(engine, policy)
        weight.copy_(right)
    common.check_sync(engine, policy)
