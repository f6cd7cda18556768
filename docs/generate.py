"""Write the generated parts of the documentation pages, so that they cannot rot.

    python docs/generate.py            # tests/test_docs.py checks that the pages are up to date

A page marks them with comments, which a browser does not show:

    <!-- hunk: TEXT -->        the hunk of the diff from grpo_baseline.py that holds TEXT
    <!-- flags -->             a table of the script's flags
    <!-- metrics -->           a table of metrics.jsonl's keys
    <!-- hardware -->          the table of benchmark/hardware.py
    <!-- methods -->           the equations of METHODS beside the values of docs/one_step.html
    [FILE:1](../FILE#L1)<!-- TEXT -->    a link to the only line of FILE that holds TEXT, or else
                               to the only one that begins with it
"""

import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import flags  # noqa: E402
from benchmark import hardware  # noqa: E402
from lab import page  # noqa: E402

SCRIPTS = ["grpo_baseline", "prerl", "nsr_prerl", "dsrl"]
PAGES = {"grpo.md": "grpo_baseline", **{f"{name}.md": name for name in SCRIPTS[1:]}}
PAGES |= dict.fromkeys(["methods.md", "lecture.md"])
PAGES |= dict.fromkeys(["fidelity.md", "flags.md", "forking.md", "study.md", "usage.md"])
PAGES["../README.md"] = None

# Every key of metrics.jsonl; NAME is an evaluation set's name, k is --eval-num-samples. A key with
# "" is in one row of the table with the next.
METRICS = {
    "step": "1, 2, ...; 0 is the evaluation before training",
    "phase": "`pretrain` in PreRL, NSR-PreRL and DSRL's warm-up, else `rl`",
    "reward/mean": "fraction of the step's responses that are correct",
    "reward/solve_all": "",
    "reward/solve_none": "fraction of groups in which every response, or none, is correct: A = 0",
    "completion/length": "mean tokens of a response, EOS included",
    "completion/truncated": "fraction of responses cut at --max-completion-length",
    "completion/boxed": "fraction of responses with a \\boxed{} answer",
    "policy/entropy": "of π(·\\|x), nats per token, estimated by −log π of the sampled tokens",
    "policy/loss": "the loss, added up over mini-batches; not comparable between methods",
    "policy/grad_norm": "before clipping, of the last mini-batch; null if the loss had no sample",
    "policy/clip_fraction": "fraction of tokens whose ratio left the clip range",
    "policy/counted_samples": "",
    "policy/counted_tokens": "samples in the update's mean, and their response tokens",
    "policy/logprob": "mean log-likelihood of the computed tokens, given x or BOS as in the loss",
    "alignment/cosine_to_grpo": "of the update's gradient with GRPO's on the same samples",
    "sync/logprob_gap": "mean absolute difference of the trainer's and the engine's log-probs; "
    "large if the engine has other weights",
    "thoughts/KIND": "",
    "thoughts/KIND_per_1k_tokens": "thoughts per response, and per 1,000 response tokens: see "
    "evaluation.md",
    "verify/timeouts": "",
    "verify/errors": "answers whose check was cut off, or crashed; they score 0",
    "time/rollout": "",
    "time/verify": "",
    "time/canary": "",
    "time/update": "",
    "time/sync": "",
    "time/step": "seconds in each part of the step, and their sum; canary is the scoring for "
    "sync/logprob_gap and the alignment",
    "throughput/rollout_tokens_per_s": "",
    "throughput/update_tokens_per_s": "response tokens per second of rollout, of update",
    "memory/peak_gib": "largest so far: memory of rank 0's GPU, or its resident set on a CPU",
    "eval/NAME/avg@k": "fraction of correct responses, k per held-out problem",
    "eval/NAME/pass@k": "fraction of problems with a correct one among k",
    "eval/NAME/length": "",
    "eval/NAME/truncated": "",
    "eval/NAME/boxed": "",
    "eval/NAME/thoughts/KIND": "as in training; of thoughts, reflection and transition",
}


