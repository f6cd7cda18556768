"""The flags of a program, read from the source of its class Args.

Each flag is described in one place. The string below it is its meaning in --help and docs/flags.md.
The comment above its section says whether --resume may change it. Such a flag decides how a run is
computed, not what it computes, so plot.py treats runs that differ only in it as one method.
"""

import ast
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAY_CHANGE = "(--resume may change these)"  # the end of a section's comment


def read_flags(source: str) -> list[tuple[str, str, str, str]]:
    """(section, field, type, meaning) of each field of the class Args in a program's source.

    The comment above its first field names a section; the string below a field is its meaning.
    """
    body = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args").body
    lines, section, flags = source.splitlines(), "Run", []
    for field, doc in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign):
            above = lines[field.lineno - 2].strip()
            section = above.removeprefix("# ") if above.startswith("# ") else section
            kind = ast.unparse(field.annotation).replace("...", "str ...")
            kind = kind.replace(", ", " ").removeprefix("tuple[").removesuffix("]")
            if kind.startswith("Literal"):
                kind = "|".join(choice.value for choice in field.annotation.slice.elts)
            meaning = " ".join(doc.value.value.split())
            flags.append((section, field.target.id, kind, meaning))
    return flags


def changeable(script: str) -> set[str]:
    """The fields that --resume may change in `script`; grpo_baseline's if there is no such file."""
    path = HERE / f"{script}.py"
    source = (path if path.is_file() else HERE / "grpo_baseline.py").read_text()
    return {field for section, field, *_ in read_flags(source) if section.endswith(MAY_CHANGE)}


def unwritable(file: Path) -> str:
    """Why the file that a flag names cannot be written, or ""; makes the folders above it.

    Programs ask before they compute, as their result would be lost.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        open(file, "ab").close()  # tried, as permissions do not say it: root has all of them
        if new:
            file.unlink()
    except FileExistsError:
        return f"{file.parent} is a file"
    except OSError as error:
        return f"{error.strerror} ({error.filename})"
    return ""
