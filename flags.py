"""The flags of a program, read from the source of its class Args.

All about a flag stands in one place. The string below it is its meaning in --help and in
docs/flags.md. The comment above its section says whether --resume may change it. Such a flag
decides how a run is computed, not what it computes, so plot.py takes runs that differ in it for one
method.
"""

import ast
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAY_CHANGE = "(--resume may change these)"  # the end of a section's comment


def read_flags(source: str) -> list[tuple[str, str, str, str]]:
    """Section, field, type and meaning of each field of the class Args in a program's source.

    A section is named by the comment above its first field, a meaning is the string below a field.
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
    """Fields that --resume may change, of a script's name; of grpo_baseline if it is not here."""
    path = HERE / f"{script}.py"
    source = (path if path.is_file() else HERE / "grpo_baseline.py").read_text()
    return {field for section, field, *_ in read_flags(source) if section.endswith(MAY_CHANGE)}
