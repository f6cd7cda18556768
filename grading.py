r"""Is an answer correct? The last \boxed{} of a response against the reference answer.

To verify a response is to give it its reward. The grader (--grader) is the rule that decides. The
verifier is a pool of worker processes that run it: algebra on hostile answers may hang, take all
memory or crash, and this must not affect the run. A worker that takes too long is killed and
replaced, and the answer gets reward 0.
"""

import multiprocessing
import os
import re
import resource
import signal
from pathlib import Path

import answers

BOXES = re.compile(
    r"\\(?:boxed|fbox)\s{0,9}(?:\{|(?P<word>(?<=\s)[^\s{}$]+|[0-9][^\s{}$]*))|"
    r"\\\\(?=[{}])|\\[{}]|\{|\}"
)
INTEGER = re.compile(r"-?[0-9]{1,15}")
MEMORY = 1 << 30  # bytes a worker may take for an answer
TIMEOUT = 5.0  # CPU seconds that verifying one answer may take; after that it scores 0
WAIT = 20  # seconds, and times TIMEOUT: when a worker that got no CPU time is given up
LONGEST = 1000  # characters; no answer is longer, and parsing time grows fast
PROSE = re.compile(r"\b[A-Za-z]{2,} (?=[A-Za-z])")  # a word before another one
MOST_PROSE = 10  # such words of a reference answer; MATH's have up to 2, worked solutions more


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed, non-empty \boxed{}; "" if all are empty, None without a box.

    \fbox counts as well, and \boxed without braces takes the next word.

    >>> last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}"), last_boxed(r"\boxed{1")
    ('\\frac{1}{2}', None)
    >>> last_boxed(r"\boxed 5."), last_boxed(r"\boxed {5} \boxed{}")
    ('5', '5')
    >>> last_boxed(r"\boxed{4} \boxed{\left\{ x \right.}")
    '\\left\\{ x \\right.'
    """
    found, opened = None, []  # opened: where each open brace's content starts, or None
    for match in BOXES.finditer(text):
        if match["word"]:
            word = match["word"].rstrip(".,;:")
            found = (match.start("word"), match.start("word") + len(word)) if word else found
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None and text[start : match.start()].strip():
                found = max(found or (0, 0), (start, match.start()))
            elif start is not None:
                found = found or (start, start)
        elif match[0][-1] == "{" and match[0] != "\\{":
            opened.append(match.end() if len(match[0]) > 1 else None)
    return text[found[0] : found[1]].strip() if found else None


def start_worker() -> None:
    """In a new worker: allow MEMORY bytes more than it has now, and discard what it prints."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # verify_answer's timer: it ends the process
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def start_verifier():
    """Start the verifier, a pool of processes; one that takes too long is killed and replaced."""
    from pebble import ProcessPool

    import workarounds  # not by the workers, which need no torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // local))
    # Forked from a clean server: never from this process with its engine and threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grading", "algebra"])
    workarounds.workers_import("grading")
    verifier = ProcessPool(max_workers=workers, context=context, initializer=start_worker)
    verifier.schedule(math_verify_equal, args=("x", "x+1")).result()
    return verifier


def verify_answer(answer: str, reference: str, seconds: float) -> bool:
    """math_verify_equal() with a limit of CPU `seconds`, at which the kernel kills this worker.

    CPU time, so that the reward does not depend on what else the machine does. A signal handler in
    Python would have to wait for the end of a long multiplication.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return math_verify_equal(answer, reference)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def math_verify_equal(answer: str, reference: str) -> bool:
    """Is an answer equal to the reference answer? Both are LaTeX. Runs in a worker.

    answers.py reads the outer shape (list, interval, unit, base, ...). math-verify compares the
    plain expressions inside it (algebra.py).
    """
    from algebra import same_expression

    return answers.equal(answer, reference, same_expression)


def submit(verifier, function, *words: str):
    """A future of function(*words, TIMEOUT) in a worker; TIMEOUT is in CPU seconds."""
    return verifier.schedule(function, args=(*words, TIMEOUT), timeout=WAIT + WAIT * TIMEOUT)


def out_of_time(error: Exception) -> bool:
    """Did the worker's timer end it or, as a last resort, the pool's?"""
    return isinstance(error, TimeoutError) or getattr(error, "exitcode", 0) == -signal.SIGPROF


def verify(verifier, texts: list[str], references: list[str], args) -> tuple[list[float], int, int]:
    r"""Rewards r ∈ {0, 1} of the responses, the number of time-outs and the number of errors.

    Only the content of the last \boxed{} counts. Equal strings and equal integers need no algebra.
    The others go to the verifier, each different pair once.

    Args:
        texts: the responses; references: the reference answer of each.
    """
    pairs = [(last_boxed(text), reference.strip()) for text, reference in zip(texts, references)]
    correct, futures = {}, {}
    for answer, reference in set(pairs):
        if not answer or len(answer) > LONGEST:
            correct[answer, reference] = False
        elif args.grader == "boxed-string":
            wanted = [answers.bare_string(one) for one in answers.references(reference)]
            correct[answer, reference] = answers.bare_string(answer) in wanted
        elif answer == reference:
            correct[answer, reference] = True
        elif INTEGER.fullmatch(answer) and INTEGER.fullmatch(reference):
            correct[answer, reference] = int(answer) == int(reference)
        else:
            futures[answer, reference] = submit(verifier, verify_answer, answer, reference)
    timeouts = errors = 0
    for pair, future in futures.items():
        correct[pair] = False
        try:
            correct[pair] = future.result()
        except Exception as error:
            timeouts += out_of_time(error)
            errors += not out_of_time(error)
    return [float(correct[pair]) for pair in pairs], timeouts, errors


def verify_reference(reference: str, seconds: float) -> bool:
    """Is a usual form of a reference answer equal to it? Runs in a worker, like verify_answer."""
    from algebra import same_value

    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return answers.meets_itself(reference, same_value)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def bad_references(verifier, references: list[str], args) -> list[int]:
    """Indices of the reference answers that the grader cannot use.

    The reference answer is written in a usual form, as a model would write it. If the grader does
    not accept this form, no response can be correct. With --grader boxed-string only empty ones and
    worked solutions are bad.
    """
    futures = {
        reference: submit(verifier, verify_reference, reference)
        for reference in {reference.strip() for reference in references}
        if args.grader == "math-verify" and reference and not INTEGER.fullmatch(reference)
    }
    bad = {""} | {r.strip() for r in references if len(PROSE.findall(r)) > MOST_PROSE}
    for reference, future in futures.items():
        try:
            met = future.result()
        except Exception:
            met = False
        if not met:
            bad.add(reference)
    return [i for i, reference in enumerate(references) if reference.strip() in bad]
