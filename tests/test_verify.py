"""The verifier with its real pool of processes."""

import time
from types import SimpleNamespace

import pytest

import common


@pytest.fixture(scope="module")
def pool():
    pool = common.start_verifier()
    yield pool
    pool.stop()
    pool.join()


def rewards(pool, pairs, timeout=5.0, grader="math-verify"):
    args = SimpleNamespace(verify_timeout=timeout, grader=grader)
    texts = [f"so \\boxed{{{answer}}}." for answer, _ in pairs]
    return common.verify(pool, texts, [gold for _, gold in pairs], args)


def test_right_and_wrong_answers(pool):
    right = [
        ("12", "12"),
        ("012", "12"),
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("(3,\\infty)", "(3, \\infty)"),
        ("x^2+1", "1+x^2"),
        ("\\{1,2,3\\}", "\\{3,2,1\\}"),
        ("\\text{Monday}", "Monday"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("10^{\\circ}", "10"),
    ]
    wrong = [
        ("13", "12"),
        ("-12", "12"),
        ("\\frac{1}{3}", "\\frac{1}{2}"),
        ("", "12"),
        ("(3,\\infty)", "[3,\\infty)"),
        ("x^2-1", "x^2+1"),
        ("import os", "0"),
        ("{}{0}%s\x00", "7"),
        ("9" * 2000, "9"),
    ]
    assert rewards(pool, right) == ([1.0] * len(right), 0, 0)
    assert rewards(pool, wrong)[0] == [0.0] * len(wrong)


def test_only_the_last_closed_box_counts(pool):
    args = SimpleNamespace(verify_timeout=5.0, grader="math-verify")
    texts = ["5", "\\boxed{4} \\boxed{5}", "\\boxed{5} \\boxed{4}", "\\boxed{5} \\boxed{4"]
    assert common.verify(pool, texts, ["5"] * 4, args)[0] == [0.0, 1.0, 0.0, 1.0]


def test_boxed_string_is_exact(pool):
    pairs = [("0.5", "\\frac{1}{2}"), ("05", "5"), ("5", "5")]
    assert rewards(pool, pairs, grader="boxed-string")[0] == [0.0, 0.0, 1.0]


def test_answers_that_never_end_are_cut_off(pool):
    """Each scores 0 by its deadline, is counted, and the pool serves the next answers."""
    endless = [("9^{9^{9^{9}}}", "1"), ("(10^{8})!", "1"), ("2^{10^{12}}+1", "3")]
    start = time.perf_counter()
    got, timeouts, errors = rewards(pool, endless, timeout=1.0)
    assert got == [0.0] * 3 and time.perf_counter() - start < 15
    assert timeouts + errors > 0
    assert rewards(pool, [("\\frac{2}{4}", "\\frac{1}{2}")] * 3) == ([1.0] * 3, 0, 0)


def test_throughput(pool):
    """Not a benchmark: a pool that were started anew for each answer would need minutes."""
    pairs = [(f"\\frac{{{i}}}{{7}}", f"{i}/7") for i in range(1, 200)]
    start = time.perf_counter()
    assert rewards(pool, pairs)[0] == [1.0] * 199
    assert time.perf_counter() - start < 30
