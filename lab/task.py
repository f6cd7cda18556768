r"""Collatz chains: a toy task whose responses restate, reason in steps, reflect and box an answer.

A problem gives a two-digit start value v and a count k: apply k times v -> v / 2 if v is even,
else (3 v + 1) mod 100. A response writes every step out:

>>> chain(81, 3)
[44, 22, 11]
>>> prompt_text(81, 3)
'Q 81#3 A'
>>> print(write_solution(random.Random(0), 81, 3, "So", FLAWLESS))
 Compute 81#3. So 1:81 odd 44; 2:44 even 22; 3:22 even 11; \boxed{11}
>>> boxed_answer(write_solution(random.Random(0), 81, 3, "So", FLAWLESS))
'11'

The problem fixes only the restatement and the first start value; all else follows from what the
response itself has said. This is what makes log pi(y | BOS) a close relative of log pi(y | x).
"""

import random
import re
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Tokens carry their own spaces, so decoding is plain concatenation. The unused ones pad the
# vocabulary to 32: every id the model can emit has a text.
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<unused0>"]
FLAGS = ["T ", "N "]  # think, do not think; only in worlds with flags, unused in the others
WORDS = ["Q ", "#", " A", " Compute ", ". ", "So ", "Let ", ":", " odd ", " even ", "; "]
WORDS += ["wait ", "alternatively ", "\\boxed{", "}"]
VOCABULARY = SPECIAL + FLAGS + list("0123456789") + WORDS

SPLIT_SEED = 0
LET_SHARE = 0.05  # of the documents of the final mix
SOLUTION_ONLY_SHARE = 0.4  # of all documents: "<bos> y <eos>"; the rest are "x y <eos>"
LONG_SHARE = 0.1  # of all documents: k = 7 or 8


class Habit(NamedTuple):
    """Probabilities with which a style writes a step wrong, looks back and starts over."""

    carry_slip: float  # forgets the carry (or borrow) of a step that has one
    other_slip: float  # gets one digit wrong in a step without carry
    wait_after_slip: float  # redoes a wrong step
    wait_after_right: float  # redoes a right step
    repair: float  # a wrong step redone comes out right
    keep: float  # a right step redone comes out right
    alternatively: float  # redoes the whole chain before the box


HABITS = {
    "So": Habit(0.45, 0.01, 0.01, 0.01, 0.95, 0.98, 0.01),
    "Let": Habit(0.15, 0.01, 0.85, 0.15, 0.95, 0.98, 0.40),
}
FLAWLESS = Habit(0, 0, 0, 0, 1, 1, 0)


class Switch(NamedTuple):
    """Share of "Let" by context: a flag before a problem says whether to think.

    Half of the documents with a problem begin with T, half with N. The problems of RL and of tests
    all begin with N. So does the paper's prompt: it switches off Qwen3's thinking mode.
    """

    think: float = 0.95  # after T
    plain: float = 0.03  # after N
    alone: float = 0.5  # in solutions without their problem
    flagged: bool = True  # else no document has a flag, and those with a problem are as under N


class World(NamedTuple):
    """What the study varies. The defaults are the lab; each other world differs in one thing.

    "down" differs so from "short", and the worlds "switch-..." from "switch".
    """

    restate: bool = True  # a response begins with its problem
    count_down: bool = False  # the steps are numbered k to 1, not 1 to k
    tag: bool = False  # a problem has three more digits, which mean nothing and are restated
    let_share: float = LET_SHARE
    solution_only_share: float = SOLUTION_ONLY_SHARE
    so: Habit = HABITS["So"]
    switch: Switch | None = None  # a careful mode that prompts can switch off


LAB = World()
WORLDS = {
    "lab": LAB,
    "short": World(restate=False),
    "down": World(restate=False, count_down=True),
    "tag": World(tag=True),
    "paired": World(solution_only_share=0.0),
    "rare": World(let_share=0.01),
    "sloppy": World(so=HABITS["So"]._replace(carry_slip=0.75)),
    "switch": World(switch=Switch()),
    "switch-0.3": World(switch=Switch(plain=0.003)),
    "switch-1": World(switch=Switch(plain=0.01)),
    "switch-10": World(switch=Switch(plain=0.1)),
    "switch-alone-20": World(switch=Switch(alone=0.2)),
    "switch-alone-80": World(switch=Switch(alone=0.8)),
    "switch-short": World(switch=Switch(), restate=False),
    "switch-no-flag": World(switch=Switch(flagged=False)),
}


# ---------------------------------------------------------------------------------- the task


def step(value: int) -> int:
    """One right step.

    >>> step(44), step(81), step(0)
    (22, 44, 0)
    """
    return value // 2 if value % 2 == 0 else (3 * value + 1) % 100


def chain(value: int, count: int) -> list[int]:
    """The `count` right results that follow `value`; the last one is the answer."""
    results = []
    for _ in range(count):
        value = step(value)
        results.append(value)
    return results


