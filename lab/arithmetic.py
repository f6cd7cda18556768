r"""One-step arithmetic with worked examples: problems that a 135M chat model sometimes solves.

There are two-digit additions and subtractions, small multiplications and word problems of one step.
Every answer is a positive integer. A problem is a chat: first worked examples as user and assistant
turns, which show the model that an answer is short and ends in \boxed{}, then the question.

>>> [message["role"] for message in problems("test")[0]["problem"][-3:]]
['user', 'assistant', 'user']
"""

import random

NUM_TRAIN, NUM_TEST = 2000, 64
SPLIT_SEED = 0

EXAMPLES = [
    ("What is 36 + 47?", r"36 + 47 = 83. The answer is \boxed{83}."),
    (
        "Ben has 24 coins and gives away 6. How many coins does Ben have left?",
        r"24 - 6 = 18. The answer is \boxed{18}.",
    ),
    ("What is 6 * 14?", r"6 * 14 = 84. The answer is \boxed{84}."),
    ("What is 58 - 11?", r"58 - 11 = 47. The answer is \boxed{47}."),
    (
        "Eva has 13 coins and finds 5 more. How many coins does Eva have now?",
        r"13 + 5 = 18. The answer is \boxed{18}.",
    ),
]

# Word problems by operation. In a subtraction a > b; in a multiplication a and b are small.
TEMPLATES = {
    "+": [
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{name} picks {a} {things} on Monday and {b} on Tuesday. "
        "How many {things} does {name} pick in all?",
    ],
    "-": [
        "{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?",
        "There are {a} {things} in a bag. {name} takes out {b}. How many {things} stay in the bag?",
    ],
    "*": [
        "{name} has {a} boxes with {b} {things} in each. How many {things} does {name} have?",
        "{name} buys {a} {things} for {b} coins each. How many coins does {name} pay?",
    ],
}
NAMES = ["Anna", "Tom", "Mia", "Sam", "Lily", "Max"]
THINGS = ["apples", "books", "pens", "shells", "cards", "lemons"]


def solve(a: int, operation: str, b: int) -> int:
    """The answer of a problem.

    >>> [solve(12, operation, 3) for operation in "+-*"]
    [15, 9, 36]
    """
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def draw(rng: random.Random) -> tuple[str, int]:
    """A question and its answer: two in three are plain numbers, one in three is a word problem."""
    words = rng.random() < 1 / 3
    operation = rng.choices("+-*", [2, 2, 1])[0]
    if operation == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 12 if words else 20)
    else:
        a = rng.randint(11, 40 if words else 99)
        b = rng.randint(2, 10 if words else a - 1)
    question = rng.choice(TEMPLATES[operation]) if words else "What is {a} {operation} {b}?"
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    text = question.format(a=a, b=b, operation=operation, name=name, things=things)
    return text, solve(a, operation, b)


def problems(split: str) -> list[dict]:
    """[{"problem": chat messages, "answer": str}] of "train" or "test"; no question is in both."""
    rng = random.Random(SPLIT_SEED)
    shown = {question for question, _ in EXAMPLES}
    drawn = {}
    while len(drawn) < NUM_TEST + NUM_TRAIN:
        question, answer = draw(rng)
        if question not in shown:
            drawn[question] = answer
    rows = list(drawn.items())
    rows = {"test": rows[:NUM_TEST], "train": rows[NUM_TEST:]}[split]
    return [{"problem": chat(question), "answer": str(answer)} for question, answer in rows]


def chat(question: str) -> list[dict]:
    """The worked examples as turns of a conversation, then the question."""
    turns = [text for example in EXAMPLES for text in example] + [question]
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
