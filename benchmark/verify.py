"""How the grader does: reference answers, ordinary answers a second, hostile answers.

    python benchmark/verify.py FILE.parquet ...      prints one JSON line

Files: problems with reference answers, as training takes them, and checked as at its start: a usual
form of each must meet it.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_grading import hostile  # noqa: E402

import grading  # noqa: E402


def check_references(pool, references: list[str]) -> dict:
    args = SimpleNamespace(grader="math-verify")
    start = time.perf_counter()
    bad = grading.bad_references(pool, references, args)
    seconds = time.perf_counter() - start
    return {
        "references": len(references),
        "met": len(references) - len(bad),
        "empty": sum(not reference.strip() for reference in references),
        "not_met": sorted({references[i] for i in bad if references[i].strip()}),
        "seconds_per_1000": round(1000 * seconds / len(references), 2),
    }


def judge_answers(pool, pairs: list[tuple[str, str]], timeout: float) -> dict:
    args = SimpleNamespace(grader="math-verify")
    grading.TIMEOUT = timeout
    texts = [f"\\boxed{{{answer}}}" for answer, _ in pairs]
    start = time.perf_counter()
    rewards, timeouts, errors = grading.verify(
        pool, texts, [reference for _, reference in pairs], args
    )
    seconds = time.perf_counter() - start
    return {
        "answers": len(pairs),
        "right": int(sum(rewards)),
        "timeouts": timeouts,
        "errors": errors,
        "seconds": round(seconds, 1),
        "answers_per_second": round(len(pairs) / seconds),
    }


def main(files: list[str]) -> None:
    pool = grading.start_verifier()
    result = {"cores": len(os.sched_getaffinity(0)), "references": {}}
    for file in files:
        rows = pyarrow.parquet.read_table(file, columns=["reward_model"]).to_pylist()
        references = [row["reward_model"]["ground_truth"] or "" for row in rows]
        result["references"][Path(file).stem] = check_references(pool, references)
    ordinary = [(f"\\frac{{{i}}}{{{i % 9 + 2}}}", f"{i}/{i % 9 + 2}") for i in range(1, 1001)]
    ordinary += [(f"{i}\\sqrt{{3}}+x^2", f"x^2+{i}\\sqrt{{3}}") for i in range(1000)]
    result["ordinary"] = judge_answers(pool, ordinary, timeout=5.0)
    with tempfile.TemporaryDirectory() as folder:
        answers = hostile(Path(folder) / "touched")
        result["hostile"] = judge_answers(pool, [(a, "-77777") for a in answers], timeout=1.0)
        result["hostile"]["executed"] = (Path(folder) / "touched").exists()
    pool.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
