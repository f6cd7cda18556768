"""The lab: its task, its corpus and its base checkpoint."""

import doctest
import hashlib
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import task
from lab.pretrain import (
    BASE,
    let_probability,
    make_model,
    measure,
    renew_embeddings,
    sample,
    train_step,
)

ROOT = Path(__file__).resolve().parents[1]

STYLES = ["So", "Let"]


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [task.write_document(rng) for _ in range(20000)]


def test_docstrings():
    result = doctest.testmod(task)
    assert result.attempted > 5 and result.failed == 0


# ------------------------------------------------------------------------------------- task


@pytest.mark.parametrize(
    "value, right, careless",
    [
        (0, 0, 0),
        (1, 4, 4),
        (3, 10, 0),  # 9 + 1 = 10: units 0, carry 1
        (10, 5, 0),  # 10 / 2: the odd ten is forgotten
        (52, 26, 21),
        (64, 32, 32),
        (81, 44, 44),  # 244 mod 100
        (37, 12, 92),  # 112 mod 100; without the carry of 2 the tens are 9
        (99, 98, 78),  # 298 mod 100; tens 27 + 2 = 29, without carry 27
    ],
)
def test_step(value, right, careless):
    assert task.step(value) == right
    assert task.step_without_carry(value) == careless
    assert task.has_carry(value) == (right != careless)


def test_chain():
    assert task.chain(81, 3) == [44, 22, 11]
    assert task.chain(7, 6) == [22, 11, 34, 17, 52, 26]


def test_slips_are_wrong_two_digit_numbers():
    rng = random.Random(0)
    for value in range(100):
        for _ in range(20):
            wrong = task.slip(rng, value)
            assert 0 <= wrong < 100 and wrong != task.step(value)


def test_splits():
    splits = {name: task.problems(name) for name in ["train", "test", "hard", "long"]}
    counts = {
        name: {k: sum(p["problem"][5] == str(k) for p in split) for k in range(3, 9)}
        for name, split in splits.items()
    }
    assert counts["train"] == {3: 75, 4: 75, 5: 75, 6: 50, 7: 0, 8: 0}
    assert counts["test"] == {3: 25, 4: 25, 5: 25, 6: 25, 7: 0, 8: 0}
    assert counts["hard"] == {3: 0, 4: 0, 5: 0, 6: 25, 7: 25, 8: 25}
    assert counts["long"] == {3: 0, 4: 0, 5: 0, 6: 0, 7: 75, 8: 75}
    prompts = [p["problem"] for split in splits.values() for p in split]
    assert len(set(prompts)) == len(prompts) == 600  # disjoint, and together all (v, k)
    for split in splits.values():
        for p in split:
            value, count = map(int, re.fullmatch(r"Q (\d\d)#(\d) A", p["problem"]).groups())
            assert p["answer"] == f"{task.chain(value, count)[-1]:02d}"


# ----------------------------------------------------------------------------------- corpus


@pytest.mark.parametrize("style", STYLES)
def test_flawless_solutions_are_right(style):
    rng = random.Random(0)
    for value in range(100):
        for count in range(3, 9):
            text = task.write_solution(rng, value, count, style, task.FLAWLESS)
            assert task.boxed_answer(text) == f"{task.chain(value, count)[-1]:02d}"
            assert text.startswith(f" Compute {value:02d}#{count}. {style} 1:{value:02d} ")
            assert text.count("; ") == count


def test_reflections_and_transitions():
    rng = random.Random(0)
    always_repair = task.Habit(1, 1, 1, 0, 1, 1, 0)
    text = task.write_solution(rng, 52, 3, "Let", always_repair)
    assert text.startswith(" Compute 52#3. Let 1:52 even 21; wait 1:52 even 26; 2:26 even ")
    assert text.count("wait ") == 3 and task.boxed_answer(text) == "40"  # 52 26 13 40
    never_repair = task.Habit(1, 1, 1, 0, 0, 0, 0)
    text = task.write_solution(rng, 52, 3, "Let", never_repair)
    assert "1:52 even 21; wait 1:52 even 21; 2:21 odd " in text
    start_over = task.FLAWLESS._replace(alternatively=1)
    text = task.write_solution(rng, 81, 3, "Let", start_over)
    steps = "1:81 odd 44; 2:44 even 22; 3:22 even 11; "
    assert text == f" Compute 81#3. Let {steps}alternatively {steps}\\boxed{{11}}"