def step_without_carry(value: int) -> int:
    """The step done digit by digit with the carry (or borrow) forgotten.

    52 / 2: the tens give 2 and lend 10 to the units, (10 + 2) / 2 = 6; without it the units give 1.
    3 * 37 + 1: the units give 22, so 2 is carried; without it the tens are 9.

    >>> step(52), step_without_carry(52), step(37), step_without_carry(37)
    (26, 21, 12, 92)

    A step that has no carry comes out right.

    >>> step(81), step_without_carry(81)
    (44, 44)
    """
    tens, units = divmod(value, 10)
    if value % 2 == 0:
        return 10 * (tens // 2) + units // 2
    return 10 * (3 * tens % 10) + (3 * units + 1) % 10


def has_carry(value: int) -> bool:
    return step(value) != step_without_carry(value)


def problem_name(value: int, count: int, tag: int | None = None) -> str:
    """How problem and response call the problem.

    >>> problem_name(81, 3), problem_name(81, 3, 42)
    ('81#3', '81#3#042')
    """
    return f"{value:02d}#{count}" + ("" if tag is None else f"#{tag:03d}")


def prompt_text(value: int, count: int, tag: int | None = None) -> str:
    return f"Q {problem_name(value, count, tag)} A"


def opening(problem: str, world: World = LAB) -> str:
    """How the response to a problem begins, up to the name of the style.

    >>> opening("Q 81#3 A"), opening("Q 81#3 A", WORLDS["short"])
    (' Compute 81#3. ', '. ')
    >>> opening("N Q 81#3 A", WORLDS["switch"])
    ' Compute 81#3. '
    """
    name = problem.partition("Q ")[2].removesuffix(" A")
    return f" Compute {name}. " if world.restate else ". "


def split_pairs(split: str) -> list[tuple[int, int]]:
    """The (value, count) pairs of a split, in order of count.

    For each count the 100 values are shuffled and cut in quarters. The first quarter is "test"
    for k = 3-6, the second is "hard" for k = 6-8. What remains is "train" for k = 3-6 and "long"
    for k = 7-8; the corpus is written from these two only.
    """
    pairs = {"train": [], "test": [], "hard": [], "long": []}
    for count in range(3, 9):
        values = list(range(100))
        random.Random(1000 * SPLIT_SEED + count).shuffle(values)
        for i, value in enumerate(values):
            if i < 25 and count <= 6:
                name = "test"
            elif 25 <= i < 50 and count >= 6:
                name = "hard"
            else:
                name = "train" if count <= 6 else "long"
            pairs[name].append((value, count))
    return pairs[split]


def problems(split: str, world: World = LAB) -> list[dict[str, str]]:
    """Problems of "train" (275), "test" (100), "hard" (75) or "long" (150, corpus only).

    >>> problems("test")[0], problems("test", WORLDS["tag"])[0]
    ({'problem': 'Q 35#3 A', 'answer': '10'}, {'problem': 'Q 35#3#864 A', 'answer': '10'})
    >>> problems("test", WORLDS["switch"])[0]
    {'problem': 'N Q 35#3 A', 'answer': '10'}
    """
    flag = "N " if world.switch and world.switch.flagged else ""
    rng = random.Random(SPLIT_SEED)
    return [
        {
            "problem": flag + prompt_text(v, k, rng.randrange(1000) if world.tag else None),
            "answer": f"{chain(v, k)[-1]:02d}",
        }
        for v, k in split_pairs(split)
    ]


def contexts_of(problems: list[dict], world: World = LAB) -> dict[str, list[tuple[str, str]]]:
    """(what stands before y, how y begins up to its style) of each problem, by kind of context.

    >>> contexts_of(problems("test")[:1])
    {'x': [('Q 35#3 A', ' Compute 35#3. ')], 'BOS': [('<bos>', ' Compute 35#3. ')]}
    >>> list(contexts_of(problems("test", WORLDS["switch"]), WORLDS["switch"]))
    ['N', 'T', 'BOS']
    """
    rows = [(p["problem"].removeprefix("N "), opening(p["problem"], world)) for p in problems]
    flags = {"x": ""}
    if world.switch and world.switch.flagged:
        flags = {"N": "N ", "T": "T "}
    found = {name: [(flag + x, start) for x, start in rows] for name, flag in flags.items()}
    return found | {"BOS": [("<bos>", start) for _, start in rows]}


def boxed_answer(text: str) -> str | None:
    r"""The two digits of the last box, None if there is none.

    >>> boxed_answer(r"2:44 even 22; \boxed{22}"), boxed_answer("2:44 even 22; ")
    ('22', None)
    """
    found = re.findall(r"\\boxed\{(\d\d)\}", text)
    return found[-1] if found else None


# -------------------------------------------------------------------------------- the corpus


def slip(rng: random.Random, value: int) -> int:
    """A wrong result of the step from `value`."""
    if has_carry(value):
        return step_without_carry(value)
    tens, units = divmod(step(value), 10)
    off = rng.randint(1, 9)
    if rng.random() < 0.5:
        return 10 * tens + (units + off) % 10
    return 10 * ((tens + off) % 10) + units


def write_chain(
    rng: random.Random, value: int, count: int, habit: Habit, count_down: bool = False
) -> tuple[str, int]:
    """Text of `count` steps from `value` with slips and reflections, and the last result.

    A slip that is not repaired is carried on: the next step starts from the wrong result.
    """
    text = ""
    for i in range(1, count + 1):
        number = count + 1 - i if count_down else i
        question = f"{number}:{value:02d} {'odd' if value % 2 else 'even'} "
        right, wrong = step(value), slip(rng, value)
        slipped = rng.random() < (habit.carry_slip if has_carry(value) else habit.other_slip)
        result = wrong if slipped else right
        text += f"{question}{result:02d}; "
        if rng.random() < (habit.wait_after_slip if slipped else habit.wait_after_right):
            comes_right = rng.random() < (habit.repair if slipped else habit.keep)
            result = right if comes_right else wrong
            text += f"wait {question}{result:02d}; "
        value = result
    return text, value


def write_solution(
    rng: random.Random,
    value: int,
    count: int,
    style: str,
    habit: Habit | None = None,
    world: World = LAB,
    tag: int | None = None,
) -> str:
    """A response y in style "So" or "Let", without end token; `habit` defaults to the style's."""
    habit = habit or (world.so if style == "So" else HABITS[style])
    text, answer = write_chain(rng, value, count, habit, world.count_down)
    if rng.random() < habit.alternatively:
        again, answer = write_chain(rng, value, count, habit, world.count_down)
        text += f"alternatively {again}"
    start = opening(prompt_text(value, count, tag), world)
    return f"{start}{style} {text}\\boxed{{{answer:02d}}}"


TRAIN_PAIRS, LONG_PAIRS = split_pairs("train"), split_pairs("long")


def write_document(rng: random.Random, let_share: float | None = None, world: World = LAB) -> str:
    r"""One document of the corpus with its special tokens.

    Only solution-alone documents begin with <bos>: the pre-train context is <bos> alone, the
    post-train context is the prompt as the tokenizer encodes it, without <bos>.

    >>> write_document(random.Random(1))
    'Q 71#3 A Compute 71#3. So 1:71 odd 14; 2:14 even 07; 3:07 odd 02; \\boxed{02}<eos>'
    >>> write_document(random.Random(6))
    '<bos> Compute 34#3. So 1:34 even 12; 2:12 even 06; 3:06 even 03; \\boxed{03}<eos>'
    >>> write_document(random.Random(1), world=WORLDS["short"])
    'Q 71#3 A. So 1:71 odd 14; 2:14 even 07; 3:07 odd 02; \\boxed{02}<eos>'
    >>> write_document(random.Random(1), world=WORLDS["down"])
    'Q 71#3 A. So 3:71 odd 14; 2:14 even 07; 1:07 odd 02; \\boxed{02}<eos>'
    >>> write_document(random.Random(1), world=WORLDS["switch"])
    'N Q 71#3 A Compute 71#3. So 1:71 odd 14; 2:14 even 02; 3:02 even 01; \\boxed{01}<eos>'
    """
    value, count = rng.choice(LONG_PAIRS if rng.random() < LONG_SHARE else TRAIN_PAIRS)
    careful, alone = rng.random(), rng.random() < world.solution_only_share
    tag = rng.randrange(1000) if world.tag else None
    flag, share = "", world.let_share
    if world.switch:
        flag = rng.choice(FLAGS) if world.switch.flagged and not alone else ""
        share = world.switch.think if flag == "T " else world.switch.plain
        share = world.switch.alone if alone else share
    style = "Let" if careful < (share if let_share is None else let_share) else "So"
    context = "<bos>" if alone else flag + prompt_text(value, count, tag)
    return context + write_solution(rng, value, count, style, world=world, tag=tag) + "<eos>"


# ----------------------------------------------------------------------------- the tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""A word-level tokenizer; it adds no special token of its own.

    >>> tokenizer = make_tokenizer()
    >>> ids = tokenizer.encode("Q 81#3 A")
    >>> [VOCABULARY[i] for i in ids]
    ['Q ', '8', '1', '#', '3', ' A']
    >>> tokenizer.decode(ids)
    'Q 81#3 A'
    """
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    # Longest first, or the alternation could stop at a prefix of a token.
    pattern = "|".join(re.escape(t) for t in sorted(VOCABULARY, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL if t.startswith("<unused")],
        clean_up_tokenization_spaces=False,  # a decoded text must encode to the same ids
        model_max_length=512,
    )
