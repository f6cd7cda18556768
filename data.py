"""Data sets: rows of files and of the hub, and the problem and reference answer of a row."""

import json
import re
from pathlib import Path

import grading

# name -> (hub id, split). The only place where hub ids of data sets are written.
HUB_DATASETS = {
    "math": ("DigitalLearningGmbH/MATH-lighteval", "train"),
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", "train"),
    "aime25": ("math-ai/aime25", "test"),
    "amc23": ("math-ai/amc23", "test"),
    "minerva": ("math-ai/minervamath", "test"),
    "olympiadbench": ("math-ai/olympiadbench", "test"),
}

# ----------------------------------------------------------------------------------------- reading

FORMATS = (".parquet", ".jsonl")
OTHERS = (".json", ".csv", ".tsv", ".txt", ".xlsx", ".arrow", ".gz", ".zip", ".zst")


def read_rows(name: str, split: str):
    """Yields the rows of a data set as dicts.

    Args:
        name: lab, arithmetic, a name in HUB_DATASETS, a file, a folder, or a hub id.
        split: "train" or "test".

    Raises:
        ValueError, OSError or an error of a library: the data set cannot be read; str() says why.
    """
    if name.startswith("~"):  # the shell leaves it in --dataset=~/x
        name = str(Path(name).expanduser())
    path, _, subset = name.partition(":")
    if name in ("lab", "arithmetic"):
        from lab import arithmetic, task

        yield from (task if name == "lab" else arithmetic).problems(split)
    elif name in HUB_DATASETS:
        yield from load_hub(*HUB_DATASETS[name])
    elif Path(name).is_file():
        yield from read_file(Path(name))
    elif Path(path).is_dir():
        yield from read_folder(path, subset, split)
    elif name.startswith(("/", ".")) or Path(name).suffix.lower() in FORMATS + OTHERS:
        raise ValueError("there is no such file or folder")
    else:
        yield from load_hub(name, split)


def read_file(file: Path):
    """Yields the rows of a .parquet or .jsonl file.

    Raises:
        ValueError: the file has another format, or is broken.
    """
    kind = file.suffix.lower()
    if kind not in FORMATS:
        raise ValueError("only .parquet and .jsonl files are read: convert it to one of them")
    if kind == ".jsonl":
        yield from read_jsonl(file)
    else:
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()


def read_jsonl(file: Path):
    """Yields the JSON object of each line, with numbers as the text in the file.

    pandas and Arrow would guess one type for a column. Then 2**53 + 1 in a column with 0.5 loses
    its last digit, 0.10 loses its zero, and a date becomes a timestamp.

    Raises:
        ValueError: a line is not UTF-8 text or not one JSON object.
    """
    with open(file, "rb") as lines:  # as bytes: only \n ends a line, and not U+2028 in a string
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                raise ValueError(f"line {number} is not UTF-8 text")
            try:
                row = text and json.loads(
                    text, parse_int=str, parse_float=str, parse_constant=lambda word: None
                )
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not one JSON object: {error}")
            if text and not isinstance(row, dict):
                raise ValueError(f"line {number} is not one JSON object {{...}}")
            if text:
                yield row


def read_folder(folder: str, subset: str, split: str):
    """Yields the rows of a folder that is laid out as a data set of the hub.

    The datasets library finds the files of the split. Files whose names have no split are the whole
    data set.
    """
    import datasets

    builder = datasets.load_dataset_builder(folder, subset or None)
    found = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    named = [Path(file).name for files in found.values() for file in files]
    if list(found) == ["train"] and not any("train" in name.lower() for name in named):
        split = "train"  # shards such as part-0.parquet: they are the whole set
    files = [Path(file) for file in found.get(split, ())]
    if files and all(file.suffix.lower() in FORMATS for file in files):
        for file in files:
            yield from read_file(file)
    else:
        yield from load_hub(f"{folder}:{subset}", split)


def load_hub(name: str, split: str):
    """Yields the rows of a hub id or of a folder; `name` may end in :SUBSET."""
    import datasets

    datasets.disable_progress_bars()
    path, _, subset = name.partition(":")
    yield from datasets.load_dataset(path, subset or None, split=split)


# ----------------------------------------------------------------------- the problem and its answer

