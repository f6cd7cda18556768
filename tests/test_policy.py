"""The trainer's policy: log-probs, gradients, contexts, ranks, checkpoints. Real FSDP2 on CPU."""

import math
import os
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import harness
import inputs
import workarounds

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_rank")


def make_args(model, **changes):
    args = dict(
        model=model,
        dtype="float32",
        temperature=1.0,
        gradient_checkpointing=False,
        cpu_offload=False,
        tensor_parallel_size=1,
        max_tokens_per_microbatch=4096,
        learning_rate=1e-2,
        weight_decay=0.0,
    )
    return types.SimpleNamespace(**{**args, **changes})


def load(model, **changes):
    args = make_args(model, **changes)
    path, config, tokenizer = inputs.load_model_files(args)
    return common.load_policy(path, config, len(tokenizer), args, CPU), args


def ragged(count=7, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 50, rng.integers(1, 9)).tolist() for _ in range(count)]
    responses = [rng.integers(3, 50, rng.integers(1, longest)) for _ in range(count)]
    return prompts, [y.astype(np.int32) for y in responses]


def plain_logprobs(model, contexts, responses, vocabulary, temperature=1.0):
    """log π one sequence at a time from full logits: no padding, no chunks, no FSDP."""
    logps = []
    for x, y in zip(contexts, responses):
        ids = torch.tensor([[*x, *y.tolist()]])
        logits = model(ids).logits[0, len(x) - 1 : -1, :vocabulary] / temperature  # [T, V]
        table = logits.log_softmax(-1)
        logps.append(table.gather(1, ids[0, len(x) :, None])[:, 0])
    return torch.cat(logps)


def gradients(policy, contexts, responses, weights, batches, prefix=()):
    """Gradient of Σ_i weights_i Σ_t log π(y_it | context) over the given micro-batches."""
    for parameter in policy.parameters():
        parameter.grad = None
    for batch in batches:
        tokens, is_response = common.collate(contexts, responses, batch, CPU)
        logp = policy(tokens, is_response, prefix)
        n = torch.tensor([len(responses[i]) for i in batch], dtype=torch.int64)
        (weights[batch].repeat_interleave(n) * logp).sum().backward()
    return {name: p.grad.full_tensor().clone() for name, p in policy.named_parameters()}


def close(a, b, tolerance=1e-5):
    """Equal up to `tolerance` of the largest gradient: some are zero but for rounding."""
    largest = max(g.abs().max() for g in b.values())
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < tolerance * largest for k in a)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (7, 0.7), (2048, 1.0)])
def test_logprobs_and_gradients_equal_full_logits(request, tied, chunk, temperature):
    folder = request.getfixturevalue("tied_model_dir" if tied else "tiny_model_dir")
    policy, _ = load(folder, temperature=temperature)
    policy.chunk = chunk
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    assert vocabulary < plain.config.vocab_size
    prompts, responses = ragged()
    tokens, is_response = common.collate(prompts, responses, range(7), CPU)
    logp = policy(tokens, is_response)
    expected = plain_logprobs(plain, prompts, responses, vocabulary, temperature)
    assert torch.allclose(logp, expected, atol=1e-5)

    weights = torch.randn(7, generator=torch.Generator().manual_seed(0))
    n = torch.tensor([len(y) for y in responses])
    (weights.repeat_interleave(n) * expected).sum().backward()
    reference = {f"lm.{name}": p.grad for name, p in plain.named_parameters()}
    assert close(gradients(policy, prompts, responses, weights, [range(7)]), reference)


def test_microbatches_padding_and_checkpointing_change_nothing(tiny_model_dir):
    policy, _ = load(tiny_model_dir)
    prompts, responses = ragged()
    weights = torch.randn(7, generator=torch.Generator().manual_seed(0))
    whole = gradients(policy, prompts, responses, weights, [range(7)])
    lengths = [len(x) + len(y) for x, y in zip(prompts, responses)]
    (plan,) = common.plan_microbatches(range(7), lengths, 30, 1)
    assert len(plan) > 2
    assert close(gradients(policy, prompts, responses, weights, plan), whole)
    assert close(gradients(policy, prompts, responses, weights, [[i] for i in range(7)]), whole)
    with_empty = gradients(policy, prompts, responses, weights, [[*range(7)], []])
    assert close(with_empty, whole)
    checkpointed, _ = load(tiny_model_dir, gradient_checkpointing=True)
    assert close(gradients(checkpointed, prompts, responses, weights, plan), whole)


