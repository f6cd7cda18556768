"""The study's pictures, for study/report.py. Seeds are thin lines; their mean is a thick line.

A line's name is at its end, in its colour. Colours are Okabe and Ito's, which colour-blind readers
can tell apart, and each method has a line style too.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

BLACK, GREEN, BLUE, RED = "#000000", "#009E73", "#0072B2", "#D55E00"
PINK, ORANGE, GREY = "#CC79A7", "#E69F00", "#777777"
DARK = {PINK: "#8F4A70", ORANGE: "#8A5F00", GREEN: "#007556", GREY: "#555555"}  # of names on white
LOOKS = {  # variant: its name in the prose, colour, line style
    "grpo": ("GRPO", BLACK, "-"),
    "prerl": ("PreRL", GREEN, "--"),
    "nsr-prerl": ("NSR-PreRL", BLUE, "-."),
    "dsrl-10": ("DSRL", RED, (0, (4, 1, 1, 1, 1, 1))),
    "psr-rl": ("PSR-RL", ORANGE, "--"),
    "nsr-rl": ("NSR-RL", PINK, "-."),
    "psr-prerl": ("PSR-PreRL", ORANGE, "--"),
    "nsr-prerl-every-wrong": ("all incorrect,\nA = −1", RED, ":"),
    "nsr-prerl-late": ("without first\n8 tokens", PINK, "--"),
    "dsrl-5": ("S = 5", GREEN, "--"),
    "dsrl-20": ("S = 20", BLUE, "-."),
    "dsrl-40": ("S = 40", PINK, "--"),
    "nsr-rl-then-rl": ("NSR-RL first", GREY, "--"),
    "grpo-1e-3": ("GRPO", BLACK, "-"),
    "prerl-1e-3": ("PreRL", GREEN, "--"),
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "figure.titlesize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def draw(
    path: Path, title: str, panels: list[tuple], columns: int, height: float, looks=LOOKS
) -> None:
    """Draw panels, (title, unit, {variant: seeds}, options of panel()) each, to `path`."""
    with plt.rc_context(STYLE):
        rows = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(10.5, height * rows + 0.4), layout="constrained", squeeze=False
        )
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        for axis, (name, unit, curves, options) in zip(axes.flat, panels):
            panel(axis, name, unit, curves, looks=looks, **options)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.canvas.draw()  # the layout is fixed before the names are set apart
        for axis in axes.flat[: len(panels)]:
            set_apart(axis)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def panel(
    axis, name: str, unit: str, curves: dict, looks: dict, limits=None, mark=None, width=0.34
) -> None:
    """Draw curves with their names at the line ends.

    Args:
        curves: {variant: [[(step, value), ...] of each seed]}.
        limits: (lowest, highest) value of the y axis.
        mark: (step, text) of a vertical line.
        width: width of the space for the names, as a fraction of the x axis.
    """
    axis.names = []
    for variant, seeds in curves.items():
        label, colour, style = looks[variant]
        for points in seeds if len(seeds) > 1 else ():
            axis.plot(*zip(*points), color=colour, lw=0.8, alpha=0.55)
        middle = average(seeds)
        axis.plot(*zip(*middle), color=colour, linestyle=style, lw=2.1)
        axis.names.append((label, colour, *middle[-1]))
    end = max(x for *_, x, _ in axis.names)
    axis.set_xlim(0, end * (1 + width))
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= end])
    if limits:
        axis.set_ylim(limits)
    if mark:
        axis.axvline(mark[0], color="#666666", linestyle=(0, (1, 2)), lw=1)
        axis.annotate(
            mark[1], (mark[0], 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
            textcoords="offset points", fontsize=8.5, color="#444444",
        )  # fmt: skip
    axis.set_title(name, loc="left")
    axis.set_xlabel("step")
    axis.set_ylabel(unit)


def average(seeds: list[list[tuple]]) -> list[tuple[float, float]]:
    """The mean curve, at the steps that all seeds have.

    >>> average([[(0, 1.0), (10, 2.0)], [(0, 3.0)]])
    [(0, 2.0)]
    """
    values = [dict(points) for points in seeds]
    steps = [x for x in values[0] if all(x in other for other in values)]
    return [(x, sum(v[x] for v in values) / len(values)) for x in steps]


def set_apart(axis) -> None:
    """Write the names next to the line ends without overlap, each with a hairline to its end."""
    low, high = axis.get_ylim()
    pixels = axis.get_window_extent().height * 72 / axis.figure.dpi  # height in points
    line = 11.5 * (high - low) / pixels  # of text, in the y axis' units
    names = sorted(axis.names, key=lambda name: name[3])
    half = [line * (1 + name[0].count("\n")) / 2 for name in names]
    at = spread([name[3] for name in names], half, low, high)
    left, right = axis.get_xlim()
    for (label, colour, x, y), place in zip(names, at):
        start, step = x + 0.015 * (right - left), 0.045 * (right - left)
        axis.plot([start, start + step], [y, place], color=colour, lw=0.6, clip_on=False)
        axis.text(
            start + 1.2 * step, place, label, color=DARK.get(colour, colour), weight="bold",
            va="center", fontsize=9.5, linespacing=1.0,
        )  # fmt: skip


def spread(wanted: list[float], half: list[float], low: float, high: float) -> list[float]:
    """Places near `wanted` (rising) at which texts do not overlap; `half` are half their heights.

    >>> spread([0.0, 0.9, 1.0], [0.1, 0.1, 0.1], 0.0, 1.0)
    [0.1, 0.7, 0.9]
    """
    places, floor = [], low
    for y, h in zip(wanted, half):
        places.append(max(y, floor + h))
        floor = places[-1] + h
    ceiling = high
    for i in reversed(range(len(places))):
        places[i] = round(min(places[i], ceiling - half[i]), 6)
        ceiling = places[i] - half[i]
    return places


def draw_pass_against_avg(path: Path, worlds: dict) -> None:
    """Draw pass@8 against avg@8 on `hard`, for all evaluations of the first 30 steps, by method."""
    kinds = {  # name: variants, colour, marker
        "GRPO, PreRL": (r"grpo|prerl|sweep-(grpo_baseline|prerl)-.*", BLACK, "o"),
        "PSR-RL, PSR-PreRL": (r"psr-(rl|prerl)", ORANGE, "^"),
        "NSR-RL": (r"nsr-rl", PINK, "s"),
        "NSR-PreRL": (r"nsr-prerl.*|sweep-nsr_prerl-.*", BLUE, "D"),
        "DSRL": (r"dsrl-\d+|sweep-dsrl-.*", RED, "v"),
    }
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 4.8), layout="constrained")
        outside = 0
        for label, (pattern, colour, marker) in kinds.items():
            found = [
                (row["hard avg@8"], row["hard pass@8"])
                for variants in (worlds["lab"], worlds["harder"])
                for name, seeds in variants.items()
                for rows in seeds.values()
                for row in rows
                if re.fullmatch(pattern, name) and "hard avg@8" in row and 0 < row["step"] <= 30
            ]
            outside += sum(x < 0.15 for x, _ in found)
            axis.scatter(
                *zip(*found), facecolors="none", edgecolors=colour, marker=marker, s=34, lw=1.3,
                label=label, clip_on=False,
            )  # fmt: skip
        axis.set_xlim(0.15, 1.005)
        axis.set_ylim(0.55, 1.01)
        axis.set_xlabel("avg@8, problems of 6 to 8 steps")
        axis.set_ylabel("pass@8, the same problems")
        axis.text(0.46, 0.765, "NSR-PreRL on its way down", color=BLUE, weight="bold")
        axis.text(0.16, 0.56, f"not shown: evaluations at (0, 0): {outside}", color="#444444")
        axis.legend(frameon=False, loc="lower right")
        title = "At equal avg@8, no method's pass@8 stands out"
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_forecast(path: Path, title: str, gains: dict, leads: dict) -> None:
    """Left the careful mode, right accuracy.

    Args:
        gains: {(method, base): [(foretold, measured)]}.
        leads: {(world, base): (forecast, lead)}.
    """
    markers = {"1": "o", "2": "D"}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.8), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        for (method, base), points in gains.items():
            name, colour, _ = LOOKS[method]
            label = f"{name}, base {base}"
            left.plot(*zip(*points), markers[base], color=colour, mfc="none", mew=1.5, label=label)
        left.axline((0, 0), slope=1, color="#666666", lw=1)
        left.set_xlabel("foretold: 5 steps × 0.03 × the first gradient's gain")
        left.set_ylabel("measured after 5 steps")
        left.set_title("Rise of the log-odds of the careful mode, given x", loc="left")
        left.legend(frameon=False)
        colours = {"1": GREEN, "2": RED}
        for base, colour in colours.items():
            points = [point for (_, b), point in leads.items() if b == base]
            if points:
                right.plot(*zip(*points), markers[base], color=colour, label=f"base {base}")
        right.axhline(0, color="#666666", lw=1)
        right.axvline(1, color="#666666", lw=1)
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter("{x:g}")
        right.margins(x=0.18, y=0.1)
        right.set_xlabel("NSR-PreRL's first gain, GRPO's = 1")
        right.set_title("DSRL's lead over GRPO in avg@8 at step 10", loc="left")
        right.legend(frameon=False, loc="lower left")
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.canvas.draw()  # the layout is fixed before the names are placed
        name_points(right, [(n, x, y, colours[b]) for (n, b), (x, y) in leads.items()])
        figure.savefig(path, dpi=150)
        plt.close(figure)


def name_points(axis, points: list[tuple[str, float, float, str]]) -> None:
    """Write each point's name beside it, (name, x, y, colour), where no other name or point is."""
    places = [(dx, dy) for dy in (0, 9, -9, 16, -16) for dx in (7, -7)] + [(0, 12), (0, -12)]
    at = axis.transData.transform([(x, y) for _, x, y, _ in points])
    taken = []
    for name, x, y, colour in points:
        for dx, dy in places:
            text = axis.annotate(
                name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8.5,
                ha="center" if dx == 0 else "left" if dx > 0 else "right", va="center",
                color=DARK.get(colour, colour),
            )  # fmt: skip
            box = text.get_window_extent()
            clear = not any(box.overlaps(other) for other in taken)
            if clear and not any(box.contains(*place) for place in at):
                break
            text.remove()
        else:  # beside its point all the same
            text = axis.annotate(
                name, (x, y), xytext=(7, 0), textcoords="offset points", fontsize=8.5
            )
        taken.append(text.get_window_extent())
