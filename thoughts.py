r"""Counts of thoughts in a response, for the claim that NSR-PreRL multiplies reflections 6.54 times
and transitions 14.89 times (arXiv 2604.14142).

The paper does not say how it counts. This counter is ours. It follows the categories of SEAL (arXiv
2504.07986): a thought is a block of the response, and each block is one of

    transition   moves to another line of attack ("Alternatively, ...", "another way to solve this")
    reflection   looks back at what was done ("Wait, ...", "let me check", "that can't be right")
    execution    everything else

by the phrases below; a block with both is a transition. Blank lines separate blocks. A text without
a blank line (a short answer, the lab's one-line responses) is cut at line ends and semicolons
instead.

It also counts the four behaviours of the paper's second analysis: subgoal setting, enumeration,
verification and backtracking. Each counts at most once in a block, whatever the block's category.
"""

import re


def any_of(*patterns: str) -> re.Pattern:
    return re.compile("|".join(patterns))


# Phrases are looked for in lower-case text with single spaces and straight apostrophes. START is
# the beginning of a clause: it tells the interjection "wait" from the verb in "they wait 5 min".
START = r"(?:^|[.!?;:,(*\-\u2014\u2026] ?|\b(?:but|oh|no|so|and|hmm|actually) )"
# Somebody is about to do something: "let me", "we should now", ...
INTENT = (
    r"\b(?:let me|let us|let's|i'll|we'll|(?:i|we) (?:can|could|should|must|will|want to|need to))"
    r"(?: just| now| also| first| quickly| then)* "
)
CHECK = r"(?:re-?|double[- ]?)?(?:check|verify|examine|confirm)\b(?! (?:in|out|into)\b)"
THIS_IS = r"\b(?:that|this|it|which|something)(?:'s| is| was| must be| can't be| cannot be)"
THIS_LOOKS = r"\b(?:that|this|it|something) (?:seems|looks|sounds)"
WRONG = r"(?: clearly)? (?:wrong|incorrect|impossible|not (?:right|correct|possible)|a mistake)\b"
RIGHT = r"(?: still| also)? (?:right|correct|off)\b(?! (?:to|angle|triangle|side|hand)\b)"
MISTAKE = r"\b(?:i|we) (?:have )?(?:made|make) (?:a|an) (?:\w+ )?(?:mistake|error|slip)\b"
METHOD = r"(?:approach|method|strategy|technique|route|angle|line of attack)\b"

TRANSITION = any_of(
    START + r"alternatively\b",
    r"\banother " + METHOD,
    r"\banother (?:way|idea|solution)\b(?! (?:of|to) (?:writ|say|express|stat|put|phras|read))",
    r"\b(?:a|some) (?:different|new) (?:idea\b|" + METHOD + ")",
    r"\b(?:different|other) way to (?:solve|approach|do|tackle|attack|see)\b",
    r"\bthink (?:about (?:it|this) )?differently\b",
    INTENT + r"(?:try|switch to|use) (?:something else|a different|another)\b",
)
REFLECTION = any_of(
    START + r"wait\b(?! (?:for|until|till|times?|lists?|staff)\b)",
    START + r"hold on\b(?! to\b)",
    INTENT + CHECK,
    INTENT + r"re-?(?:consider|compute|calculate|evaluate|think|visit|do)\b",
    r"\bon second thought|\bthink again\b|\bupon (?:closer |further )?(?:inspection|reflection)\b",
    r"\bdouble[- ]?check|\bsanity check|\bto make sure\b|\bdid i (?:make|miss|forget)\b",
    MISTAKE,
    f"(?:{THIS_IS}|{THIS_LOOKS})(?:{RIGHT}|{WRONG})",
    r"\b(?:that|this) (?:isn't|doesn't (?:look|seem|sound)) (?:right|correct)\b",
)
BEHAVIOURS = {
    "subgoal": any_of(
        r"(?:^|[.!?*#] ?)step \d+\b",
        r"(?:^|[.!?] )(?:first|next|second|third|then|finally|now),? (?:i|we|let|to|find)\b",
        r"\b(?:i|we) (?:first |then |next |now )?(?:need|have) to "
        r"(?:first )?(?:find|compute|determine|calculate|show|solve|figure|work)\b",
        r"\b(?:start|begin) (?:by|with) \w+ing\b|\bthe (?:first|next) step is\b",
        r"\b(?:break|split|divide) (?:it|this|the problem) (?:down )?into\b",
        r"\b(?:our|the|my) (?:sub)?goal is\b",
    ),
    "enumeration": any_of(
        r"\bcases? (?:\d+|[ivx]+|[a-d])\b",
        r"\b(?:list|enumerate|try|check|go through) (?:all|each|every|out the possib)",
        r"\bfor each (?:possible|case|value|choice)\b",
        r"\bpossible (?:values|cases|pairs|choices|combinations)\b",
        r"\b(?:if|for|when|try) \$?[a-z] ?= ?-?\d+\b",
    ),
    "verification": any_of(
        INTENT + CHECK,
        r"\bto (?:double[- ]?check|verify|confirm)\b|\bdouble[- ]?check|\b(?:sanity|quick) check\b",
        r"(?:^|[.!?] )(?:check|checking|verification|verifying)(?::| )",
        r"\b(?:plug|substitut)\w* .{0,60}?\bback\b",
    ),
    "backtracking": any_of(
        THIS_IS + WRONG,
        MISTAKE,
        r"\b(?:that|this) (?:isn't (?:right|correct)|(?:doesn't|won't|didn't|does not) work)\b",
        INTENT + r"(?:go back|start over|start again|try again|redo)\b",
        r"\bdead end\b|\bscratch that\b|\bcontradict(?:s|ion|ing)\b",
    ),
}
KINDS = ("reflection", "transition", *BEHAVIOURS)


