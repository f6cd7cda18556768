"""math-verify's algebra on two plain expressions. Only the verifier's processes import this.

The import also compares a few pairs: the parser builds its tables on first use, which takes longer
than most answers. The processes are forked from one that has imported this (grading.py).
"""

import logging
from dataclasses import replace
from functools import lru_cache

import sympy
from math_verify import LatexExtractionConfig, parse, verify

import answers

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
CONFIG = LatexExtractionConfig(boxed_match_priority=0)
# Its removal of units takes " b" from "a + b"; answers.py has read the units already.
CONFIG = replace(CONFIG, normalization_config=replace(CONFIG.normalization_config, units=False))


def same_expression(answer: str, gold: str) -> bool:
    """Are two expressions or equations equal, as strings or by math-verify's algebra?

    Args:
        answer, gold: LaTeX; gold is the reference answer.
    """
    return answers.squeeze(answer) == answers.squeeze(gold) or same_value(answer, gold)


def same_value(answer: str, gold: str) -> bool:
    """Like same_expression, but False if either cannot be parsed, even if the strings are equal."""
    first, second = read_expression(answer), read_expression(gold)
    if first is None or second is None or differ(first, second):
        return False
    # No time-outs of its own: they need signals. The worker's timer is the hard one.
    return bool(
        verify(second, first, timeout_seconds=None, float_rounding=30, numeric_precision=30)
    )


@lru_cache(64)  # a reference is compared with several responses
def read_expression(text: str):
    """LaTeX as a sympy object; None if it cannot be parsed.

    Decimals become exact fractions, i is the imaginary unit, and variables are real.
    """
    parsed = parse(f"\\boxed{{{text}}}", extraction_config=[CONFIG], parsing_timeout=None)
    if not parsed or isinstance(parsed[0], str):
        return None
    parsed = parsed[0]
    try:
        names = {s: sympy.Symbol(s.name, real=True) for s in parsed.atoms(sympy.Symbol)}
        names |= {s: sympy.I for s in names if s.name == "i"}
        floats = {f: sympy.Rational(str(f)) for f in parsed.atoms(sympy.Float)}
        return parsed.xreplace(names | floats)
    except Exception:  # a sum over i
        return parsed


def differ(first, second) -> bool:
    """Do two expressions have different values for one choice of their variables?

    math-verify has an absolute tolerance, by which 2^-98 equals 2^-99. It also simplifies before it
    rejects, which takes longer than this.
    """
    if not all(isinstance(e, sympy.Expr) for e in (first, second)):
        return False
    try:
        names = sorted(first.free_symbols | second.free_symbols, key=str)
        values = {name: sympy.Rational(7 + 3 * i, 5) for i, name in enumerate(names)}
        first, second = first.xreplace(values).doit(), second.xreplace(values).doit()
        if first == second:
            return False
        if first.is_Rational and second.is_Rational:
            return True
        size = abs(second.evalf(20))
        return bool(abs((first - second).evalf(20)) > size * sympy.Rational(1, 10**15))
    except Exception:
        return False  # functions without a value


for pair in (
    (r"\sin(x)+\frac{1}{2}", "x^2-i"),
    ("x+y=1", "2y=2-2x"),
    (r"2\sqrt{3}\pi", r"\sqrt{12}\pi"),
):
    same_value(*pair)
