"""The thought counter on texts written for it, hard negatives included, and on the lab's."""

import random
import time

import pytest

import thoughts
from lab import task

REFLECTIONS = [
    "Wait, the sign flips here.",
    "Wait — 3 divides 12 as well.",
    "So x = 4. But wait, x must be odd.",
    "Hmm, wait. That sum has one term too many.",
    "**Wait**, I used the wrong radius.",
    "Hold on, the triangle is not isosceles.",
    "Let me double-check the product: 12 * 13 = 156.",
    "Let's check whether n = 7 satisfies both conditions.",
    "We should verify this with the second equation.",
    "I'll just recompute the determinant.",
    "Let me reconsider the second case.",
    "On second thought, the order does not matter.",
    "That can't be right, since a probability is at most 1.",
    "This seems off: the area is negative.",
    "That’s not correct, because 91 = 7 * 13.",
    "I made a mistake in the third line.",
    "I have made an arithmetic error.",
    "Did I miss a solution?",
    "A quick sanity check: at x = 0 both sides are 1.",
    "Let me think again about the base case.",
]
TRANSITIONS = [
    "Alternatively, count the complement.",
    "Or, alternatively, we could use symmetry.",
    "Another approach is to use generating functions.",
    "Let's try a different approach.",
    "Another way to solve this is with vectors.",
    "Is there another method? Yes: induction.",
    "Let me think about this differently.",
    "Let me try something else.",
    "Wait, maybe there is another way: use Vieta.",
    "Let us use a new idea here.",
]
EXECUTIONS = [
    "The waiter brings 5 plates.",
    "She is awaiting two parcels, and he waits 3 minutes.",
    "They wait for 10 minutes at the station.",
    "Wait times are 4, 5 and 9 minutes.",
    "Each visitor has to wait 12 minutes in line.",
    "0.5 is another way of writing 1/2.",
    "Another way to write 5 is 10/2.",
    "Put a check mark next to 7, and write a check for 20 dollars.",
    "The alternative hypothesis has p < 0.05.",
    "The series is alternating, and terms alternate in sign.",
    "Let me check in at the hotel at 3 pm.",
    "The checkerboard has 64 squares.",
    "She holds on to 4 of her 9 cards.",
    "Hold on to the remainder, 3.",
    "The suitcase weighs 20 kg and a footstep is 0.7 m.",
    "This is a right triangle with legs 3 and 4.",
    "We add 3 and 4 to get 7.",
    "The method gives a different number of roots for each k.",
    "It is correct to two decimals in 3 of 4 tables.",
]
BEHAVIOURS = {
    "subgoal": [
        "First, we find the slope of the line.",
        "We need to find the radius.",
        "Step 1: isolate x.",
        "Let's break this down into two parts: break the problem into cases.",
        "We start by factoring the quadratic.",
        "Our goal is a formula for n.",
    ],
    "enumeration": [
        "Case 1: x is positive.",
        "If n = 3, then the sum is 6.",
        "Let's list all divisors of 12.",
        "The possible values are 1, 2 and 4.",
        "For each possible choice of a, there are 3 of b.",
    ],
    "verification": [
        "Let me verify the answer.",
        "To double-check, add the parts: 3 + 4 = 7.",
        "Plugging x = 2 back into the equation gives 0.",
        "Check: 5 * 6 = 30.",
        "Let's check that 7 is prime.",
    ],
    "backtracking": [
        "This doesn't work, so x is not 3.",
        "That is wrong.",
        "Let me go back to the first equation.",
        "We made a sign error above.",
        "This leads to a contradiction.",
        "Let's start over.",
    ],
}
NO_BEHAVIOUR = [
    "The suitcase holds 12 books.",
    "A footstep 3 feet long.",
    "He lists his 7 friends.",
    "In that case the sum is 7.",
    "The first, second and third terms are 1, 2, 4.",
    "She paid by check: 5 dollars.",
    "He walks back home after 3 km.",
    "The verification code has 6 digits.",
    "The clerk works and the bulb does not.",
]


def kind(text: str) -> str:
    found = thoughts.count(text)
    return max(("reflection", "transition", "execution"), key=found.get)


@pytest.mark.parametrize("text", REFLECTIONS)
def test_reflections(text):
    assert kind(text) == "reflection"


@pytest.mark.parametrize("text", TRANSITIONS)
def test_transitions(text):
    assert kind(text) == "transition"


@pytest.mark.parametrize("text", EXECUTIONS)
def test_hard_negatives(text):
    assert kind(text) == "execution"


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviours(behaviour):
    for text in BEHAVIOURS[behaviour]:
        assert thoughts.count(text)[behaviour] == 1, text
    for text in NO_BEHAVIOUR:
        assert thoughts.count(text)[behaviour] == 0, text


def test_a_response_is_the_sum_of_its_blocks():
    chosen = [*REFLECTIONS, *TRANSITIONS, *EXECUTIONS]
    random.Random(0).shuffle(chosen)
    found = thoughts.count(" \n \n\n".join(chosen))
    assert found["reflection"] == len(REFLECTIONS)
    assert found["transition"] == len(TRANSITIONS)
    assert found["execution"] == len(EXECUTIONS)


def test_several_matches_in_a_block_are_one_thought():
    text = "Wait, wait. Hold on, let me check that.\nWait, it is 7.\n\nSo 7."
    found = thoughts.count(text)
    assert (found["reflection"], found["execution"]) == (1, 1)


def test_lab_responses():
    """Every `wait` and every `alternatively` of the lab counts once."""
    rng, waits, alternatives = random.Random(1), 0, 0
    for value, count in task.split_pairs("train"):
        text = task.write_solution(rng, value, count, "Let")
        found = thoughts.count(text)
        assert found["reflection"] == text.count("wait ")
        assert found["transition"] == text.count("alternatively ")
        waits, alternatives = waits + found["reflection"], alternatives + found["transition"]
    assert waits > 100 and alternatives > 50


def test_rates():
    counts = [thoughts.count("Wait, no."), thoughts.count("Alternatively, 5.\n\nWait, 6.")]
    rates = thoughts.rates(counts, [10, 30])
    assert rates["thoughts/reflection"] == 1.0
    assert rates["thoughts/reflection_per_1k_tokens"] == 50.0
    assert rates["thoughts/transition"] == 0.5
    assert rates["thoughts/transition_per_1k_tokens"] == 25.0
    assert thoughts.rates([], [])["thoughts/backtracking"] == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "; ",
        "wait ",
        "wait, ",
        "let me ",
        "(",
        "-",
        "plug ",
        "a",
        "that is ",
        "\u2028",
    ],
)
def test_time_is_linear(text):
    start = time.process_time()
    found = thoughts.count(text * (1_000_000 // max(1, len(text))))
    assert time.process_time() - start < 5
    assert all(n >= 0 for n in found.values())
