r"""What an answer says, however it is spelled: the rules that read a box before any algebra.

Three layers, top to bottom:

1. `clean` rewrites spelling: one table of patterns, each with its example.
2. `read` finds the outer shape: a list, a tuple, an interval, a matrix, a number in a base, ...
3. `equal` compares two shapes. Their parts, plain expressions, go to `same`, which is math-verify's
   algebra (grading.py).

The conventions that these rules hold to, with their reasons, are in docs/evaluation.md.
"""

import json
import re
from fractions import Fraction

# ------------------------------------------------------------------------------------ 1. spelling

CHARACTERS = {
    "−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∗": "*", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "ℝ": r"\mathbb{R}",
    "±": r"\pm ", "°": r"^{\circ}", "′": "'", "’": "'", "⟨": "(", "⟩": ")", "√": r"\sqrt ",
    "％": "%", "，": ",", "：": ":", "（": "(", "）": ")", "∅": r"\emptyset ", "∶": ":",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "\u200b": "", "\ufeff": "",
    "\u2060": "", "¢": r"\text{cents}", "€": r"\text{euros}", "£": r"\text{pounds sterling}",
}  # fmt: skip
CHARACTERS = str.maketrans(CHARACTERS)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

FONT = r"(?:text|math)(?:bf|it|rm|sf|tt|up|sl|md|normal)|text|[mh]box|operatorname\*?|boldsymbol|bm"
SPACE = r"[ ,;:>]|(?:quad|qquad|space|thinspace|medspace|thickspace|enspace|nobreakspace|hfill)\b"
STYLE = r"(?:displaystyle|textstyle|scriptstyle|limits|nonumber|bfseries|bf|rm|it|sf|boldmath)"
SIZE = r"(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])"
FUNCTIONS = r"arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi"
WORD_AND = r"(?:and|or|And|Or|AND|OR)"