# Rows of methods.md: per method the equation and the line of code; None: as in the column before,
# and then the page does not repeat the equation.
# Columns: GRPO, PreRL, NSR-PreRL, DSRL in its step s.
GIVEN_X, GIVEN_BOS = (rf"\log \pi(y_t \mid {c}, y_{{\lt t}})" for c in ("x", r"\mathrm{BOS}"))
LOSS = r"$-\frac{1}{Z} \sum_{i \in \mathcal{D}} A_i \sum_t \log \pi(y_{i,t} \mid c, y_{i,\lt t})$"
STD = r"\frac{r - \mathrm{mean}(r)}{\mathrm{std}(r) + 10^{-6}}"
METHODS = {
    "response": [
        (r"$y \sim \pi(\cdot \mid x)$", "common.rollout("),
        None,
        None,
        None,
    ],
    "reward": [(r"$r \in \lbrace 0, 1 \rbrace$", "common.verify("), None, None, None],
    "advantage": [
        (f"$A = {STD}$", "common.advantages(rewards"),
        (r"$A = r - \mathrm{mean}(r)$", "common.advantages(rewards"),
        None,
        (r"as NSR-PreRL if $s \le S$, else as GRPO", "common.advantages(rewards"),
    ],
    "in the loss": [
        (r"$\mathcal{D}$: all", "in_loss = torch.ones"),
        None,
        (r"$\mathcal{D}$: $A < 0$", "in_loss = A < 0"),
        (r"$\mathcal{D}$: $A < 0$ or $s > S$", "in_loss = (A < 0)"),
    ],
    "likelihood": [
        (f"${GIVEN_X}$", "contexts = prompts"),
        (f"${GIVEN_BOS}$", "contexts = [[bos]] * len(prompts)"),
        None,
        (r"BOS if $s \le S$, else $x$", "contexts = [[bos]] * len(prompts)"),
    ],
    "tokens in the mean": [
        (r"$Z = \sum_{i \in \mathcal{D}} T_i$", "common.token_weights("),
        None,
        None,
        None,
    ],
    "loss": [(LOSS, "loss = -(batch.per_token(share)"), None, None, None],
    "gradient norm": [
        (
            r"$\lVert \nabla \mathrm{loss} \rVert$, scaled down to 1",
            "common.optimizer_step(",
        ),
        None,
        None,
        None,
    ],
}


def methods_table() -> str:
    """Equation, line of code, and value in the step of docs/one_step.html; changed cells marked."""
    values = page.read_values(ROOT / "docs" / "one_step.html")
    y, methods = values["responses"][0], values["methods"]

    def value(row: str, m: dict) -> str:
        logp = sum(y["logp_x" if m["space"] == "x" else "logp_bos"])
        return {
            "response": f"{len(y['ids'])} tokens, response 1",
            "reward": f"{y['reward']:.0f}",
            "advantage": page.signed(m["A"][0]),
            "in the loss": f"{sum(m['in_loss'])} of {len(values['responses'])}",
            "likelihood": f"Σ log π = {page.signed(logp)}",
            "tokens in the mean": str(m["tokens"]),
            "loss": page.signed(m["loss"], 4),
            "gradient norm": f"{m['norm']:.3f}",
        }[row]

    methods.append(methods[2])  # DSRL's step 1
    lines = "| | GRPO | PreRL | NSR-PreRL | DSRL, step s |\n|---|---|---|---|---|\n"
    for row, cells in METHODS.items():
        lines += f"| **{row}** |"
        code = ""
        for script, cell, m in zip(SCRIPTS, cells, methods):
            mark = "◆ " if cell and script != SCRIPTS[0] else ""
            equation, code = cell or ("", code)
            link = f"[{script}.py:1](../{script}.py#L1)<!-- {code} -->"
            lines += f" {mark}{equation}{' <br> ' if cell else ''}{link} <br> **{value(row, m)}** |"
        lines += "\n"
    lines += "| **change of log π(y\\|x), log π(y\\|BOS)** by the step, response 1 |"
    for m in methods:
        lines += f" **{page.signed(m['change_x'][0])}, {page.signed(m['change_bos'][0])}** |"
    return lines + "\n"


def fill(text: str, mark: str, part: str) -> str:
    """`text` with `part` between <!-- mark --> and the next <!-- end -->."""
    begin, end = f"<!-- {mark} -->\n", "<!-- end -->"
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        sys.exit(f"error: the page needs one {begin.strip()}, and {end} after it")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{part.strip()}\n\n{end}{rest.partition(end)[2]}"


