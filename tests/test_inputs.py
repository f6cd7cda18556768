"""Data sets as users have them: read right, or refused in one line. No engine is needed."""

import json
import re
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

import grading
import inputs
from docs import generate

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n1+1\n"
    '\nRemember to put your answer on its own line after "Answer:".'
)
BOX = "Please reason step by step, and put your final answer within \\boxed{}."


def user(text) -> dict:
    return {"role": "user", "content": text}


def write(file, rows):
    """Rows as .jsonl (each a dict, or a line as it is) or .parquet."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(file)


def load(file, rows=None, split="train") -> list:
    """(problem, answer) of what is loaded."""
    name = str(file) if rows is None else write(file, rows)
    return [(p["problem"], p["answer"]) for p in inputs.load_problems(name, split)]


def refusal(capsys, name) -> str:
    """The one line with which a data set is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        inputs.load_problems(str(name), "train")
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and len(lines[0]) < 400, lines
    assert lines[0].startswith(f"error: data set {name}"), lines
    return lines[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_placeholders_and_repeats_are_counted(tmp_path, capsys, kind):
    answers = [
        "proof",
        "notfound",
        "proof ",
        "N/A",
        "None",
        "nan",
        "",
        "5",
        "None of these",
        "proof of x",
    ]
    rows = [{"problem": f"p{i}", "answer": answer} for i, answer in enumerate(answers)]
    rows += [{"problem": "p7", "answer": "5"}, {"problem": "p7", "answer": "6"}]
    assert load(tmp_path / f"numina.{kind}", rows) == [
        ("p7", "5"), ("p8", "None of these"), ("p9", "proof of x"),
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "1 rows without a problem or an answer are left out" in lines[0]
    assert (
        "6 rows are left out, as their answer is only a placeholder" in lines[1]
        and "'proof' 2" in lines[1]
    )
    assert "2 rows repeat an earlier problem: left out; 1 of them have another answer" in lines[2]
    assert refusal(capsys, write(tmp_path / f"all.{kind}", rows[:3]))


def test_numbers_and_dates_stay_as_written(tmp_path):
    written = f"{2**100} {2**53 + 1} 0.5 0.10 1e5 -0 123456789012345678901.5 1.0".split()
    lines = [f'{{"problem": "p{x}", "answer": {x}}}' for x in written]
    dates = ["2024-01-01", "2024-01-01T10:00:00", "12:30", "007"]
    rows = [{"problem": "p" + x, "answer": x} for x in dates]
    found = load(tmp_path / "numbers.jsonl", [*lines, *rows])
    assert found == [("p" + x, x) for x in written + dates]
    # Also in a folder, in a list, and beside what is no number
    mixed = ['{"problem": "a", "answer": [18014398509481985, 0.5]}', *lines]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", mixed)
    assert load(tmp_path / "folder")[:2] == [
        ("a", '["18014398509481985", "0.5"]'), ("p" + written[0], written[0]),
    ]  # fmt: skip


def test_lines_end_at_line_feeds_only(tmp_path):
    """BOM, CRLF, blank lines, and U+2028 and its like inside of a string."""
    odd = "a\u2028b\u2029c\u0085d\x1ce"
    text = "\ufeff" + "\r\n".join(
        ['{"problem": "x", "answer": "1"}', "", "  ", json.dumps({"problem": odd, "answer": "2"})]
    )
    raw = '{"problem": "a\u2028b\u0085c", "answer": "3"}'
    (tmp_path / "lines.jsonl").write_bytes((text + "\r\n\n" + raw).encode())
    found = load(tmp_path / "lines.jsonl")
    assert found == [("x", "1"), (odd, "2"), ("a\u2028b\u0085c", "3")]


GOOD = b'{"problem": "x", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD * 2 + b'{"problem": "x", "ans', "line 3 is not one JSON object"),
        ("a.jsonl", GOOD + b"{'problem': 'x'}\n", "line 2 is not one JSON object"),
        ("a.jsonl", GOOD + b"[1, 2]\n", "line 2 is not one JSON object"),
        ("a.jsonl", GOOD + b"7\n", "line 2 is not one JSON object"),
        ("a.jsonl", b'{\n  "problem": "x"\n}\n', "line 1 is not one JSON object"),
        ("a.jsonl", GOOD + b"[" * 100000, "line 2 is not one JSON object"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1 is not UTF-8 text"),
        ("a.jsonl", GOOD.decode().encode("utf-16-le"), "line 1 is not UTF-8 text"),
        ("a.jsonl", GOOD + "{é}".encode("latin-1"), "line 2 is not UTF-8 text"),
        ("a.jsonl", bytes(range(256)), "line 1 is not UTF-8 text"),
        ("a.jsonl", b"\x1f\x8b\x08\x00zipped", "line 1 is not UTF-8 text"),
        ("a.jsonl", b"", "cannot be loaded: it has no rows"),
        ("a.jsonl", b"\n \n", "cannot be loaded: it has no rows"),
        ("a.jsonl", b"{}\n", "no row has a problem"),
        ("a.jsonl", b'{"text": "1+1", "label": "2"}\n', "the columns are text, label"),
        ("a.parquet", b"", "cannot be loaded"),
        ("a.parquet", GOOD, "cannot be loaded"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be loaded"),
        ("a.csv", b"problem,answer\n1,2\n", "only .parquet and .jsonl files are read"),
        ("a.json", b"[]", "only .parquet and .jsonl files are read"),
        ("problems", GOOD, "only .parquet and .jsonl files are read"),
        ("a.jsonl", None, "there is no such file or folder"),
        ("a.csv", None, "there is no such file or folder"),
        ("no/such", None, "there is no such file or folder"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refusal(capsys, tmp_path / name)


CHAT = [user("1+1"), {"role": "assistant", "content": "It is \\boxed{2}."}]
SHAREGPT = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "1+1"},
    {"from": "gpt", "value": "so \\boxed{2}"},
]
PARTS = [user([{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}])]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "problem", "answer"),
    [
        ({"messages": CHAT}, [user("1+1")], "2"),
        ({"messages": CHAT, "answer": "two"}, [user("1+1")], "two"),
        ({"prompt": CHAT, "answer": "2"}, [user("1+1")], "2"),
        ({"prompt": json.dumps(CHAT[:1]), "answer": "2"}, [user("1+1")], "2"),
        ({"messages": [*CHAT, *CHAT]}, [*CHAT, user("1+1")], "2"),
        ({"messages": [CHAT[0], user("x\n#### 3") | {"role": "assistant"}]}, [CHAT[0]], "3"),
        ({"conversations": SHAREGPT}, [user("be brief") | {"role": "system"}, user("1+1")], "2"),
        ({"prompt": PARTS, "answer": "2"}, [user("1+1")], "2"),
        ({"prompt": CHAT[:1], "reward_model": '{"ground_truth": "2"}'}, CHAT[:1], "2"),
        ({"prompt": CHAT[:1], "reward_model": '{"ground_truth": 0.10}'}, CHAT[:1], "0.10"),
        ({"prompt": "a", "reward_model": {"style": "rule", "ground_truth": ["2"]}}, "a", "2"),
        ({"prompt": "a", "answer": "2", "reward_model": "a name"}, "a", "2"),
        ({"problem": "a", "answer": ["1/2", "0.5"]}, "a", '["1/2", "0.5"]'),
        ({"problem": "a", "answer": ["7", None, "N/A"]}, "a", "7"),
        ({"problem": "a", "final_answer": ["2", "5"], "answer": None}, "a", "2, 5"),
        ({"problem": "a", "answer": None, "solution": "\\boxed{3}"}, "a", "3"),
        ({"problem": "a", "answer": 7}, "a", "7"),
        ({"problem": "a", "answer": 0}, "a", "0"),
        ({"problem": "a", "answer": 0.5}, "a", "0.5"),
        ({"problem": "a", "answer": True}, "a", "True"),
        ({"Problem": "a", "Answer": 7}, "a", "7"),
        ({"body": "Seven and two.", "question": "How many?", "answer": "9 (apples)"},
         "Seven and two. How many?", "9"),
        ({"body": "", "question": "How many?", "answer": "2 (weeks); 3 (days)"},
         "How many?", "2, 3"),
        ({"Body": "B", "Question": "Who?", "Answer": "Ann"}, "B Who?", "Ann"),
        ({"question": "f(9)?", "answer": "9 (apples)"}, "f(9)?", "9 (apples)"),
    ],
)  # fmt: skip
def test_columns_that_are_read(tmp_path, kind, row, problem, answer):
    assert load(tmp_path / f"a.{kind}", [row]) == [(problem, answer)]


NOT_TEXT = [user([{"type": "image_url", "image_url": "x"}])]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"problem": "b", "answer": {"value": "2"}}, "answer"),
        ({"problem": "b", "answer": [["2"], ["3"]]}, "answer"),
        ({"problem": "b", "answer": [{"value": "2"}]}, "answer"),
        ({"problem": {"text": "b"}, "answer": "2"}, "problem"),
        ({"problem": ["b"], "answer": "2"}, "problem"),
        ({"prompt": "b", "reward_model": "rule"}, "reward_model"),
        (
            {"prompt": "b", "reward_model": {"ground_truth": {"x": "2"}}},
            "reward_model.ground_truth",
        ),
        ({"prompt": NOT_TEXT, "answer": "2"}, "prompt"),
        ({"prompt": [user(None)], "answer": "2"}, "prompt"),
        ({"prompt": [{"text": "b"}], "answer": "2"}, "prompt"),
        ({"prompt": [user("b") | {"role": "tool"}], "answer": "2"}, "prompt"),
        ({"messages": CHAT[1:], "answer": "2"}, "messages"),
    ],
)
def test_columns_that_are_refused(tmp_path, capsys, kind, row, column):
    """With row and column, also where the rows before are fine (mixed types in a column)."""
    name = tmp_path / f"a.{kind}"
    write(name, [row])
    assert f"row 0, column {column}: " in refusal(capsys, name)
    if kind == "jsonl":
        fine = {key: "2" for key in row if key != "reward_model"} | {"problem": "a", "answer": 5}
        write(name, [fine, {"problem": "c", "answer": ["6"]}, row])
        assert f"row 2, column {column}: " in refusal(capsys, name)


