# ruff: noqa: E501 (the templates read best as a table)
r"""Further kinds of equal forms and near misses, made by rule from MATH's reference answers.

They stand beside the cases of tests/data. Half of them, `held_out`, were not looked at one by one
while the rules of answers.py were written: only their shares were, at the end.

    python tests/grading_forms.py        prints every kind with an example
"""

import json
import re
import zlib
from pathlib import Path

DATA = Path(__file__).parent / "data"
PER_KIND = 3

# In the templates: #n the number, #m the number plus one, #a/#b a fraction's parts, #g the gold.
EQUAL = {
    "int": r"""
        \mathrm{#n} | \textit{#n} | \boldsymbol{#n} | \bm{#n} | \mathsf{#n} | {\bf #n} | \mbox{#n} |
        $$#n$$ | \(#n\) | \[#n\] | __#n__ | \quad #n | #n\; | #n\quad | \hspace{1em} #n |
        \approx #n | \therefore #n | \Rightarrow #n | \color{red}{#n} | \color{red} #n |
        \textcolor{blue}{#n} | \fbox{#n} | \underline{\underline{#n}} | N = #n | f(2) = #n |
        \text{Area} = #n | AB = #n | \angle ABC = #n^\circ | |AB| = #n | a_{10} = #n |
        x_1 = #n | \text{Total} = \$#n | #n.00 | #n/1 | #n \text{ marbles} | #n \text{ square feet} |
        #n~\text{cm} | #n\,\mathrm{cm} | #n \mathrm{~cm} | #n \text{ km/h} | #n cm |
        #n \frac{\text{km}}{\text{h}} | #n\text{ miles per hour} | €#n | #n€ | £#n | \$#n.00 |
        #n \text{ units}^2 | #n \textbf{ units} | #n\ (\text{units}) | #n\text{ cubic inches} |
        #n \mbox{ inches} | #n\,\text{N} | #n \text{ people} | #n^{\circ} | #n \text{ degrees} |
        #n^\circ\text{C} | #n\deg | \text{#n units} | \text{#n.} | #n\text{.} | The answer is #n. |
        \text{The answer is } #n | \text{Answer: #n} | #n\,\text{kg}\cdot\text{m}/\text{s}^2 |
        #n \text{ m}^{-1} | \left(#n\right) | \Big(#n\Big) | {#n} | {{#n}} | x = #n \text{ cm} |
        \mathbf{x = #n} | **#n**. | +#n.0 | #n\text{ ft}^{2} | #n \text{ L} | #n\ \text{mph}""",
    "thousand": r"""
        #h,\,#t | #h\:#t | #h\thinspace#t | #h{\,}#t | #h,\!#t | #h{,}#t | #h\,#t\text{ cm} |
        \$#h,#t | #h,#t.00 | x = #h,#t | #h,#t\text{ ways} | \text{#h,#t} | \mathbf{#h,#t} |
        #h #t.0 | #h\!,#t | #h,\;#t | (#h,\!#t) | $#h,#t$""",
    "frac": r"""
        \frac{#a}#b | {#a \over #b} | \cfrac{#a}{#b} | (#a)/(#b) | #a/(#b) | \frac{2 \cdot #a}{2 \cdot #b} |
        \frac{-#a}{-#b} | #a \cdot \frac{1}{#b} | \displaystyle\frac{#a}{#b} | #a÷#b | #a / #b |
        \nicefrac{#a}{#b} | \frac{#a}{#b}\text{ cm} | \dfrac{#a}{#b}. | \text{#a/#b} | x=\tfrac{#a}{#b} |
        \left.\frac{#a}{#b}\right. | \mathbf{\frac{#a}{#b}} | P = \frac{#a}{#b} | \frac{ #a }{ #b } |
        \frac{#a.0}{#b} | \left(\dfrac{#a}{#b}\right) | \frac{\text{#a}}{\text{#b}} | P(A) = #a/#b |
        \bigl(#a/#b\bigr) | #a \cdot #b^{-1} | \boxed{\frac{#a}{#b}} | \frac{#a}{#b}\text{ of the total}""",
    "mixed": r"""
        #w\tfrac{#r}{#b} | #w \frac{#r}{#b} | #w\ #r/#b | #w + \frac{#r}{#b} | #w\,\frac{#r}{#b} |
        #w \text{ and } \frac{#r}{#b} | #w \text{ and } #r/#b""",
    "surd": r"""
        #c \sqrt {#d} | #c\sqrt{#d}. | #c \cdot \sqrt{#d} | \sqrt{#d}\cdot #c | #c√(#d) | #c*sqrt(#d) |
        #c\sqrt[2]{#d} | #c(\sqrt{#d}) | #c \times \sqrt{#d} | #c\,\sqrt{#d} | #c \cdot #d^{0.5} |
        x = #c\sqrt{#d} | #c \sqrt{#d}\text{ units} | \text{length} = #c\sqrt{#d} | #c\sqrt{\mathstrut #d} |
        $#c\sqrt{#d}$ | #c\sqrt{#d} \text{ cm}^2 | \mathbf{#c\sqrt{#d}} | \left(#c\sqrt{#d}\right)""",
    "pi": r"""
        #n \cdot \pi | #n\,\pi | #n \pi \text{ inches} | #n \times \pi | #n*pi | \pi \times #n | #n π |
        A = #n\pi | #n\pi. | #n{\pi} | #n\pi \text{ cm}^3 | (#n)\pi | #n \pi\ \text{units}^2 | \pi(#n)""",
    "pair": r"""
        \langle #p, #q\rangle | \left\langle #p, #q \right\rangle | \big(#p,#q\big) | \Bigl(#p, #q\Bigr) |
        P = (#p, #q) | \text{(}#p, #q\text{)} | $(#p, #q)$ | x = #p, \; y = #q | x=#p; y=#q | (#p; #q) |
        (#p,\,#q) | (#p,~#q) | (a, b) = (#p, #q) | (#p,#q). | (#p \, , #q) | \lparen #p, #q\rparen |
        \left( #p , #q \right) | \mathbf{(#p, #q)} | x = #p \text{ and } y = #q | y=#q, x=#p""",
    "list": r"""
        \left\{#p, #q\right\} | \lbrace #p, #q \rbrace | x = #p \text{ or } x = #q | x=#p \lor x=#q |
        x \in \left\{ #p, #q \right\} | #p,\, #q | #p,\ #q. | \text{#p and #q} | #p \textbf{ and } #q |
        #p \mbox{ or } #q | n=#p,#q | #p\text{, }#q | t = #p, t = #q | S = \{#p, #q\} | #p \text{ and } #q |
        #q, #p | \{#q; #p\} | x_1 = #p \text{ and } x_2 = #q | #p, \quad #q | x = #p \text{ and } #q |
        $#p$ and $#q$ | #p \text{ or }#q""",
    "closed": r"""
        \left[#p, #q\right] | x \in \left[#p, #q\right] | #q \ge x \ge #p | #p\leq x\leq #q |
        #p \leqslant y \leqslant #q | \{x \mid #p \le x \le #q\} | \{x \in \mathbb{R} : #p \le x \le #q\} |
        [#p;#q] | \big[#p, #q\big] | x\ge #p \text{ and } x \le #q | #p ≤ x ≤ #q | x \in [#p,\, #q] |
        #p <= x <= #q | $[#p, #q]$ | \lbrack #p, #q \rbrack | #p \le f(x) \le #q | [#p,#q].""",
    "ray": r"""
        x > #p | #p < x | #p < x < \infty | (#p, +\infty) | (#p,∞) | x \in (#p, \infty) |
        \{x : x > #p\} | \{x \mid x > #p\} | y > #p | \left(#p, \infty\right) | #p<x | (#p, \infty). |
        x \gt #p | (#p, infinity) | k > #p | \infty > x > #p""",
    "poly": r"""
        f(x)=#g | f(x) = #g. | P(x) = #g | g(x)=#g | y = #g | \left(#g\right) | \text{f(x)} = #g |
        $#g$ | #g | A = #g | h(x) = #g | \mathbf{#g}""",
    "matrix": r"""
        \left[\begin{array}{ccc}#k\end{array}\right] | \left(\begin{array}{c}#k\end{array}\right) |
        \begin{bmatrix} #k \end{bmatrix} | \left(\begin{matrix}#k\end{matrix}\right) |
        \begin{pmatrix} #k \end{pmatrix}. | \mathbf{A} = \begin{pmatrix}#k\end{pmatrix} |
        A = \begin{bmatrix}#k\end{bmatrix} | \begin{pmatrix} #k \\ \end{pmatrix} |
        \left( \begin{smallmatrix} #k \end{smallmatrix} \right) | $\begin{pmatrix}#k\end{pmatrix}$ |
        \boldsymbol{\begin{pmatrix}#k\end{pmatrix}}""",
    "base": r"""
        (#n)_{#b} | #n_{(#b)} | #n \text{ base } #b | #n \text{ (base #b)} | #n_{\text{base } #b} |
        {#n}_{#b} | \text{#n}_#b | #n\ \text{in base } #b | \mathrm{#n}_{#b} | #n_{#b}. | x = #n_{#b} |
        \left(#n\right)_{#b} | #n\,_{#b} | \text{#n base #b} | $#n_{#b}$ | #n_{\mathrm{#b}} | #n_{ #b }""",
    "word": r"""
        \textit{#n} | \text{ #n } | **#n** | \textsf{#n} | \mbox{#n} | \text{``#n''} | "#n" | #n. |
        \text{#n}. | \textrm{#n} | \boxed{\text{#n}} | \textbf{#n.} | \emph{#n} | $\text{#n}$ |
        \operatorname{#n} | \textup{#n} | \text{The answer is #n} | \text{#n}\ | #n | \underline{\text{#n}}""",
    "choice": r"""
        \textbf{(#n)} | \text{#n.} | \text{#n)} | \text{Option #n} | \text{Choice #n} | (#n). | \mathbf{#n} |
        \textbf{#n} | **#n** | $#n$ | #n: | [#n] | \text{Answer: #n} | \text{The answer is #n} | \fbox{#n} |
        \text{option (#n)} | \text{#n} | **(#n)** | \textsf{#n} | \text{(#n)}. | Option #n | #n.""",
    "decimal": r"""
        #n0 | #n00 | #n\text{ kg} | +#n | \text{#n} | \approx #n | #n \text{ meters} | x = #n | \mathbf{#n} |
        $#n$ | #n. | \$#n | #n\,\text{cm} | {#n} | (#n) | 10 \cdot #n / 10""",
    "ratio": r"""
        #a : #b | #a\colon #b | #a \text{ to } #b | #a{:}#b | \text{#a:#b} | #a\,:\,#b | #a \text{:} #b |
        $#a:#b$ | #a:#b. | #a∶#b | #a to #b""",
    "complex": r"""
        #x + #y\mathrm{i} | #x + #y i | #y i + #x | #x+#y\,i | #x + #y\cdot i | (#x + #yi) | #x+#y*i |
        #x + \text{i} #y | z=#x+#yi | #x+#y\imath | w = #x + #y i | #x+#yi. | #x + i #y | #x + (#y)i |
        \left(#x\right) + #y i | $#x + #yi$ | #x+#y \times i | i \cdot #y + #x""",
}  # fmt: skip
WRONG = {
    "int": r"""
        #n\% | #n_7 | #n_{12} | #n.5 | #n \text{ million} | #n \text{ tenths} | \frac{#n}{2} | \sqrt{#n} |
        #n^{-1} | #n \times 10 | #n \cdot 2 | \approx #m | #n \text{ or more} | \text{more than } #n |
        \text{less than } #n | x\ge #n | \le #n | #n<x | #n i | #n x | #n e | #n, #m | (#n, #m) |
        \{#n, #m\} | #n \text{ and } #m | #m=#n | 0=#n | 2x=#n | x^2 = #n | #n=#m | x=#m=#n |
        #n \ne #n | #n \bmod 7 | \text{none} | \text{undefined} | \infty | \emptyset | ? | #n \pm 1 |
        3 + #n | #n - 1 | #n\text{ percent} | \text{not equal to } #n | \text{between } #n \text{ and } #m |
        [#n, \infty) | x > #n | #n \cdot 10^3 | \frac{1}{#n} | #n \text{ dozens} | #n \text{ thousand dollars} |
        (#n)_{8} | #n\text{ (base 5)} | \ln #n | #n^{2} | #n\sqrt{2} | #n \text{ or } -#m | #n/3 |
        #n:1 | \sqrt{x} = #n | 3x + 1 = #n | 1 = 2 = #n | \text{at most } #n | \text{exactly } #m | -(#n) |
        a = #m, b = #n | #n \text{ billion}""",
    "frac": r"""
        \frac{#b}{#a} | -\frac{#a}{#b} | #a,#b | (#a,#b) | \frac{#a}{#b}\% | \frac{#a}{#b}\pi |
        \sqrt{\frac{#a}{#b}} | \frac{#a}{#b} + 1 | 2\cdot\frac{#a}{#b} | #a | \frac{#a}{2 \cdot #b} |
        \frac{#a}{#b} \text{ thousand} | x < \frac{#a}{#b} | \frac{#a}{#b} x | \left(\frac{#a}{#b}\right)^2 |
        \{#a, #b\} | \frac{#a}{#b} = 1 | #a + #b""",
    "surd": r"""
        #c\sqrt[3]{#d} | -#c\sqrt{#d} | #c+\sqrt{#d} | \pm #c\sqrt{#d} | #c\sqrt{#d} i | #c^2\sqrt{#d} |
        \sqrt{#c \cdot #d + 1} | #c\sqrt{#d} + 1 | #c\sqrt{#d}\pi | \frac{#c}{\sqrt{#d}} | #d\sqrt{#d} |
        #c#d\sqrt{#d} | x > #c\sqrt{#d} | #c\sqrt{#d}\%""",
    "pi": r"""
        #n | #m\pi | -#n\pi | \frac{\pi}{#n} | \frac{#n}{\pi} | #n + \pi | \frac{22}{7} \cdot #n | #n\pi^3 |
        #n \cdot 3.14159 | #n\pi\% | #n e | 2 \cdot #n\pi | #n\sqrt{\pi}""",
    "pair": r"""
        (#q, #p) | \{#p, #q\} | (#p, #q + 1) | [#p, #q] | [#p, #q) | (#p, #q] | (#p, #q, #q) | (-(#q), #p) |
        x = #q, y = #p | \begin{pmatrix} #q \\ #p \end{pmatrix} | (#p + 1, #q) | #p | \frac{#p}{#q} |
        (2 \cdot #p + 1, #q) | (x, y) = (#q, #p)""",
    "list": r"""
        #p | #q | (#p, #q) | [#p, #q] | #p, #q, 1000 | #p + #q - 1000 | #p, #q + 1 | #p < x < #q |
        \{#p\} | [#p, #q) | (#p, #q] | #p \cdot #q + 1000 | x = #p | #p - 1, #q | #p, #p | \text{none}""",
    "closed": r"""
        (#p, #q) | [#p, #q) | (#p, #q] | [#p, #q + 1] | \{#p, #q\} | #p < x < #q | #p \le x < #q | x \ge #p |
        x \le #q | [#p, \infty) | (-\infty, #p] \cup [#q, \infty) | #q | [#p - 1, #q] | #p, #q |
        x < #p \text{ or } x > #q""",
    "ray": r"""
        [#p, \infty) | x \ge #p | x < #p | (-\infty, #p) | #p | (#p + 1, \infty) | x > #p + 1 | \{#p\} |
        x \ne #p | (#p, 1000000) | (-\infty, \infty) | #p > x | x = #p""",
    "poly": r"""
        #g+1 | -(#g) | 2(#g) | (#g)^2 | #g = 1 | f(x) = #g + 1 | #g + x^7 | \frac{1}{#g} | (#g)x | y = -(#g) |
        #g > 0 | \sqrt{#g}""",
    "matrix": r"""
        -\begin{pmatrix}#k\end{pmatrix} | 2\begin{pmatrix}#k\end{pmatrix} | \begin{pmatrix}#k\\1\end{pmatrix} |
        \begin{pmatrix}1\end{pmatrix} | \begin{pmatrix}#k\end{pmatrix}^2 + 1 | \left|\begin{matrix}#k\end{matrix}\right| |
        \det \begin{pmatrix}#k\end{pmatrix} | \begin{bmatrix}1 + #k\end{bmatrix}""",
    "base": r"""
        1#n_{#b} | #n1_{#b} | #n_{#b}+1 | (#n)_{36} | #n \text{ (base 16)} | #n_{\text{twenty}} | #n0_{#b} |
        -#n_{#b} | 7#n""",
    "word": r"""
        \text{not #n} | \text{#n or none} | \text{Sunny} | \text{un#n} | \text{#nx} | \text{#n and 3} | 5 |
        \text{neither #n} | \text{A} | \text{February}""",
    "choice": r"""
        \text{not #n} | #nX | \text{None} | \text{#n or Z} | 1 | \{#n, Z\} | #nZ | \text{Z} | (Z)""",
    "decimal": r"""
        #n1 | -#n | #n\% | #n\pi | 1#n | 2 \cdot #n | #n \times 10^{2} | #n + 1 | #n^2 | x < #n |
        #n \text{ million} | \frac{1}{#n} | #n, 1 | (#n, 1)""",
    "ratio": r"""
        #b:#a + 1 | #a:#b:1 | #a | #a + #b | #a:2 \cdot #b | #b | #a1:#b | (#a, #b) | \{#a, #b\}""",
    "complex": r"""
        #x - #y i | -#x + #y i + 1 | #y + #x i + 1 | #x + #y | \sqrt{#x^2 + #y^2} | 2(#x + #y i) | (#x, #y) |
        #x + #y i + i | #x + #y i^2 | #x | #y i | i(#x + #y i) | #x + #y j | #x i + #y i""",
}  # fmt: skip

