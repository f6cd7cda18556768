"""evaluate.py as a user runs it, its figures against their definitions, and a killed evaluation."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch.distributed as dist
import warm
from safetensors.torch import load_file, save_file
from test_scripts import AUTHORS, metrics, run

import common
import evaluate as program
import harness
import inputs
import thoughts
from lab import task

ROOT = Path(__file__).resolve().parents[1]


def command(folder: Path, *flags: str) -> list[str]:
    flags = ["--preset", "lab", "--max-completion-length", "96", *map(str, flags)]
    return [*warm.python(), "evaluate.py", "--output-dir", str(folder), *flags]


def evaluate(folder: Path, *flags: str, code: int = 0) -> str:
    done = subprocess.run(
        command(folder, *flags), cwd=ROOT, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two evaluation sets; the first, first.jsonl, lies beside it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    data = folder.with_name("first.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in task.problems("test")[40:45]))
    flags = ["--num-steps", "3", "--eval-every", "3", "--eval-datasets", str(data), "lab"]
    run("grpo_baseline", folder, *flags)
    return folder


def test_same_numbers_as_in_training(trained, tmp_path):
    """The exported model gives what training's own evaluation gave, on 1 rank and on 2.

    Training samples all sets in one rollout, evaluate.py one after the other.
    """
    sets = ["--datasets", trained.with_name("first.jsonl"), "lab"]
    output = evaluate(tmp_path / "one", "--model", trained / "model", "--num-samples", 2, *sets)
    row, result = metrics(trained)[-1], results(tmp_path / "one")
    for key in "avg@2 pass@2 length truncated boxed thoughts/reflection".split():
        assert row[f"eval/lab/{key}"] == result["lab"][key]
        assert row[f"eval/first/{key}"] == result["first"][key]
    result = result["lab"]
    assert row["eval/first/length"] != result["length"]
    assert row["eval/lab/avg@2"] != metrics(trained)[0]["eval/lab/avg@2"]
    assert result["problems"] == 100 and f"{result['avg@2']:.3f}" in output
    flags = ["--num-processes", 2, "--model", trained / "model", "--num-samples", 2]
    evaluate(tmp_path / "two", *flags)
    assert results(tmp_path / "two")["lab"] == pytest.approx(result)

    table = pyarrow.parquet.read_table(tmp_path / "one" / "completions.parquet").to_pylist()
    table = [r for r in table if r["dataset"] == "lab"]
    assert len(table) == 200
    assert np.mean([r["reward"] for r in table]) == pytest.approx(result["avg@2"])
    assert {(r["problem"], r["sample"]) for r in table} == set(
        itertools.product(range(100), (0, 1))
    )


def test_weights_that_do_not_arrive(trained, tmp_path):
    """A matrix that is not sent: nothing is evaluated with what the engine had instead."""
    weights = "common.read_weights(path, config)"
    sent = f"(w for w in {weights} if w[0] != 'model.layers.1.mlp.up_proj.weight')"
    text = (ROOT / "evaluate.py").read_text()
    assert text.count(weights) == 1
    (tmp_path / "evaluate.py").write_text(text.replace(weights, sent))
    words = command(tmp_path / "out", "--model", trained / "model", "--num-samples", 1)
    words[words.index("evaluate.py")] = str(tmp_path / "evaluate.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the engine's weights are not the policy's (layers.1)" in done.stdout + done.stderr
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """Killed after a part: what was finished is not generated again, the result is equal.

    Also when it goes on with two engines, whose parts are larger.
    """
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in task.problems("test")[:13]))
    flags = ["--datasets", data, "--num-samples", 256]  # 4 problems in a part
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(tmp_path / "cut", *flags), cwd=ROOT, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        parts = tmp_path / "cut" / "parts"
        deadline = time.monotonic() + 600
        while not list(parts.glob("*.parquet")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {part: part.stat().st_mtime_ns for part in parts.glob("*.parquet")}
    assert 1 <= len(finished) < 4 and not (tmp_path / "cut" / "results.json").exists()

    assert "holds another run" in evaluate(tmp_path / "cut", *flags, code=2)
    refused = evaluate(tmp_path / "cut", *flags, "--resume", "--seed", 2, code=2)
    assert "--seed was 1, is now 2" in refused
    evaluate(tmp_path / "cut", *flags, "--resume", "--num-processes", 2)
    assert len(finished) < len(list(parts.glob("*.parquet"))) < 4
    assert all(part.stat().st_mtime_ns == when for part, when in finished.items())
    evaluate(tmp_path / "whole", *flags)
    assert len(list((tmp_path / "whole" / "parts").glob("*.parquet"))) == 4
    cut, whole = (results(tmp_path / name)["problems"] for name in ("cut", "whole"))
    assert cut == pytest.approx(whole) and cut["problems"] == 13


@pytest.fixture
def group_of_one(tmp_path):
    """Without RANK in the environment, which the commands of other tests would inherit."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parts(group_of_one, tmp_path, monkeypatch):
    """Rows by problem and sample; what is left, of each set; none that was cut in writing."""
    problems = [{"id": i, "prompt_ids": [i], "answer": str(i)} for i in (3, 7)]
    samples = [
        {"index": i, "text": f"text {i}", "reward": 0.0, "length": 4, "truncated": False}
        for i in (2, 0, 3, 1)
    ]
    tokenizer = types.SimpleNamespace(decode=lambda ids: f"prompt {ids[0]}")
    program.save_part(tmp_path / "a.parquet", "a", problems, samples, 2, tokenizer)
    rows = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    keys = ("dataset", "problem", "sample", "prompt", "answer", "response")
    assert sorted(tuple(row[key] for key in keys) for row in rows) == [
        ("a", 3, 0, "prompt 3", "3", "text 0"), ("a", 3, 1, "prompt 3", "3", "text 1"),
        ("a", 7, 0, "prompt 7", "7", "text 2"), ("a", 7, 1, "prompt 7", "7", "text 3"),
    ]  # fmt: skip
    more = [*problems, {"id": 8}]
    assert program.unfinished(tmp_path, "a", more) == [{"id": 8}]
    assert program.unfinished(tmp_path, "b", more) == more

    def full(table, path):
        path.write_bytes(b"PAR1")
        raise OSError("No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(OSError):
        program.save_part(tmp_path / "b.parquet", "b", problems, samples, 2, tokenizer)
    assert program.unfinished(tmp_path, "b", more) == more


def test_repeated_problems_count_once(tmp_path):
    """And a finished evaluation is not continued with other problems or weights of one name."""
    data, model = tmp_path / "twice.jsonl", tmp_path / "model"
    shutil.copytree(ROOT / "lab" / "base", model)
    rows = [{"problem": f"Q {v}#3 A", "answer": "01"} for v in (12, 34, 12, 34, 56)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, flags = tmp_path / "out", ["--datasets", data, "--num-samples", 3, "--model", model]
    evaluate(out, *flags)
    assert results(out)["twice"]["problems"] == 3
    assert set(results(out)["twice"]) >= {"pass@1", "pass@2", "pass@3", "avg@3"}

    kept = (out / "results.json").read_bytes()
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][-1] += 0.01
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    output = evaluate(out, *flags, "--resume", "--num-processes", 2, code=2)
    assert output.count("error: ") == 1 and f"{out}: the model has changed" in output
    data.write_text(data.read_text().replace("01", "02"))
    output = evaluate(out, *flags, "--resume", code=2)
    assert f"the model has changed under the same name; data set {data} has changed" in output
    assert (out / "results.json").read_bytes() == kept


def test_content_of_an_evaluation(group_of_one, tmp_path, capsys):
    """Copies and other times of files are no change; folders without the note go on."""
    base, problem = ROOT / "lab" / "base", {"id": 0, "prompt_ids": [1, 2], "answer": "3"}
    args = program.Args()

    def content_of(folder, **change) -> dict:
        inputs.fix_content(str(folder), {"a": [problem | change]}, args)
        return args.content

    content = content_of(base)
    copy = shutil.copytree(base, tmp_path / "copy", copy_function=shutil.copyfile)
    assert content_of(copy) == content
    before = {"script": "evaluate", **vars(args)}
    (tmp_path / "args.json").write_text(json.dumps(before))
    name, args.model = args.model, "elsewhere"  # the same model, moved
    harness.refuse_changes(tmp_path, "evaluate", args)
    args.model = name
    for change in ({"id": 1}, {"prompt_ids": [1]}, {"answer": "4"}):
        other = content_of(copy, **change)
        assert other.keys() == content.keys() and other["the model"] == content["the model"]
        assert other["data set a"] != content["data set a"]
    with pytest.raises(SystemExit):
        harness.refuse_changes(tmp_path, "evaluate", args)
    assert f"{tmp_path}: data set a has changed under the same name" in capsys.readouterr().err
    del before["content"]  # as in a folder of an earlier version
    (tmp_path / "args.json").write_text(json.dumps(before))
    harness.refuse_changes(tmp_path, "evaluate", args)


def test_rows_as_the_hub_sets_have_them(tmp_path, capsys):
    """The columns of the paper's six benchmarks, of MATH, and of the authors' files."""
    rows = [
        {
            "id": "1",
            "problem": "aime24",
            "solution": "so \\boxed{1}",
            "answer": "033",
            "year": "2024",
        },
        {"id": "2", "problem": "aime25", "answer": "70"},
        {"id": 3, "question": "amc23", "answer": "27.0", "url": "u"},
        {"problem": "math500", "solution": "\\boxed{4}", "answer": "\\frac{1}{2}", "subject": "s"},
        {"question": "minerva", "answer": "4.5e33"},
        {"question": "olympiad", "solution": ["long", "text"], "final_answer": ["2", "5"]},
        {"problem": "math", "level": "5", "solution": "thus \\boxed{4} or \\boxed{\\sqrt{2}}."},
        {"prompt": [{"role": "user", "content": "authors"}], "reward_model": {"ground_truth": "9"}},
        {"question": "gsm8k", "answer": "She has 7 * 8 = <<7*8=56>>56.\n#### 56"},
        {"question": "deepmath", "final_answer": "12", "solution": "\\boxed{3}"},
        {"problem": "nought", "answer": 0},
        {"problem": "no answer", "answer": ""},
    ]
    golds = []
    for i, row in enumerate(rows[:-1]):
        data = tmp_path / f"{i}.jsonl"
        data.write_text(json.dumps(row) + "\n")
        golds += [p["answer"] for p in inputs.load_problems(str(data), "test")]
    wanted = "033|70|27.0|\\frac{1}{2}|4.5e33|2, 5|\\sqrt{2}|9|56|12|0".split("|")
    assert golds == wanted
    data.write_text("".join(json.dumps(r) + "\n" for r in (rows[1], rows[-1])))
    assert len(inputs.load_problems(str(data), "test")) == 1
    assert "1 rows without a problem or an answer are left out" in capsys.readouterr().out


def test_a_subset_of_a_set(tmp_path):
    """OWNER/NAME:SUBSET, on a folder laid out as a set on the hub is."""
    files = {"main": "1+1", "hard": "2+2"}
    card = "---\nconfigs:\n"
    for name, problem in files.items():
        card += f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.jsonl\n"
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": problem, "answer": "x"}))
    (tmp_path / "README.md").write_text(card + "---\n")
    for name, problem in files.items():
        assert inputs.load_problems(f"{tmp_path}:{name}", "test")[0]["problem"] == problem


@pytest.mark.skipif(not AUTHORS.is_dir(), reason="the authors' parquet files are not here")
def test_authors_sets_are_folded():
    sizes = {"aime_2024": 30, "aime_2025": 30, "amc2023": 40}
    for name, size in sizes.items():
        assert len(inputs.load_problems(str(AUTHORS / f"{name}_20times.parquet"), "test")) == size


def test_summary_against_definitions():
    """pass@m by enumerating every choice of m samples; the standard error by hand."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, (7, 5)) * rng.integers(0, 2, (7, 1))
    texts = ["Wait, no.", "Alternatively, 5.", "7"]
    samples = [
        dict(
            reward=float(r),
            length=3 + i,
            truncated=i % 7 == 0,
            boxed=i % 5 == 0,
            thoughts=thoughts.count(texts[i % 3]),
        )
        for i, r in enumerate(right.flatten())
    ]
    result = common.summarize(samples, 5)
    for m in (1, 2, 4, 5):
        chosen = [any(row[list(c)]) for row in right for c in itertools.combinations(range(5), m)]
        assert result[f"pass@{m}"] == pytest.approx(np.mean(chosen))
    assert result["avg@5"] == pytest.approx(right.mean()) == result["pass@1"]
    p = right.mean(1)
    expected = (sum((p - p.mean()) ** 2) / 6 / 7) ** 0.5
    assert result["standard_error"] == pytest.approx(expected)
    assert result["length"] == pytest.approx(3 + 17) and result["truncated"] == pytest.approx(1 / 7)
    assert result["boxed"] == pytest.approx(1 / 5)
    assert result["thoughts/reflection"] == pytest.approx(12 / 35)
    assert result["thoughts/transition_per_1k_tokens"] == pytest.approx(12000 / (35 * 20))


def test_evaluation_of_two_sets(monkeypatch):
    """Each set's figures are of its own samples and answers; the seed is --seed's alone."""
    seeds = []

    def rollout(engine, problems, k, seed, stop, args):
        seeds.append(seed)
        return [dict(index=i, ids=[5], truncated=False) for i in range(len(problems) * k)]

    def verify(samples, references, tokenizer, verifier, args):
        for s in samples:  # of two samples the first is right if the answer is 1
            reward = float(references[s["index"]] == "1" and s["index"] % 2 == 0)
            s |= dict(reward=reward, length=1, boxed=True, thoughts=thoughts.count(""))

    for function in (rollout, verify):
        monkeypatch.setattr(common, function.__name__, function)
    monkeypatch.setattr(common, "gather", lambda samples: samples)
    args = types.SimpleNamespace(seed=1, eval_num_samples=2)
    sets = {
        name: [{"id": i, "answer": answer} for i, answer in enumerate(answers)]
        for name, answers in {"x/a.jsonl": "1000", "b": "011"}.items()
    }
    first, again = (common.evaluate(None, sets, [2], None, None, args) for _ in range(2))
    args.seed = 2
    common.evaluate(None, sets, [2], None, None, args)
    assert first["eval/a/avg@2"] == 0.125 and first["eval/a/pass@2"] == 0.25
    assert first["eval/b/avg@2"] == pytest.approx(1 / 3) and first == again
    assert first["eval/b/pass@2"] == pytest.approx(2 / 3)
    assert seeds[0] == seeds[1] != seeds[2] and "eval" in seeds[0]


def test_rows_in_any_order(tmp_path):
    """A problem's figures are of its own rows, wherever they stand; each data set is by itself."""
    right = {0: [1, 0, 0], 1: [0, 0, 0], 2: [1, 1, 1]}
    rows = [
        dict(
            dataset=dataset, problem=i, sample=j, response="\\boxed{1}", length=2,
            reward=float(r if dataset == "a" else 1), truncated=False,
        )
        for dataset in ("a", "b") for i in right for j, r in enumerate(right[i])
    ]  # fmt: skip
    rows = rows[::2] + rows[1::2]
    args = types.SimpleNamespace(num_samples=3)
    result = program.results_of(pyarrow.Table.from_pylist(rows), "a", args)
    assert result["avg@3"] == pytest.approx(4 / 9) and result["pass@3"] == pytest.approx(2 / 3)
    assert result["problems"] == 3 and result["boxed"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nosuchmodel", "--model nosuchmodel"),
        ("--datasets nosuch.jsonl", "data set nosuch.jsonl cannot be loaded"),
        ("--num-samples 0", "--num-samples must be positive"),
    ],
)
def test_bad_input(tmp_path, flags, message):
    output = evaluate(tmp_path, *flags.split(), code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], output