# (pattern, replacement, example, what becomes of it). They run in this order.
RULES = [
    (r"(?<!\\)\\!", r"", r"1,\!340", r"1,340"),
    (r"(?<!\\)\\phantom\s*(?:\{[^{}]*\}|\S)", r"", r"\phantom{-}1", r"1"),
    (r"(?<!\\)\\[hv]space\*?\{[^{}]*\}", r" ", r"1\hspace{2mm}2", r"1 2"),
    (rf"(?<!\\)\\(?:{SPACE})|~", r" ", r"1\,340\quad", r"1 340 "),
    (rf"\\{STYLE}(?![a-zA-Z])", r"", r"\displaystyle 5", r" 5"),
    (rf"\\{SIZE}\s*<", r"(", r"\left<1,2)", r"(1,2)"),
    (rf"\\{SIZE}\s*>", r")", r"(1,2\right>", r"(1,2)"),
    (rf"\\{SIZE}\.?\s*", r"", r"\Bigl(\left. 1 \right)", r"(1 )"),
    (r"\\(?:langle|lparen)(?![a-zA-Z])", r"(", r"\langle 1", r"( 1"),
    (r"\\(?:rangle|rparen)(?![a-zA-Z])", r")", r"1\rangle", r"1)"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{", r"\lbrace 1", r"\{ 1"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}", r"1\rbrace", r"1\}"),
    (r"\\lbrack(?![a-zA-Z])", r"[", r"\lbrack 1", r"[ 1"),
    (r"\\rbrack(?![a-zA-Z])", r"]", r"1\rbrack", r"1]"),
    (r"\\(?:mid|[lr]?vert)(?![a-zA-Z])\s*", r"|", r"\lvert x\rvert", r"|x|"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", r"\dfrac12", r"\frac12"),
    (r"\\\(|\\\)", r"", r"\(5\)", r"5"),
    (r"^\s*\\\[(.*)\\\]\s*$", r"\1", r"\[5\]", r"5"),
    (r"\\(?:text)?color(?:box)?\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}", r"", r"\color{red}{5}", r"{5}"),
    (r"\\(?:boxed|fbox|underline|ensuremath|emph)\s*(?=\{)", r"", r"\boxed{5}", r"{5}"),
    (r"\\operatorname\*?\{(" + FUNCTIONS + r")\}", r"\\\1", r"\operatorname{arcsin}", r"\arcsin"),
    (rf"\\(?:{FONT})\s*\{{", r"\\text{", r"\mathbf{141}", r"\text{141}"),
    (r"\\?normal\s*\{", r"\\text{", r"125normal{miles}", r"125\text{miles}"),
    (r"\\text\{\s*\}", r" ", r"5\text{ }", r"5 "),
    (r"\\text\{([^a-zA-Z{}]*)\}", r"\1", r"\text{43}_5", r"43_5"),
    (r"\\text\{\s*([a-zA-Z])\s*\}(?=_)", r"\1", r"\text{A}_5", r"A_5"),
    (r"\\(?:mathrm|text)\{i\}|\\imath(?![a-zA-Z])", r"i", r"4\text{i}", r"4i"),
    (r"(?<=[0-9])\{\s*([.,])\s*\}(?=[0-9])", r"\1", r"17{.}3", r"17.3"),
    (r"(?<!\\)\{\s*\}", r" ", r"2,3,{}4", r"2,3, 4"),
    (rf"(?<!\\)\{{\s*({WORD_AND})\s*\}}", r"\\text{\1}", r"-2{or}-12", r"-2\text{or}-12"),
    (r"\\(?:infinity|infty)(?![a-zA-Z])|(?<![a-zA-Z\\])(?:inf|infinity)(?![a-zA-Z])", r"\\infty",
     r"(0,infinity)", r"(0,\infty)"),
    (r"\+\s*\\infty", r"\\infty", r"[2,+\infty)", r"[2,\infty)"),
    (r"\\(leq|geq|neq)(slant|q)?(?![a-zA-Z])",
     lambda m: "\\" + m[1][:2], r"x \leqslant 3", r"x \le 3"),
    (r"\\lt(?![a-zA-Z])", r"<", r"x\lt 3", r"x< 3"),
    (r"\\gt(?![a-zA-Z])", r">", r"x\gt 3", r"x> 3"),
    (r"<=", r"\\le ", r"x<=3", r"x\le 3"),
    (r">=", r"\\ge ", r"x>=3", r"x\ge 3"),
    (r"!=", r"\\ne ", r"x!=3", r"x\ne 3"),
    (r"\\colon(?![a-zA-Z])", r":", r"2\colon 3", r"2: 3"),
    (r"\\(?:textdollar|dollar)(?![a-zA-Z])", r"\\$", r"\textdollar 5", r"\$ 5"),
    (r"(?<![a-zA-Z])(np|math|numpy)\.", r"", r"np.arcsin(10/13)", r"arcsin(10/13)"),
    (rf"(?<![a-zA-Z\\])({FUNCTIONS})(?![a-zA-Z])", r"\\\1", r"arcsin(10/13)", r"\arcsin(10/13)"),
    (r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", r"^", r"x**2", r"x^2"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])|(?<=[0-9])\s*\\circ(?![a-zA-Z])",
     r"\\text{degrees}", r"30^{\circ}", r"30\text{degrees}"),
    (r"\\text\{\s*(?:percent|per cent|pct|percentage)\s*\}|(?<![a-zA-Z])percent(?![a-zA-Z])|"
     r"(?<!\\)%", r"\\%", r"12\text{ percent}", r"12\%"),
    (r"(?<![\w.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([+-]?)0*([0-9]+)(?![\w.])",
     lambda m: m[1].rstrip(".") + r" \times 10^{" + m[2].replace("+", "") + m[3] + "}",
     r"4.5e+33", r"4.5 \times 10^{33}"),
    (r"(?<=[0-9])\.(?![0-9])(?=[^.]*\S)", r"", r"-1./3", r"-1/3"),
    (r"(?<![0-9.,])([1-9][0-9]{0,2}(?:(?:,?\s+|'|\.)[0-9]{3}){2,}|[1-9][0-9]{0,2}(?:[ ']+[0-9]{3})+)"
     r"(?![0-9]|,[0-9])",
     lambda m: m[0] if ", " in m[0] else re.sub(r"[ ,'.]+", "", m[0]), r"1 332 000.5", r"1332000.5"),
    (r"(?<=\{)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?=\})",
     lambda m: m[0].replace(",", ""), r"\frac{2,469}{7}", r"\frac{2469}{7}"),
    (r"(?<![0-9.}])\.(?=[0-9])", r"0.", r"-.5", r"-0.5"),
]  # fmt: skip
RULES = [(re.compile(pattern, re.DOTALL), new, *example) for pattern, new, *example in RULES]

# What may stand before an answer and adds nothing to it.
LEAD = re.compile(
    r"^\s*(?:=|\\approx|\\therefore|\\implies|\\Rightarrow|:|"
    r"(?:\\text\{)?\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*:?\s*\}?)\s*",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    r"""The answer in one spelling: plain spaces, sizes and fonts gone, \frac and \sqrt with braces.

    >>> [example for rule, new, example, wanted in RULES if rule.sub(new, example) != wanted]
    []
    >>> clean(r"$\dfrac12$."), clean("2√3"), clean("x² + 1"), clean("**447**"), clean("= 7")
    ('\\frac{1}{2}', '2\\sqrt{3}', 'x^{2} + 1', '447', '7')
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m[0].translate(RAISED) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(LOWERED) + "}", text)
    text = re.sub(r"√\s*\(", "sqrt(", text).translate(CHARACTERS)
    text = re.sub(r"\s+", " ", text)
    bold = re.fullmatch(r"\s*(\*\*|__)(.*)\1\s*", text)
    text = bold[2] if bold else text
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    else:
        text = re.sub(r"(?<!\\)\$", r"\\$", text)
    for pattern, new, *_ in RULES:
        text = pattern.sub(new, text)
    text = brace_arguments(re.sub(r"\s+", " ", text))
    for _ in range(8):
        before = text
        text = strip_ends(text)
        if text == before:
            break
    return text


def strip_ends(text: str) -> str:
    r"""Without a leading "=", closing punctuation and braces around the whole.

    >>> strip_ends(r"= {\text{Monday.}}."), strip_ends(r"\text{A, B}")
    ('\\text{Monday.}', 'A, B')
    """
    text = LEAD.sub("", text.strip()).rstrip(" .,;:!" if "!" not in text else " .,;:")
    text = re.sub(r"[.,;]+\}$", "}", text)
    if text.endswith("\\"):
        text = text[:-1].rstrip()
    ends = match_brackets(text)
    if text.startswith("{") and ends.get(0) == len(text) - 1:
        text = text[1:-1]
    if text.startswith(r"\text{") and ends.get(5) == len(text) - 1:
        text = text[6:-1]
    return text.strip()


def match_brackets(text: str) -> dict[int, int]:
    r"""Where each opening bracket closes. A half-open interval's brackets match each other.

    >>> match_brackets("[0,f(x))")
    {4: 6, 0: 7}
    """
    ends, opened = {}, []
    for m in re.finditer(r"\\\\|\\?[{}]|[\[(\])]", text):
        if m[0][-1] in "{[(":
            opened.append(m.start())
        elif m[0] != r"\\" and opened:
            ends[opened.pop()] = m.end() - 1
    return ends


def brace_arguments(text: str) -> str:
    r"""Braces around the arguments of \frac and \sqrt.

    >>> brace_arguments(r"\frac\pi2 + \frac 1{x} + \sqrt3 + \sqrt(5) + \sqrt[3]2")
    '\\frac{\\pi}{2} + \\frac{1}{x} + \\sqrt{3} + \\sqrt{5} + \\sqrt[3]{2}'
    """
    one = r"\s*(?![\s{\[(])(\\[a-zA-Z]+|\\?.)"
    text = re.sub(r"\\sqrt\s*(\[[^\]]*\])?\s*(?:(?=\()|(?=\{))", r"\\sqrt\1", text)
    text = re.sub(r"\\sqrt(\[[^\]]*\])?\s*([0-9]+)(?![0-9])", sqrt_of_digits, text)
    text = re.sub(rf"\\sqrt(\[[^\]]*\])?{one}", r"\\sqrt\1{\2}", text)
    text = re.sub(rf"\\frac{one}", r"\\frac{\1}", text)
    ends = match_brackets(text)
    out = list(text)
    for m in re.finditer(r"\\frac\s*(?=\{)|\\sqrt(?:\[[^\]]*\])?(?=\()", text):
        if text[m.end()] == "(" and m.end() in ends:
            out[m.end()], out[ends[m.end()]] = "{", "}"
        elif m.end() in ends:
            second = re.compile(one).match(text, ends[m.end()] + 1)
            if second:
                out[second.start()] = "{" + out[second.start()].strip()
                out[second.end() - 1] += "}"
    return "".join(out)


def sqrt_of_digits(match: re.Match) -> str:
    r"""LaTeX's \sqrt35 is √3·5, but nobody who writes √35 means that.

    >>> clean("√35"), clean(r"\sqrt35")
    ('\\sqrt{35}', '\\sqrt{35}')
    """
    return rf"\sqrt{match[1] or ''}{{{match[2]}}}"