def hunks(script: str) -> list[str]:
    """The changes that make `script` of grpo_baseline.py, as diff prints them, docstring aside."""
    sources = []
    for name in ("grpo_baseline", script):
        text = (ROOT / f"{name}.py").read_text()
        sources.append(text.partition('"""\n\nimport')[2].splitlines())
    found = []
    for line in difflib.unified_diff(*sources, n=0, lineterm=""):
        if line.startswith("@@"):
            found.append("")
        elif found:
            found[-1] += line.rstrip() + "\n"
    return found


def flags_table(script: str) -> str:
    """Flag, default and meaning, by the sections of Args, which --help has too."""
    source = (ROOT / f"{script}.py").read_text()
    args = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args")
    defaults = {f.target.id: f.value for f in args.body if isinstance(f, ast.AnnAssign)}
    lines, before = "| flag | default | meaning |\n|---|---|---|\n", ""
    for section, name, kind, meaning in flags.read_flags(source):
        lines += f"| **{section}** | | |\n" if section != before else ""
        before, default = section, ast.literal_eval(defaults[name])
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = f"`{default}`" if default != "" else "none"
        if isinstance(default, bool):
            shown = "on" if default else "off"
        if "|" in kind:
            meaning += f" ({', '.join(f'`{choice}`' for choice in kind.split('|'))})"
        meaning = re.sub(r"(<\\\|\w+\\\|>)", r"`\1`", meaning.replace("|", "\\|"))
        lines += f"| `--{name.replace('_', '-')}` | {shown} | {meaning} |\n"
    return lines


def metrics_table() -> str:
    """The keys of metrics.jsonl."""
    lines, keys = "| key | meaning |\n|---|---|\n", []
    for key, meaning in METRICS.items():
        keys.append(f"`{key}`")
        if meaning:
            lines, keys = f"{lines}| {', '.join(keys)} | {meaning} |\n", []
    return lines


def number_links(text: str) -> str:
    """Line numbers of the links to code."""

    def link(match) -> str:
        file, wanted = match[1], match[2]
        lines = (ROOT / file).read_text().splitlines()
        at = [i for i, line in enumerate(lines, 1) if wanted in line]
        if len(at) > 1:
            at = [i for i in at if lines[i - 1].startswith(wanted)]
        if len(at) != 1:
            sys.exit(f"error: {wanted!r} is on {len(at)} lines of {file}; a link needs exactly one")
        return f"[{file}:{at[0]}](../{file}#L{at[0]})<!-- {wanted} -->"

    return re.sub(r"\[([\w/]+\.py):\d+\]\(\.\./[\w/]+\.py#L\d+\)<!-- (.*?) -->", link, text)


def fork(name: str) -> str:
    """A script of forking.md: the one it is copied from, with the diffs behind `cp` applied."""
    page = (ROOT / "docs" / "forking.md").read_text()
    base, text = re.search(rf"    cp (\w+\.py) {name}\.py\n(.*?)(?=\n#|\Z)", page, re.S).groups()
    source = (ROOT / base).read_text()
    for diff in re.findall(r"```diff\n(.*?)```", text, re.S):
        lines = diff.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        if source.count(before) != 1:
            sys.exit(f"error: forking.md's diff does not fit {base}:\n{diff}")
        source = source.replace(before, "".join(line[1:] for line in lines if line[0] in " +"))
    return source


def render(text: str, script: str | None) -> str:
    """The page with its generated parts made anew; every hunk must be explained exactly once."""
    if script:
        left = hunks(script) if script != "grpo_baseline" else []
        for wanted in re.findall(r"<!-- hunk: (.*?) -->", text):
            found = [hunk for hunk in left if wanted in hunk]
            if len(found) != 1:
                sys.exit(f"error: {wanted!r} is in {len(found)} unexplained hunks of {script}.py")
            left.remove(found[0])
            text = fill(text, f"hunk: {wanted}", f"```diff\n{found[0]}```")
        if left:
            sys.exit(f"error: the page of {script}.py does not explain:\n" + "\n".join(left))
    if "<!-- flags -->" in text:
        text = fill(text, "flags", flags_table("dsrl"))
        text = fill(text, "metrics", metrics_table())
    if "<!-- hardware -->" in text:
        text = fill(text, "hardware", hardware.table())
    if "<!-- methods -->" in text:
        text = fill(text, "methods", methods_table())
    return number_links(text)


def main() -> None:
    for name, script in PAGES.items():
        page = ROOT / "docs" / name
        page.write_text(render(page.read_text(), script))


if __name__ == "__main__":
    main()