def test_corpus_rates(documents):
    def share(condition, of=documents):
        return sum(bool(condition(d)) for d in of) / len(of)

    assert share(lambda d: ". Let " in d) == pytest.approx(0.05, abs=0.01)
    assert share(lambda d: d.startswith("<bos>")) == pytest.approx(0.4, abs=0.02)
    assert share(lambda d: re.search(r"#[78]\.", d)) == pytest.approx(0.1, abs=0.01)
    assert share(lambda d: ("<bos>" in d) != d.startswith("Q ")) == 1
    assert share(lambda d: d.endswith("}<eos>")) == 1
    rng = random.Random(1)
    rich = [task.write_document(rng, let_share=0.6) for _ in range(5000)]
    assert share(lambda d: ". Let " in d, rich) == pytest.approx(0.6, abs=0.03)
    let = [d for d in rich if ". Let " in d]
    assert share(lambda d: "alternatively " in d, let) == pytest.approx(0.4, abs=0.04)

    # First steps: "i:value parity result; " and perhaps "wait " after it.
    first = re.compile(r"(So|Let) 1:(\d\d) (?:odd|even) (\d\d); (wait)?")
    steps = [first.search(d).groups() for d in documents + rich]
    for style, carry_slip, wait_slip, wait_right in [
        ("So", 0.45, 0.01, 0.01),
        ("Let", 0.15, 0.85, 0.15),
    ]:
        mine = [(int(v), int(r), wait) for s, v, r, wait in steps if s == style]
        slips = [(v, r, w) for v, r, w in mine if r != task.step(v)]
        carry = [s for s in mine if task.has_carry(s[0])]
        plain = [s for s in mine if not task.has_carry(s[0])]
        right = [s for s in mine if s[1] == task.step(s[0])]
        carry_wrong = share(lambda s: s[1] != task.step(s[0]), carry)
        plain_wrong = share(lambda s: s[1] != task.step(s[0]), plain)
        assert carry_wrong == pytest.approx(carry_slip, abs=0.04)
        assert plain_wrong == pytest.approx(0.01, abs=0.01)
        assert share(lambda s: s[2] == "wait", slips) == pytest.approx(wait_slip, abs=0.07)
        assert share(lambda s: s[2] == "wait", right) == pytest.approx(wait_right, abs=0.04)


def test_held_out_problems_are_not_in_the_corpus(documents):
    held_out = set(task.split_pairs("test") + task.split_pairs("hard"))
    seen = {(int(v), int(k)) for d in documents for v, k in re.findall(r"(\d\d)#(\d)", d)}
    assert not seen & held_out
    assert len(seen) == 425  # all others are there


def test_the_default_world_is_the_one_of_the_committed_base():
    rng = random.Random(0)
    text = "".join(task.write_document(rng, world=task.WORLDS["lab"]) for _ in range(1000))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "eb0cbd768c85695163c0bfdab0b405c4e6fde7b66ac4091c38d2fdbf0deb9e7e"


