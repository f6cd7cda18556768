"""Measure the grader on reference answers, ordinary answers and hostile answers.

    python study/verify.py FILE.parquet ...      prints one JSON line

The files have problems with reference answers, in verl's format. The program counts how many
reference answers equal a usual form of themselves, as a training run checks at its start.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_grading import hostile  # noqa: E402

import grading  # noqa: E402


def measure_references(verifier, file: Path) -> dict:
    rows = pyarrow.parquet.read_table(file, columns=["reward_model"]).to_pylist()
    references = [row["reward_model"]["ground_truth"] or "" for row in rows]
    start = time.perf_counter()
    bad = grading.bad_references(verifier, references, SimpleNamespace(grader="math-verify"))
    seconds = time.perf_counter() - start
    found = {"references": len(references), "met": len(references) - len(bad)}
    found["empty"] = sum(not reference.strip() for reference in references)
    found["not_met"] = sorted({references[i] for i in bad if references[i].strip()})
    return found | {"seconds_per_1000": round(1000 * seconds / len(references), 2)}


def measure_answers(verifier, pairs: list[tuple[str, str]], timeout: float) -> dict:
    grading.TIMEOUT, args = timeout, SimpleNamespace(grader="math-verify")
    texts, references = [f"\\boxed{{{answer}}}" for answer, _ in pairs], [r for _, r in pairs]
    start = time.perf_counter()
    rewards, timeouts, errors = grading.verify(verifier, texts, references, args)
    seconds = time.perf_counter() - start
    found = {"answers": len(pairs), "correct": int(sum(rewards)), "timeouts": timeouts}
    return found | {"errors": errors, "answers_per_second": round(len(pairs) / seconds)}


def main(files: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Measure the grader on the reference answers in `files`, and on ordinary and hostile ones."""
    if missing := [str(file) for file in files if not file.is_file()]:
        sys.exit(f"error: there is no file {missing[0]}")
    verifier = grading.start_verifier()
    found = {file.stem: measure_references(verifier, file) for file in files}
    result = {"cores": len(os.sched_getaffinity(0)), "references": found}
    ordinary = [(f"\\frac{{{i}}}{{{i % 9 + 2}}}", f"{i}/{i % 9 + 2}") for i in range(1, 1001)]
    ordinary += [(f"{i}\\sqrt{{3}}+x^2", f"x^2+{i}\\sqrt{{3}}") for i in range(1000)]
    result["ordinary"] = measure_answers(verifier, ordinary, timeout=5.0)
    with tempfile.TemporaryDirectory() as folder:
        answers = [(answer, "-77777") for answer in hostile(Path(folder) / "touched")]
        result["hostile"] = measure_answers(verifier, answers, timeout=1.0)
        result["hostile"]["executed"] = (Path(folder) / "touched").exists()
    verifier.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