NUMBER = r"-?[0-9]+"
SHAPES = [  # class, what its golds look like, the names of the groups
    ("base", r"(\d{2,})_\{?(\d)\}?", "nb"),
    ("thousand", r"([1-9]\d{0,2}),?(\d{3})", "ht"),
    ("int", r"([1-9]\d+)", "n"),
    ("frac", r"\\frac\{(\d+)\}\{(\d+)\}", "ab"),
    ("surd", r"(\d+)\\sqrt\{(\d+)\}", "cd"),
    ("pi", r"(\d+)\\pi", "n"),
    ("pair", rf"\(({NUMBER}),({NUMBER})\)", "pq"),
    ("list", rf"({NUMBER}),({NUMBER})", "pq"),
    ("closed", rf"\[({NUMBER}),({NUMBER})\]", "pq"),
    ("ray", rf"\(({NUMBER}),\\infty\)", "p"),
    ("matrix", r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", "k"),
    ("choice", r"\{?\(?([A-H])\)?\}?", "n"),
    ("word", r"\{([A-Z]?[a-z]{3,})\}", "n"),
    ("decimal", r"(\d+\.\d+)", "n"),
    ("ratio", r"(\d+):(\d+)", "ab"),
    ("complex", r"(-?\d+)\+(\d+)i", "xy"),
    ("poly", r"([0-9x^{}+-]*x[0-9x^{}+-]*)", "g"),
]


def classes() -> dict[str, list[dict]]:
    """The golds of tests/data by class, each with the values that a template needs."""
    golds = []
    for name in ("grading_equal", "grading_wrong"):
        rows = map(json.loads, (DATA / f"{name}.jsonl").read_text().splitlines())
        golds += [row["gold"] for row in rows]
    found = {}
    for gold in dict.fromkeys(golds):
        for name, pattern, keys in SHAPES:
            m = re.fullmatch(pattern, gold)
            if not m or (name == "list" and re.fullmatch(r"[1-9]\d{0,2},\d{3}", gold)):
                continue
            values = dict(zip(keys, m.groups()), gold=gold)
            if name == "int" or name == "pi":
                values["m"] = str(int(m[1]) + 1)
            if name == "frac" and int(m[1]) > int(m[2]):
                whole, rest = divmod(int(m[1]), int(m[2]))
                found.setdefault("mixed", []).append(values | {"w": str(whole), "r": str(rest)})
            if (
                name in ("pair", "list", "closed")
                and m[1] == m[2]
                or name == "ratio"
                and m[1] == m[2]
            ):
                continue
            found.setdefault(name, []).append(values)
            if name != "thousand":
                break
    return found


def cases(table: dict[str, str]) -> list[tuple[str, str, str]]:
    """(kind, gold, answer) for every template of a table, on a few golds each."""
    rows = []
    golds = classes()
    for name, templates in table.items():
        # "|" separates templates where a blank stands on both sides; |AB| has none inside.
        for template in re.split(r"\s\|\s+", " ".join(templates.split())):
            start = zlib.crc32(template.encode()) % max(1, len(golds[name]))
            chosen = (golds[name][start:] + golds[name][:start])[:PER_KIND]
            for values in chosen:
                answer = re.sub(r"#([a-z])", lambda m: values[m[1]], template)
                rows.append((f"{name}: {template}", values["gold"], answer))
    return rows


def held_out(kind: str) -> bool:
    return zlib.crc32(kind.encode()) % 2 == 0


if __name__ == "__main__":
    for title, table in (("EQUAL", EQUAL), ("WRONG", WRONG)):
        seen = set()
        for kind, gold, answer in cases(table):
            if kind not in seen:
                print(title, kind, "|", gold, "<-", answer)
            seen.add(kind)
        print(title, len(seen), "kinds")