@pytest.mark.parametrize("left", [0, 1])
def test_prefix_computed_once_changes_nothing(tiny_model_dir, left):
    """Log-probs and gradients, also where the prefix is all of a context."""
    policy, args = load(tiny_model_dir)
    prompts, responses = ragged()
    shots = list(range(3, 35))
    prompts = [shots + x[: i * left] for i, x in enumerate(prompts)]
    prefix, rest = common.split_prefix(prompts, responses, args)
    assert prefix == shots and [prefix + x for x in rest] == prompts
    whole = policy(*common.collate(prompts, responses, range(7), CPU))
    parts = policy(*common.collate(rest, responses, range(7), CPU), prefix)
    assert torch.allclose(parts, whole, atol=1e-5)
    weights = torch.randn(7, generator=torch.Generator().manual_seed(0))
    batches = [[0, 1, 2], [3, 4, 5, 6], []]
    expected = gradients(policy, prompts, responses, weights, batches)
    assert close(gradients(policy, rest, responses, weights, batches, prefix), expected)

    # Not where it is little of the work, or where there is no cache.
    assert common.split_prefix([[1]] * 7, responses, args) == ([], [[1]] * 7)
    args.gradient_checkpointing = True
    assert common.split_prefix(prompts, responses, args) == ([], prompts)


@pytest.mark.parametrize(("longest", "attention"), [(1024, "plain"), (1025, "sdpa")])
def test_bfloat16_on_a_cpu(tiny_model_dir, longest, attention):
    """Either attention is float32's up to rounding, with a prefix and without one."""
    exact, _ = load(tiny_model_dir)
    rounded, _ = load(tiny_model_dir, dtype="bfloat16", context=longest)
    assert rounded.lm.config._attn_implementation == attention
    prompts, responses = ragged()
    shots = list(range(3, 19))
    weights = torch.randn(7, generator=torch.Generator().manual_seed(0))
    for prefix in ([], shots):
        batch = common.collate(prompts, responses, range(7), CPU)
        assert (rounded(*batch, prefix) - exact(*batch, prefix)).abs().mean() < 0.05
        a, b = (
            torch.cat([g.flatten() for g in gradients(*each).values()])
            for each in (
                (policy, prompts, responses, weights, [range(7)], prefix)
                for policy in (rounded, exact)
            )
        )
        assert (a - b).norm() < 0.06 * b.norm()