def test_half_a_character(tmp_path, capsys):
    """json reads "\\ud800", which no tokenizer does."""
    for line, column in (
        ('{"problem": "\\ud800", "answer": "1"}', "problem"),
        ('{"problem": "a", "answer": "\\udfff"}', "answer"),
        ('{"prompt": [{"role": "user", "content": "\\ud800"}], "answer": "1"}', "prompt"),
    ):
        name = write(tmp_path / "a.jsonl", [line])
        assert f"row 0, column {column}: the text has half a character" in refusal(capsys, name)


def test_the_home_folder(tmp_path, monkeypatch, capsys):
    """A ~ that the shell has left, as in --dataset=~/a.jsonl."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2"}])
    assert load("~/a.jsonl") == [("1+1", "2")]
    assert "there is no such file or folder" in refusal(capsys, "~/b.jsonl")


def test_folders(tmp_path, capsys):
    """Shards without a split in their names, those with one, and what is no data set."""
    rows = [{"problem": f"p{i}", "answer": str(i)} for i in range(4)]
    wanted = [(row["problem"], row["answer"]) for row in rows]
    shards, split, other = (tmp_path / name for name in ("shards.parquet", "split", "other"))
    for folder in (shards, split / "data", other):
        folder.mkdir(parents=True)
    write(shards / "part-0.snappy.parquet", rows[:3])
    write(shards / "part-1.snappy.parquet", rows[3:])
    (shards / "_SUCCESS").touch()
    assert load(shards) == wanted and load(shards, split="test") == wanted
    write(split / "data" / "train-00000-of-00001.parquet", rows[:3])
    assert load(split) == wanted[:3]
    with pytest.raises(SystemExit):
        load(split, split="test")
    assert "test" in capsys.readouterr().err
    write(split / "data" / "test-00000-of-00001.parquet", rows[3:])
    assert load(split, split="test") == wanted[3:]
    refusal(capsys, other)  # empty
    (other / "picture.bin").write_bytes(bytes(range(256)))
    refusal(capsys, other)
    (other / "notes.txt").write_text("hello\n")
    refusal(capsys, other)


def warnings_of(capsys, problems, system_prompt="") -> list[str]:
    args = SimpleNamespace(system_prompt=system_prompt)
    args.grader = "math-verify"
    found = [{"problem": p, "answer": "1", "id": i} for i, p in enumerate(problems)]
    assert inputs.check_references("x", found, None, args) == found
    return capsys.readouterr().out.splitlines()


def test_prompts_that_ask_for_another_form(one_rank, capsys):
    """DAPO's, GSM8K's, R1-Zero's: one line a data set, and what the system prompt asks for."""
    [line] = warnings_of(capsys, [[user(DAPO)]] * 9 + ["1+1"])
    assert "9 of 10 prompts of x ask for the answer after 'Answer:'" in line
    assert "ask for no box" in line and "docs/forking.md" in line
    [line] = warnings_of(capsys, [DAPO], BOX)
    assert "They ask for a box as well" in line
    gsm8k = '1+1 Let\'s think step by step and output the final answer after "####".'
    [line] = warnings_of(capsys, [gsm8k])
    assert "after '####'" in line
    zero = [{"role": "system", "content": "Put it in <answer> </answer> tags."}, user("1+1")]
    [line] = warnings_of(capsys, [zero])
    assert "in <answer> tags" in line
    assert not warnings_of(capsys, [zero], BOX)  # the run's system prompt takes its place
    assert not warnings_of(capsys, [DAPO] + ["1+1"] * 10)
    plain = ["1+1", "Question: 1+1\nAnswer:", "Is the answer: yes?", f"1+1\n{BOX}"]
    assert not warnings_of(capsys, plain)


def test_the_documented_way_to_accept_it():
    """The lines of docs/forking.md, on four responses."""
    page = (generate.ROOT / "docs" / "forking.md").read_text()
    diff = next(d for d in re.findall(r"```diff\n(.*?)```", page, re.S) if "Answer:" in d)
    code = "\n".join(line[9:] for line in diff.splitlines() if line[0] == "+")
    texts = ["so\nAnswer: 12", "12", "\\boxed{12}\nAnswer: 13", "Answer: 12"]
    samples = [{"text": text, "index": 0, "reward": 0.0, "truncated": False} for text in texts]
    samples[2]["reward"], samples[3]["truncated"] = 1.0, True
    args = SimpleNamespace(grader="math-verify")
    exec(
        code,
        {
            "samples": samples,
            "references": ["12"],
            "grading": grading,
            "args": args,
            "verifier": None,
        },
    )
    assert [s["reward"] for s in samples] == [1.0, 0.0, 1.0, 0.0]