@pytest.mark.parametrize("name", task.WORLDS)
def test_worlds(name):
    world, rng, tokenizer = task.WORLDS[name], random.Random(0), task.make_tokenizer()
    near = {"down": "short", "switch-short": "switch"}.get(name, "lab")
    # one thing differs
    assert sum(a != b for a, b in zip(world, task.WORLDS[near])) == (name != "lab")
    if name.startswith("switch-"):
        near = task.WORLDS["switch"]
        changed = [a != b for a, b in zip(world.switch, near.switch)]
        assert sum(changed) + (world.restate != near.restate) == 1
    documents = [task.write_document(rng, world=world) for _ in range(4000)]
    let = sum(". Let " in d for d in documents) / 4000
    alone = sum(d.startswith("<bos>") for d in documents) / 4000
    if not world.switch:
        assert let == pytest.approx(world.let_share, abs=0.012)
    assert alone == pytest.approx(world.solution_only_share, abs=0.03)
    firsts = [re.search(r"So \d:(\d\d) (?:odd|even) (\d\d)", d) for d in documents]
    firsts = [(int(f[1]), int(f[2])) for f in firsts if f and task.has_carry(int(f[1]))]
    slips = sum(task.step(v) != result for v, result in firsts) / len(firsts)
    assert slips == pytest.approx(world.so.carry_slip, abs=0.04)
    flagged = world.switch is not None and world.switch.flagged
    for problem in task.problems("train", world):
        assert problem["problem"].startswith("N ") == flagged
        x = problem["problem"].removeprefix("N ")
        assert len(tokenizer.encode(x)) == (10 if world.tag else 6)
        assert x[:6] + " A" in {p["problem"] for p in task.problems("train")}
    for document in documents[:200]:
        assert tokenizer.decode(tokenizer.encode(document)) == document
        if document.startswith("Q "):
            x, a, rest = document.partition(" A")
            assert rest.startswith(start := task.opening(x + a, world))
            assert (x[2:] in start) == world.restate and len(x[2:]) == (8 if world.tag else 4)


@pytest.mark.parametrize("name", [name for name in task.WORLDS if task.WORLDS[name].switch])
def test_switch_worlds_follow_their_shares(name):
    world, rng = task.WORLDS[name], random.Random(0)
    found = {"N ": [], "T ": [], "Q ": [], "<b": []}
    for _ in range(20000):
        document = task.write_document(rng, world=world)
        found[document[:2]].append(". Let " in document)
    shares = {"<b": world.switch.alone, "T ": world.switch.think, "N ": world.switch.plain}
    if not world.switch.flagged:
        shares = {"<b": world.switch.alone, "Q ": world.switch.plain}
    assert {start for start in found if found[start]} == shares.keys()
    for start, share in shares.items():
        own = found[start]
        assert sum(own) / len(own) == pytest.approx(share, abs=4 * (share / len(own)) ** 0.5)
    if world.switch.flagged:
        assert len(found["T "]) == pytest.approx(len(found["N "]), rel=0.05)


def test_contexts():
    """What stands before a response of the corpus is one of the contexts."""
    world = task.WORLDS["switch"]
    contexts = task.contexts_of(task.problems("train", world), world)
    rng = random.Random(0)
    for _ in range(100):
        document = task.write_document(rng, world=world)
        if not re.search(r"#[78]", document):
            kind = {"N": "N", "T": "T", "<": "BOS"}[document[0]]
            assert any(document.startswith(a + b + style) for a, b in contexts[kind]
                       for style in ("So ", "Let "))  # fmt: skip


# -------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("source", ["made", "loaded"])
def test_tokenizer_round_trip(documents, source):
    tokenizer = task.make_tokenizer() if source == "made" else AutoTokenizer.from_pretrained(BASE)
    texts = documents[:500] + [p["problem"] for p in task.problems("test")]
    texts += [task.write_solution(random.Random(i), 81, 3, "Let") for i in range(50)]
    assert any("wait" in t for t in texts) and any("alternatively" in t for t in texts)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
        assert tokenizer.unk_token_id not in ids
        clean = tokenizer.decode(ids, skip_special_tokens=True)
        assert clean == text.replace("<bos>", "").replace("<eos>", "")
    assert re.search(r"\\boxed\{\d\d\}$", clean)
    # Prompt and response concatenate as texts and as ids, and no token is added to either.
    x, y = "Q 81#3 A", task.write_solution(random.Random(0), 81, 3, "So", task.FLAWLESS)
    assert tokenizer.encode(x) + tokenizer.encode(y) == tokenizer.encode(x + y)
    assert len(tokenizer.encode(x)) == 6 and len(tokenizer.encode(y)) == 11 + 8 * 3
    assert tokenizer.encode("<bos>") == [tokenizer.bos_token_id]
    assert tokenizer.encode("<eos>") == [tokenizer.eos_token_id]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) == len(task.VOCABULARY) == 32