@pytest.mark.parametrize("past", [0, 5])
def test_plain_attention(past):
    """Values and gradients of PyTorch's own, with grouped queries and keys of a prefix."""
    torch.manual_seed(0)
    shapes = [(2, 6, 4, 8), (2, 3, past + 4, 8), (2, 3, past + 4, 8)]
    own = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    other = [x.detach().clone().requires_grad_() for x in own]
    allowed = torch.ones(4, past + 4, dtype=torch.bool).tril(past)
    mask = torch.zeros(1, 1, 4, past + 4, dtype=torch.float64).masked_fill(~allowed, -1e30)
    a, _ = workarounds.plain_attention(None, *own, mask, 0.3)
    b = torch.nn.functional.scaled_dot_product_attention(
        *other, attn_mask=allowed, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(a, b)
    weights = torch.randn(a.shape, dtype=torch.float64)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert all(torch.allclose(x.grad, y.grad) for x, y in zip(own, other))


def test_pretrain_space_does_not_see_x(tiny_model_dir):
    """NSR-PreRL's gradient is bitwise the same for any prompts; GRPO's is not."""
    policy, _ = load(tiny_model_dir)
    prompts, responses = ragged()
    others, _ = ragged(seed=5)
    weights = -torch.ones(7)
    batches = [[0, 1, 2], [3, 4, 5, 6]]
    bos = [[1]] * 7
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    logp = policy(*common.collate(bos, responses, range(7), CPU))
    assert torch.allclose(logp, plain_logprobs(plain, bos, responses, 54), atol=1e-5)
    for contexts, same in [((bos, bos), True), ((prompts, others), False)]:
        a, b = (gradients(policy, c, responses, weights, batches) for c in contexts)
        assert all(torch.equal(a[k], b[k]) for k in a) == same
    # With an empty x, which is BOS alone, P(y|x) is P(y).
    a = gradients(policy, [[1]] * 7, responses, weights, batches)
    b = gradients(policy, bos, responses, weights, batches)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_canary_sees_other_weights(tiny_model_dir):
    policy, args = load(tiny_model_dir)
    prompts, responses = ragged()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        right = plain_logprobs(plain, prompts, responses, 54)
        plain.model.layers[1].mlp.down_proj.weight *= 1.5
        wrong = plain_logprobs(plain, prompts, responses, 54)
    for logprobs, limit in [(right, True), (wrong, False)]:
        parts = logprobs.split([len(y) for y in responses])
        samples = [dict(ids=y, logprobs=p.numpy()) for y, p in zip(responses, parts)]
        gap = common.canary(policy, prompts, samples, args, CPU)["sync/logprob_gap"]
        assert (gap < 1e-5) == limit
        check = types.SimpleNamespace(dtype="float32")
        if limit:
            common.check_canary(gap, check)
        else:
            with pytest.raises(RuntimeError, match="samples from another policy"):
                common.check_canary(gap, check)
    with pytest.raises(RuntimeError):
        common.check_canary(float("nan"), check)


def on_ranks(world_size: int, *words) -> torch.Tensor:
    """What tests/two_ranks.py saves."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("RANK", None)
    command = [*warm.python(), "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", "tests/two_ranks.py", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(words[1])


@pytest.mark.parametrize("count", [9, 1])
def test_two_ranks_equal_one(tiny_model_dir, tmp_path, count):
    one, two = (on_ranks(n, tiny_model_dir, tmp_path / f"{n}.pt", count) for n in (1, 2))
    assert close(one, two)
    assert max(g.abs().max() for g in one.values()) > 1e-2


def test_ranks_with_unequal_work(tiny_model_dir, tmp_path):
    """Canary and alignment end on two ranks, whichever has the short, long, few or no samples.

    Where both score the same samples, they give what one rank gives.
    """
    one, two = (on_ranks(n, tiny_model_dir, tmp_path / f"{n}.pt", "skew") for n in (1, 2))
    assert all(gap > 1 for gap, _ in one + two)
    cosines = [cosine for _, cosine in one]
    assert [cosine for _, cosine in two] == pytest.approx(cosines, abs=1e-5, nan_ok=True)
    assert sum(0 < abs(cosine) < 1 for cosine in cosines) == 10  # a single sample has none
    for i in (6, 8, 10, 12):  # lengths [5], [40], [2, 90] and [1, 1, 200]
        assert two[i][0] == pytest.approx(one[i][0])


@pytest.mark.slow
def test_rank_0_may_take_its_time(tiny_model_dir, tmp_path):
    """A download and a read of 15 seconds, where collectives give up after 10."""
    on_ranks(2, tiny_model_dir, tmp_path / "out.pt", "slow")


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_and_export(request, tmp_path, tied):
    folder = request.getfixturevalue("tied_model_dir" if tied else "tiny_model_dir")
    prompts, responses = ragged()

    def train(policy, optimizer, seed):
        weights = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        gradients(policy, prompts, responses, weights, [range(7)])
        optimizer.step()
        optimizer.zero_grad()

    policy, args = load(folder)
    optimizer = common.make_optimizer(policy, args)
    train(policy, optimizer, 1)
    (tmp_path / "args.json").write_text("{}")
    harness.save_checkpoint(tmp_path, 1, policy, optimizer, args)
    train(policy, optimizer, 2)

    again, args = load(folder)
    optimizer = common.make_optimizer(again, args)
    path = harness.find_checkpoint(tmp_path, types.SimpleNamespace(resume="auto", num_steps=9))
    assert harness.load_checkpoint(tmp_path, again, optimizer, path) == 1
    train(again, optimizer, 2)
    for a, b in zip(policy.parameters(), again.parameters()):
        assert torch.equal(a.full_tensor(), b.full_tensor())

    path, config, tokenizer = inputs.load_model_files(args)
    harness.save_model(tmp_path, policy, config, tokenizer, path, torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert exported.config.tie_word_embeddings == tied
    exported = dict(exported.named_parameters())
    for name, parameter in policy.lm.named_parameters():
        assert torch.equal(parameter.full_tensor(), exported[name])


def test_flags_of_this_run_after_resuming(tiny_model_dir, tmp_path):
    """Learning rate and weight decay are the command line's, not those that were saved."""
    policy, args = load(tiny_model_dir)
    optimizer = common.make_optimizer(policy, args)
    (tmp_path / "args.json").write_text("{}")
    harness.save_checkpoint(tmp_path, 7, policy, optimizer, args)
    args.learning_rate, args.weight_decay = 3e-2, 0.5
    optimizer = common.make_optimizer(policy, args)
    path = tmp_path / "checkpoints" / "step_000007"
    assert harness.load_checkpoint(tmp_path, policy, optimizer, path) == 7
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-2, 0.5, (0.9, 0.999))


