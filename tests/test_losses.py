"""Advantages, weights and losses against an oracle in plain Python floats (float64)."""

import doctest
import itertools
import math
import random
import statistics
import types

import numpy as np
import pytest
import torch

import common
import data
import grad_alignment
import grading
import inputs
import models
import plot
import thoughts
from benchmark import hardware, step_breakdown
from study import experiments, report, smollm

MEAN, GRPO, RLOO, REINFORCE, SIGN = "mean", "grpo", "rloo", "reinforce++", "sign"


MODULES = [common, inputs, data, models, grading, thoughts, plot, grad_alignment]
MODULES += [hardware, step_breakdown, experiments, report, smollm]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def oracle_advantages(rewards: list[float], size: int, kind: str) -> list[float]:
    if kind == SIGN:
        return [1.0 if r == 1.0 else -1.0 for r in rewards]
    if kind == REINFORCE:
        mean, std = statistics.mean(rewards), statistics.stdev(rewards)
        return [(r - mean) / (std + 1e-6) for r in rewards]
    out = []
    for i, r in enumerate(rewards):
        group = rewards[i // size * size : i // size * size + size]
        others = [g for j, g in enumerate(group) if j != i % size]
        mean = statistics.mean(others if kind == RLOO else group)
        out.append((r - mean) / (statistics.stdev(group) + 1e-6 if kind == GRPO else 1))
    return out


def oracle_loss(logps, old_logps, A, counted, kind, max_length, low, high, dual):
    """The step's loss, response by response and token by token; logps: float64 leaves."""
    sequences = [i for i, c in enumerate(counted) if c]
    tokens = sum(len(logps[i]) for i in sequences)
    loss = 0.0
    for i in sequences:
        for t, logp in enumerate(logps[i]):
            ratio = torch.exp(logp - old_logps[i][t])
            clipped = min(max(ratio.item(), 1 - low), 1 + high)
            value = ratio * A[i] if ratio * A[i] <= clipped * A[i] else clipped * A[i]
            if A[i] < 0 and value < dual * A[i]:
                value = dual * A[i]
            weight = {
                "token-mean": 1 / tokens,
                "seq-mean-token-mean": 1 / len(sequences) / len(logps[i]),
                "seq-mean-token-sum-norm": 1 / len(sequences) / max_length,
            }[kind]
            loss = loss - weight * value
    return loss


@pytest.mark.parametrize("kind", [GRPO, MEAN, RLOO, REINFORCE, SIGN])
def test_advantages(kind):
    rng = random.Random(0)
    rewards = [float(rng.random() < 0.4) for _ in range(48)]
    got = common.advantages(torch.tensor(rewards), 8, kind)
    assert got.tolist() == pytest.approx(oracle_advantages(rewards, 8, kind), abs=1e-5)


def test_groups_without_contrast_have_no_advantage():
    for kind in (GRPO, MEAN, RLOO):
        for r in (0.0, 1.0):
            assert common.advantages(torch.full((8,), r), 4, kind).abs().max() == 0


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_loss_value_and_gradient(aggregation, on_policy, monkeypatch):
    """What the scripts do with one micro-batch, against the oracle."""
    monkeypatch.setattr(common, "DUAL_CLIP", 3.0)  # so low that it acts
    rng = random.Random(1)
    lengths = [rng.randint(1, 9) for _ in range(12)]
    logps = [-torch.rand(n, dtype=torch.float64) * 3 for n in lengths]
    if on_policy:
        olds = [x.clone() for x in logps]
    else:  # ratios beyond the clip and the dual clip, both ways
        olds = [x - torch.randn(n, dtype=torch.float64) * 1.5 for x, n in zip(logps, lengths)]
    A = torch.tensor([rng.choice([-1.5, -0.5, 0.0, 0.75]) for _ in lengths])
    weight = common.sign_weights(A, (0.1, 1.0))
    counted = torch.tensor([rng.random() < 0.7 for _ in lengths]) & (weight != 0)
    A = weight * A
    scale = common.token_weights(counted, torch.tensor(lengths), aggregation, 16)

    ours = [x.clone().requires_grad_() for x in logps]
    n = torch.tensor(lengths)
    objective = common.clipped_objective(
        torch.cat(ours), torch.cat(olds), A.repeat_interleave(n), (0.2, 0.28)
    )
    loss = -(scale.repeat_interleave(n) * objective).sum()
    loss.backward()

    theirs = [[v.clone().requires_grad_() for v in x] for x in logps]
    expected = oracle_loss(
        theirs, olds, A.double().tolist(), counted.tolist(), aggregation, 16, 0.2, 0.28, 3.0
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, other in zip(ours, theirs):
        grads = [0.0 if v.grad is None else v.grad.item() for v in other]
        assert mine.grad.tolist() == pytest.approx(grads, rel=1e-5, abs=1e-9)
    assert any(g.grad.abs().sum() > 0 for g in ours)


def test_pass_at_k_by_enumeration():
    for n, c in [(5, 0), (5, 2), (6, 5), (4, 4)]:
        answers = [i < c for i in range(n)]
        for k in range(1, n + 1):
            draws = list(itertools.combinations(answers, k))
            expected = sum(any(d) for d in draws) / len(draws)
            assert common.pass_at_k(n, c, k) == pytest.approx(expected)


def test_plan_microbatches():
    rng = random.Random(2)
    for _ in range(300):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(0, 20))]
        chosen = [i for i in range(len(lengths)) if rng.random() < 0.7]
        world_size, budget = rng.randint(1, 5), rng.randint(30, 200)
        plan = common.plan_microbatches(chosen, lengths, budget, world_size)
        assert len(plan) == world_size and len({len(part) for part in plan}) == 1
        batches = [batch for part in plan for batch in part]
        assert sorted(i for batch in batches for i in batch) == chosen
        for batch in batches:
            width = max((lengths[i] for i in batch), default=0)
            assert len(batch) <= 1 or width * len(batch) <= budget


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_microbatches(world_size, monkeypatch):
    """Every chosen sample once, over the ranks; a rank without one gets values that are all 0."""
    contexts, responses = [[1, 2]] * 5, [np.arange(3, 3 + n) for n in (4, 1, 7, 2, 3)]
    values, seen, fillers = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), [], 0
    args = types.SimpleNamespace(max_tokens_per_microbatch=12)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: world_size)
    counts = set()
    for rank in range(world_size):
        monkeypatch.setattr(common.dist, "get_rank", lambda rank=rank: rank)
        chosen = torch.tensor([True, False, True, False, True])
        batches = list(common.microbatches(chosen, contexts, responses, args, "cpu"))
        counts.add(len(batches))
        for batch in batches:
            n = [len(responses[i]) for i in batch.index]
            assert batch.lengths.tolist() == n and batch.is_response.sum() == sum(n) > 0
            picked = batch.tokens[batch.is_response].tolist()
            assert picked == [t for i in batch.index for t in responses[i].tolist()]
            assert batch.take(
                {i: torch.full((len(y),), i) for i, y in enumerate(responses)}
            ).tolist() == [i for i in batch.index for _ in responses[i]]
            expected = [values[i].item() * (not batch.is_filler) for i in batch.index]
            assert batch.per_token(values).tolist() == [
                v for v, k in zip(expected, n) for _ in range(k)
            ]
            seen += [] if batch.is_filler else batch.index
            fillers += batch.is_filler
    assert sorted(seen) == [0, 2, 4] and len(counts) == 1
    assert fillers == (world_size == 4)  # three samples, and four ranks