def blocks(text: str) -> list[str]:
    r"""The thoughts of a response, in lower case with single spaces.

    >>> blocks("We add.\nSo 5; done.\n\nWait, no.")
    ['we add. so 5; done.', 'wait, no.']
    >>> blocks("1:81 odd 44; wait 1:81 odd 44; ")
    ['1:81 odd 44', 'wait 1:81 odd 44']
    """
    lines = text.lower().replace("\u2019", "'").splitlines()
    parts, part = [], []
    for line in [*lines, ""]:
        words = line.split()
        if words:
            part += words
        elif part:
            parts.append(" ".join(part))
            part = []
    if len(parts) == 1:
        clauses = (" ".join(c.split()) for line in lines for c in line.split(";"))
        parts = [clause for clause in clauses if clause]
    return parts


def count(text: str) -> dict[str, int]:
    r"""The number of the response's blocks of each kind.

    >>> found = count("Try n = 2.\n\nWait, let me check: 4 = 4.\n\nAlternatively, use Vieta.")
    >>> {kind: n for kind, n in found.items() if n}
    {'reflection': 1, 'transition': 1, 'enumeration': 1, 'verification': 1, 'execution': 1}
    """
    found = dict.fromkeys((*KINDS, "execution"), 0)
    for block in blocks(text):
        kind = "execution"
        if TRANSITION.search(block):
            kind = "transition"
        elif REFLECTION.search(block):
            kind = "reflection"
        found[kind] += 1
        for behaviour, pattern in BEHAVIOURS.items():
            found[behaviour] += pattern.search(block) is not None
    return found


def rates(counts: list[dict[str, int]], lengths: list[int]) -> dict[str, float]:
    """Mean counts per response (thoughts/KIND) and per 1,000 tokens (thoughts/KIND_per_1k_tokens).

    Args:
        counts: count() of each response; lengths: of each response, in tokens.

    >>> both = rates([count("wait 5"), count("5")], [3, 1])
    >>> both["thoughts/reflection"], both["thoughts/reflection_per_1k_tokens"]
    (0.5, 250.0)
    """
    total = {kind: sum(c[kind] for c in counts) for kind in KINDS}
    tokens, metrics = max(1, sum(lengths)), {}
    for kind, n in total.items():
        metrics[f"thoughts/{kind}"] = n / max(1, len(counts))
        metrics[f"thoughts/{kind}_per_1k_tokens"] = 1000 * n / tokens
    return metrics