def test_optimizer_step_by_hand(tiny_model_dir):
    """AdamW's equations in float64, gradients below and above norm 1; none with a NaN."""
    policy, args = load(tiny_model_dir, weight_decay=0.1)
    optimizer = common.make_optimizer(policy, args)
    parameters = list(policy.parameters())
    weights = [p.detach().full_tensor().double() for p in parameters]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step, size in enumerate((1e-4, 1.0, 1e-2), 1):
        g = [size * torch.randn(w.shape, generator=generator) for w in weights]
        for p, each in zip(parameters, g):
            p.grad = DTensor.from_local(each.clone(), p.device_mesh, p.placements)
        g = [each.double() for each in g]
        norm = sum((each**2).sum() for each in g).sqrt().item()
        assert (norm < 1) == (step == 1)
        assert common.optimizer_step(policy, optimizer) == pytest.approx(norm, rel=1e-4)
        assert all(p.grad is None for p in parameters)
        for i, each in enumerate(g):
            each = each * min(1, 1 / norm)
            m[i] = 0.9 * m[i] + 0.1 * each
            v[i] = 0.999 * v[i] + 0.001 * each**2
            mean, square = m[i] / (1 - 0.9**step), v[i] / (1 - 0.999**step)
            weights[i] = weights[i] * (1 - 1e-2 * 0.1) - 1e-2 * mean / (square.sqrt() + 1e-8)
            own = parameters[i].detach().full_tensor().double()
            assert torch.allclose(own, weights[i], rtol=1e-5, atol=1e-5)
    for bad in (float("nan"), float("inf")):
        before = [p.detach().full_tensor().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.full_like(p, bad)
        assert not math.isfinite(common.optimizer_step(policy, optimizer))
        assert all(torch.equal(p.full_tensor(), b) for p, b in zip(parameters, before))
        assert all(p.grad is None for p in parameters)


def test_skipped_updates_in_a_row(tmp_path):
    """The third in a row ends the run; a finite gradient between them begins anew."""
    said, nan = [], float("nan")
    rest = ([{"ids": [1]}], torch.ones(1), said.append)
    assert common.count_skipped(0, nan, tmp_path, 1, *rest) == 1
    assert common.count_skipped(1, 2.5, tmp_path, 2, *rest) == 0
    assert common.count_skipped(1, float("inf"), tmp_path, 4, *rest) == 2
    with pytest.raises(RuntimeError, match="not finite 3 times in a row, last at step 5"):
        common.count_skipped(2, nan, tmp_path, 5, *rest)
    kept = sorted(path.name for path in (tmp_path / "skipped").iterdir())
    assert kept == [f"step_{step:06d}.pt" for step in (1, 4, 5)] and len(said) == 3


def test_rewards_are_of_the_samples_own_problem():
    """By index, in whatever order they come; a truncated response scores 0 with a correct box."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "lab" / "base")
    samples = [
        {"index": i, "ids": tokenizer.encode(rf"\boxed{{{box}}}"), "truncated": cut}
        for i, box, cut in ((3, "13", False), (0, "10", False), (2, "12", True), (1, "13", False))
    ]
    args = types.SimpleNamespace(grader="math-verify")
    counts = common.verify(samples, ["10", "11", "12", "13"], tokenizer, None, args)
    assert [s["reward"] for s in samples] == [1.0, 1.0, 0.0, 0.0]
    assert counts == {"verify/timeouts": 0, "verify/errors": 0}
    assert [s["text"] for s in samples[:2]] == [r"\boxed{13}", r"\boxed{10}"]


def test_counts_are_of_all_ranks(monkeypatch):
    """Time-outs and errors of verifying, where every rank has as many."""
    monkeypatch.setattr(common.grading, "verify", lambda *words: ([1.0], 2, 3))
    monkeypatch.setattr(common.dist, "all_reduce", lambda counts: counts.mul_(4))
    tokenizer = types.SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["1"])
    samples = [{"index": 0, "ids": [5], "truncated": False}]
    counts = common.verify(samples, ["1"], tokenizer, None, None)
    assert counts == {"verify/timeouts": 8, "verify/errors": 12}