def test_split():
    in_loss = torch.tensor([True, False] * 8)
    parts = common.split(in_loss, 4, step=3)
    assert [part.any().item() for part in parts] == [True] * 4 or len(parts) == 4
    assert torch.equal(torch.stack(parts).sum(0), in_loss.long())
    assert all(torch.equal(a, b) for a, b in zip(parts, common.split(in_loss, 4, step=3)))
    assert not all(torch.equal(a, b) for a, b in zip(parts, common.split(in_loss, 4, step=4)))


def test_pick_problems():
    problems = list(range(10))
    epochs = [[inputs.pick_problems(problems, 3 * e + s, 3, 7) for s in (1, 2, 3)] for e in (0, 1)]
    for epoch in epochs:
        seen = [p for batch in epoch for p in batch]
        assert len(seen) == len(set(seen)) == 9
    assert epochs[0] != epochs[1]
    assert inputs.pick_problems(problems, 2, 3, 7) == epochs[0][1]
    assert inputs.pick_problems(problems, 2, 3, 8) != epochs[0][1]


def test_bos_in_order_of_preference():
    from types import SimpleNamespace

    vocabulary = {"<|im_start|>": 7, "<s>": 3}
    make = lambda bos, vocab: SimpleNamespace(  # noqa: E731
        bos_token_id=bos,
        get_vocab=lambda: vocab,
        convert_tokens_to_ids=vocab.get,
        encode=lambda text, add_special_tokens: [vocab[text]] if text in vocab else [1, 2],
    )
    assert inputs.find_bos(make(3, vocabulary), "") == 3
    assert inputs.find_bos(make(None, vocabulary), "") == 7
    assert inputs.find_bos(make(3, vocabulary), "<|im_start|>") == 7
    for tokenizer, token in [(make(None, {}), ""), (make(3, vocabulary), "two words")]:
        with pytest.raises(SystemExit) as error:
            inputs.find_bos(tokenizer, token)
        assert error.value.code == 2


def test_ids_that_can_occur():
    """Neither padding of the embeddings nor tokens without one."""
    for tokens, embeddings in ((5, 8), (8, 5)):
        config = types.SimpleNamespace(vocab_size=embeddings)
        assert inputs.num_tokens(range(tokens), config) == 5


def test_oracle_is_not_ours():
    """The oracle must see a wrong sign: the same samples with -A give another loss."""
    logps = [torch.tensor([-1.0, -2.0], dtype=torch.float64)]
    a, b = (
        oracle_loss(logps, logps, [s], [True], "token-mean", 8, 0.2, 0.2, 10.0) for s in (1.0, -1.0)
    )
    assert math.isclose(a, -1.0) and math.isclose(b, 1.0)


def test_responses_without_a_counted_token():
    """They weigh something finite, which multiplies nothing: a fork's skipped tokens, say."""
    counted, lengths = torch.tensor([True, True]), torch.tensor([0, 4])
    for kind in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        assert common.token_weights(counted, lengths, kind, 8).isfinite().all()


def test_gradients_do_not_depend_on_what_memory_held():
    """In bfloat16 a CPU's kernel reads beyond a row's end, where new memory may hold NaN."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        torch.manual_seed(0)
        h = torch.randn(60, 32, dtype=torch.bfloat16, requires_grad=True)
        W = torch.randn(21, 32, dtype=torch.bfloat16, requires_grad=True)
        y = torch.randint(21, (60,))
        common.TokenLogprobs.apply(h, W, None, y, 1.0, 1.0, math.inf, 64).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = torch.autograd.grad(
        (h @ W.T).float().log_softmax(-1).gather(1, y[:, None]).sum(), (h, W)
    )
    for ours, theirs in zip((h.grad, W.grad), wanted):
        assert torch.allclose(ours, theirs, rtol=0.05, atol=0.1)
