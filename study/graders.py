r"""Compare graders on equal forms and near misses of MATH's reference answers.

    python study/graders.py

The table has, for each grader and each set of cases, the fraction of equal forms that it rejects,
the fraction of near misses that it accepts, and the CPU time per answer, in one process.
docs/evaluation.md quotes it.
"""

import json
import logging
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import grading_forms  # noqa: E402
import tyro  # noqa: E402
from latex2sympy2_extended import NormalizationConfig  # noqa: E402
from math_verify import LatexExtractionConfig, parse, verify  # noqa: E402

import answers  # noqa: E402
import grading  # noqa: E402

SECONDS = 5.0


def math_verify_alone(answer: str, gold: str) -> bool:
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    gold, answer = (
        parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None)
        for text in (gold, answer)
    )
    return bool(gold and answer) and verify(gold, answer, timeout_seconds=None)


def trl(answer: str, gold: str) -> bool:
    """The settings of TRL's and open-r1's accuracy reward."""
    settings = NormalizationConfig(
        nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True
    )
    config = LatexExtractionConfig(
        boxed_match_priority=0, normalization_config=settings, try_extract_without_anchor=False
    )
    gold = parse(f"${gold}$", extraction_mode="first_match", parsing_timeout=None)
    answer = parse(
        f"\\boxed{{{answer}}}",
        extraction_config=[config],
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return bool(gold and answer) and verify(gold, answer, timeout_seconds=None)


def authors_strings(answer: str, gold: str) -> bool:
    return answers.bare_string(answer) == answers.bare_string(gold)


GRADERS = {
    "this project": grading.math_verify_equal,
    "math-verify alone": math_verify_alone,
    "TRL's call": trl,
    "`--grader boxed-string`": authors_strings,
}


class OutOfTime(BaseException):
    """Raised after SECONDS; an `except Exception` in a grader does not catch it."""


def out_of_time(*_):
    raise OutOfTime


def accept(grader, cases: list[tuple[str, str]]) -> tuple[int, float]:
    """The number of accepted (reference answer, answer) cases, and the CPU seconds of all cases."""
    accepted, start = 0, time.process_time()
    for gold, answer in cases:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            accepted += bool(grader(answer, gold))
        except (Exception, OutOfTime):
            pass
        signal.setitimer(signal.ITIMER_PROF, 0)
    return accepted, time.process_time() - start


def sets() -> dict[str, tuple[list, list]]:
    """{name: (equal forms, near misses)}; a case is (reference answer, answer)."""
    given = [
        [
            (row["gold"], row["answer"])
            for row in map(json.loads, (grading_forms.DATA / f"{name}.jsonl").open())
        ]
        for name in ("grading_equal", "grading_wrong")
    ]
    result = {"tests/data": tuple(given)}
    for name, wanted in (("further kinds", False), ("further kinds, held out", True)):
        result[name] = tuple(
            [
                (g, a)
                for kind, g, a in grading_forms.cases(t)
                if grading_forms.held_out(kind) == wanted
            ]
            for t in (grading_forms.EQUAL, grading_forms.WRONG)
        )
    for name, pair in (
        ("fractions", (r"\frac{{{0}}}{{7}}", "{0}/7")),
        ("sums", (r"{0}\sqrt{{3}}+x^2", r"x^2+{0}\sqrt{{3}}")),
    ):
        right = [tuple(side.format(i) for side in pair) for i in range(1, 101)]
        result[name] = right, [(gold, answer) for (gold, _), (_, answer) in zip(right, right[1:])]
    return result


def main() -> None:
    """Print the table of graders."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, out_of_time)
    print("| cases | grader | equal forms rejected | near misses accepted | CPU time per answer |")
    print("|---|---|---|---|---|")
    for name, (equal, wrong) in sets().items():
        for title, grader in GRADERS.items():
            accept(grader, equal[::50])  # the parser builds its tables
            (met, first), (missed, second) = accept(grader, equal), accept(grader, wrong)
            rejected, count = len(equal) - met, len(equal) + len(wrong)
            line = f"| {name} | {title} | {rejected} of {len(equal)} ({rejected / len(equal):.1%})"
            line += f" | {missed} of {len(wrong)} ({missed / len(wrong):.1%})"
            print(f"{line} | {1000 * (first + second) / count:.1f} ms |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
