r"""Is an answer right? The last \boxed{} of a response against the gold answer.

Judging runs in worker processes: algebra on hostile answers may hang, eat memory or crash, and none
of this may reach the run. A worker past its deadline is killed and replaced, the answer scores 0.
"""

import logging
import multiprocessing
import os
import re
import resource
import sys
from pathlib import Path

INTEGER = re.compile(r"-?[0-9]{1,15}")
MEMORY = 1 << 30  # bytes a worker may take for an answer
LONGEST = 1000  # characters; no answer is longer, and parsing time grows fast


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close, None if there is none.

    >>> last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}"), last_boxed(r"\boxed{1")
    ('\\frac{1}{2}', None)
    """
    found, opened = None, []  # opened: where each open brace's content starts, or None
    for match in re.finditer(r"\\boxed\{|\{|\}", text):
        if match[0] != "}":
            opened.append(match.end() if match[0] != "{" else None)
        elif opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = start, match.start()
    return text[found[0] : found[1]].strip() if found else None


def start_worker() -> None:
    """Limit the process's memory, counted from what it has at the start, and keep it quiet."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def start_verifier():
    """Processes that judge answers; one that passes its deadline is killed and replaced."""
    from pebble import ProcessPool

    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // local))
    # Forked from a clean server: never from this process with its engine and threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grading", "math_verify"])
    # A worker imports its parent's main module, the script with its torch, unless told another.
    sys.modules["__main__"].__spec__ = sys.modules[__name__].__spec__
    pool = ProcessPool(max_workers=workers, context=context, initializer=start_worker)
    pool.schedule(math_verify_equal, args=("1", "1")).result()
    return pool


def math_verify_equal(answer: str, gold: str) -> bool:
    """Are two LaTeX answers mathematically equal? Runs in a verifier process."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    # No time-outs of its own: they need signals. The pool's deadline is the hard one.
    gold_parsed, answer_parsed = (
        parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None)
        for text in (gold, answer)
    )
    if not gold_parsed or not answer_parsed:
        return False
    return bool(verify(gold_parsed, answer_parsed, timeout_seconds=None))


def verify(pool, texts: list[str], golds: list[str], args) -> tuple[list[float], int, int]:
    r"""Reward r ∈ {0, 1} of each response, with the numbers of time-outs and errors.

    Only the content of the last \boxed{} is judged. Equal strings and equal integers need no
    algebra; the others go to the pool, each distinct pair once.
    """
    pairs = [(last_boxed(text), gold.strip()) for text, gold in zip(texts, golds)]
    verdicts, futures = {}, {}
    for answer, gold in set(pairs):
        if answer is None or len(answer) > LONGEST:
            verdicts[answer, gold] = False
        elif answer == gold or args.grader == "boxed-string":
            verdicts[answer, gold] = answer == gold
        elif INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold):
            verdicts[answer, gold] = int(answer) == int(gold)
        else:
            futures[answer, gold] = pool.schedule(
                math_verify_equal, args=(answer, gold), timeout=args.verify_timeout
            )
    timeouts = errors = 0
    for pair, future in futures.items():
        verdicts[pair] = False
        try:
            verdicts[pair] = future.result()
        except TimeoutError:
            timeouts += 1
        except Exception:
            errors += 1
    return [float(verdicts[pair]) for pair in pairs], timeouts, errors


def bad_golds(pool, golds: list[str], args) -> list[int]:
    """Indices of the gold answers that the grader does not find equal to themselves.

    These are the ones it cannot parse (or not within --verify-timeout). With --grader boxed-string
    only empty ones.
    """
    futures = {
        gold: pool.schedule(math_verify_equal, args=(gold, gold), timeout=args.verify_timeout)
        for gold in {gold.strip() for gold in golds}
        if args.grader == "math-verify" and gold and not INTEGER.fullmatch(gold)
    }
    bad = {""}
    for gold, future in futures.items():
        try:
            equal = future.result()
        except Exception:
            equal = False
        if not equal:
            bad.add(gold)
    return [i for i, gold in enumerate(golds) if gold.strip() in bad]