PROBLEMS = ("problem", "question", "prompt", "messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # ShareGPT's names, and others
ROLES |= {name: name for name in ("system", "user", "assistant")}

# In the place of an answer: NuminaMath-1.5's words, and what programs write for nothing. A whole
# answer only. "Na" and "unknown" may be answers.
PLACEHOLDERS = {"proof", "notfound", "not found", "not_found", "n/a", "none", "null", "nan", "nil"}
PLACEHOLDERS |= {"<na>", "no answer", "see solution", "see proof", "tbd", "todo", "-", "--", "?"}


def is_placeholder(answer: str) -> bool:
    """Is the answer only a placeholder, such as "proof" or "N/A"?

    >>> [is_placeholder(x) for x in ("proof", " N/A ", "None", "NA", "None of these", "Na", "0")]
    [True, True, True, True, False, False, False]
    """
    return answer.strip().lower() in PLACEHOLDERS or answer.strip() == "NA"


def is_empty(value) -> bool:
    """Is a table's cell empty? NaN is empty, too."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {} or value != value


def read_row(row: dict) -> tuple[str | list[dict] | None, str | None]:
    r"""Problem (text or chat messages) and reference answer of a row; None for a missing one.

    Raises:
        ValueError: a column cannot be read. The message names the column.

    >>> read_row({"Body": "I have 2.", "Question": "And 3?", "Answer": "5 (apples)"})
    ('I have 2. And 3?', '5')
    >>> chat = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": r"\boxed{2}"}]
    >>> read_row({"conversations": chat})
    ([{'role': 'user', 'content': '1+1'}], '2')
    """
    row = {str(column).lower(): value for column, value in row.items()}
    column = next((c for c in PROBLEMS if not is_empty(row.get(c))), None)
    if column is None:
        return None, None
    problem, final = row[column], None
    if isinstance(problem, str):
        problem = read_text(problem, column)
        if problem.lstrip().startswith('[{"') and isinstance(chat := parse(problem), list):
            problem = chat
    if isinstance(problem, list):
        problem, final = read_messages(problem, column)
    if not isinstance(problem, (str, list)):
        raise ValueError(f"column {column}: {describe(problem)} is neither text nor chat messages")
    answer = find_answer(row, final)
    if column == "question" and isinstance(row.get("body"), str):  # ASDiv and SVAMP
        problem = f"{row['body'].strip()} {problem}".strip()
        answer = answer and without_units(answer)
    return problem, answer


def find_answer(row: dict, final: str | None) -> str | None:
    """The reference answer of a row, or None.

    Args:
        final: the assistant's last turn, if the problem is a chat that has one.
    """
    for column in ("final_answer", "answer", "reward_model"):
        value = row.get(column)
        if column == "reward_model" and not is_empty(value):  # verl's column, also as JSON text
            graded = parse(value) if isinstance(value, str) else value
            if not isinstance(graded, dict):
                raise ValueError(f"column reward_model: {describe(value)} is not an object")
            column, value = "reward_model.ground_truth", graded.get("ground_truth")
        if not is_empty(value):
            # After GSM8K's mark, if there is one
            return read_answer(value, column).rpartition("#### ")[2]
    for text, column in ((row.get("solution"), "solution"), (final, "messages")):
        if isinstance(text, str) and (boxed := grading.last_boxed(text)) is not None:
            return read_text(boxed, column)
    return final.rpartition("#### ")[2] if final and "#### " in final else None


def read_answer(value, column: str) -> str:
    """A cell as a reference answer.

    A list gives a JSON list, any member of which is a correct answer: answers.references(). In the
    column final_answer, as in OlympiadBench, the members together are the answer.

    Raises:
        ValueError: the cell is not text, a number or a list of these.
    """
    if isinstance(value, list) and not any(isinstance(one, list) for one in value):
        members = [read_answer(one, column) for one in value if not is_empty(one)]
        members = [one for one in members if not is_placeholder(one)] or members[:1]
        if column == "final_answer" or len(members) < 2:
            return ", ".join(members)
        return json.dumps(members)
    if isinstance(value, (list, dict, bytes, tuple)):
        raise ValueError(
            f"column {column}: {describe(value)} is not text, a number or a list of these"
        )
    return read_text(str(value), column)


def without_units(answer: str) -> str:
    """An answer of ASDiv without its units, which are in parentheses.

    >>> without_units("9 (apples)"), without_units("2 (weeks); 3 (days)"), without_units("No")
    ('9', '2, 3', 'No')
    """
    parts = re.split(r";\s*", answer.strip())
    numbers = [re.fullmatch(r"([-\d.,/]+)\s*\([^()]*\)", part) for part in parts]
    return ", ".join(number[1] for number in numbers) if all(numbers) else answer


def read_messages(turns: list, column: str) -> tuple[list[dict], str | None]:
    """Chat messages up to the user's last one, and the text of the assistant's turn after it.

    Args:
        turns: dicts with role and content, or with from and value (ShareGPT).

    Raises:
        ValueError: a turn cannot be read, or none is the user's.
    """
    messages, final = [], None
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"column {column}: {describe(turn)} is not a message (role, content)")
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise ValueError(f"column {column}: a message has the unknown role {role!r}")
        role = ROLES[role.lower()]
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        if content is None and role == "assistant":  # it only called a tool
            content = ""
        messages.append({"role": role, "content": read_content(content, column)})
    while messages and messages[-1]["role"] == "assistant":
        final = messages.pop()["content"]
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise ValueError(f"column {column}: no message is from the user")
    return messages, final


def read_content(content, column: str) -> str:
    """The text of a message; `content` is a string or a list of parts."""
    if isinstance(content, list):
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise ValueError(f"column {column}: a message has a part that is not text")
            texts.append(text)
        content = "".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"column {column}: a message's content is {describe(content)}, not text")
    return read_text(content, column)


def read_text(text: str, column: str) -> str:
    """The text itself. Raises ValueError if it is not valid Unicode, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column {column}: the text has half a character (a lone surrogate)")
    return text


def parse(text: str):
    """The value of a JSON text, with numbers as text; None if it is not JSON."""
    try:
        return json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None


def describe(value) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