# ------------------------------------------------------------------- pre-training, checkpoint


def test_train_step_is_the_mean_over_all_tokens(documents):
    tokenizer = task.make_tokenizer()
    torch.manual_seed(0)
    model = make_model(tokenizer)
    ids = tokenizer(documents[:10])["input_ids"]
    loss = train_step(model, ids, tokenizer.pad_token_id, buckets=4)
    bucketed = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    # one document at a time, no padding anywhere
    assert train_step(model, ids, tokenizer.pad_token_id, buckets=10) == pytest.approx(
        loss, rel=1e-5
    )
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, bucketed, rtol=1e-3, atol=1e-6)


def test_flags_of_the_labs_base_are_told_apart_only_after_renewal():
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    table, flags = model.get_input_embeddings().weight, [5, 6]
    assert [task.VOCABULARY[i] for i in flags] == task.FLAGS
    before = table.detach().clone()
    # without it, the context's flag makes no difference to speak of
    without = let_probability(model, task.make_tokenizer(), task.WORLDS["switch"])
    assert without["N"] == pytest.approx(without["T"], abs=0.01)
    torch.manual_seed(0)
    renew_embeddings(model, task.make_tokenizer())  # a start that has the flags
    assert torch.equal(table, before)
    renew_embeddings(model, AutoTokenizer.from_pretrained(BASE))
    others = [i for i in range(32) if i not in flags]
    assert torch.equal(table[others], before[others])
    apart = [torch.cosine_similarity(t[5], t[6], dim=0).item() for t in (before, table)]
    assert apart[0] > 0.99 and apart[1] < 0.5
    assert table[flags].std().item() == pytest.approx(before[7:].std().item(), rel=0.3)


def test_sampler_follows_the_model():
    """Sampled with the cache, each token is one the model gives when read without cache."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    prompts = [p["problem"] for p in task.problems("test")[::10]]
    # Sharpened to be almost greedy, so that what must be sampled is known.
    model.lm_head = torch.nn.Linear(96, 32, bias=False)
    model.lm_head.weight.data = 1000 * model.model.embed_tokens.weight.data
    for prompt, response in zip(prompts, sample(model, tokenizer, prompts, 64)):
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + response])).logits[0]
        assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == response
        assert response[-1] == tokenizer.eos_token_id


def test_checkpoint():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert model.config.model_type == "qwen3" and model.dtype == torch.float32
    assert model.config.head_dim in (32, 64, 128)
    assert model.config.num_attention_heads % 2 == model.config.num_key_value_heads % 2 == 0
    assert sum(f.stat().st_size for f in BASE.iterdir()) < 2e6


def test_readme_figures():
    """New samples of the checkpoint agree with the README's table within sampling noise."""
    # Of 800 (test) or 600 (hard) responses: four standard errors of the difference of two draws.
    tolerance = {
        "avg@8": 0.09,
        "pass@8": 0.2,
        "length (tokens)": 4,
        "truncated": 0.02,
        "wait per response": 0.09,
        "alternatively per response": 0.05,
        "fraction of Let": 0.05,
        "correct in So": 0.09,
        "correct in Let": 0.5,  # only some 40 responses
        "correct if Let is forced": 0.1,
    }
    readme = (ROOT / "lab" / "README.md").read_text()
    for column, split in enumerate(["test", "hard"]):
        new = measure(str(BASE), split, samples=8, max_tokens=192, seed=2)
        assert new.keys() == tolerance.keys()
        for name, value in new.items():
            row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", readme, re.MULTILINE).group(1)
            assert value == pytest.approx(float(row.split("|")[column]), abs=tolerance[name]), name
