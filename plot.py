"""Draw the curves of one or more runs, and print a table.

    python plot.py runs/a runs/b runs/c --output curves.png

Runs that differ only in their seed form a method. Its curve is the mean over the seeds at the steps
that all of them have, with a 95% band (Student's t) for three seeds or more; a panel's axis fits
the curves and may cut bands. Runs of one method and seed get a curve each. A dashed line marks the
switch from phase pretrain to rl. Folders that are no runs, such as evaluate.py's, are left out.

For each method the table has the final and the best held-out accuracy (avg@k, the mean over the
evaluation sets), the steps and seconds to reach given accuracies (on the mean curve, interpolated
between evaluations), the ratio of these steps to GRPO's, and the ratio of reflection and transition
thoughts at --at-step, interpolated too, to those at the start (the paper reports 6.54 and 14.89 at
step 20).
"""

import csv
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import tyro

import flags

NAMES = {"grpo_baseline": "GRPO", "prerl": "PreRL", "nsr_prerl": "NSR-PreRL", "dsrl": "DSRL"}
SHORT = {"warmup_steps": "S", "learning_rate": "lr"}
# In args.json beside what flags.py says; read_run() adds the folder.
NO_METHOD = {"script", "seed", "date", "context", "content", "folder"}
PICTURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
# Okabe and Ito's colours, told apart by colour-blind readers, and a line style for print.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C8C00"]
STYLES = ["-", "--", "-.", ":"]
PANELS = [  # key, title, unit
    ("reward/mean", "Training reward", "fraction correct"),
    ("completion/length", "Response length", "tokens"),
    ("policy/entropy", "Entropy of π(·|x)", "nats per token"),
    ("thoughts/reflection", "Reflection thoughts", "per response"),
    ("thoughts/transition", "Transition thoughts", "per response"),
    ("sync/logprob_gap", "Sync gap |trainer − sampler|", "nats per token"),
    ("time/step", "Time per step", "seconds"),
]
# 97.5% quantiles of Student's t for 1 to 10 degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    output: Path = Path("curves.png")
    """picture to write"""
    csv: Path | None = None
    """CSV file to write the table to, as well"""
    thresholds: tuple[float, ...] = ()
    """accuracies to reach; default: 50, 80 and 95% of GRPO's best, or of the best without GRPO"""
    at_step: int = 20
    """step at which thoughts are compared with the start (paper: 20)"""


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_outputs(args: Args) -> None:
    """Refuse a picture or table that cannot be written, and make the folders for them."""
    if args.output.suffix.lower() not in PICTURES:
        fail(f"--output {args.output}: a picture's name must end in {', '.join(PICTURES)}")
    for flag, file in (("output", args.output), ("csv", args.csv)):
        if file and (reason := flags.unwritable(file)):
            fail(f"--{flag} {file} cannot be written: {reason}")


def no_run(folder: Path) -> str:
    """Why the folder is not that of a run with a step; "" if it is."""
    for name in ("args.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            return f"it has no {name}"
    if not (folder / "metrics.jsonl").stat().st_size:
        return "its metrics.jsonl is empty, as no step has ended yet"
    return ""


def read_runs(folders: list[Path]) -> list[tuple[dict, list]]:
    """read_run() of each folder, once; folders of other programs, which runs/* has, are left out.

    Refuses a folder that does not exist, and folders of which none is a run.
    """
    different = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    for folder in different:
        if not folder.exists():
            fail(f"{folder} is not the folder of a run: it does not exist")
    reasons = {folder: no_run(folder) for folder in different}
    others = [f"{folder} ({reason})" for folder, reason in reasons.items() if reason]
    if len(others) == len(different):
        fail(f"{different[0]} is not the folder of a run: {reasons[different[0]]}")
    if others:
        print(f"no runs, so left out: {', '.join(others)}")
    return [read_run(folder) for folder, reason in reasons.items() if not reason]


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """The flags in args.json, with the folder, and the rows of metrics.jsonl."""
    try:
        args = json.loads((folder / "args.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut
    except json.JSONDecodeError as error:
        fail(f"{folder}: broken JSON in args.json or metrics.jsonl ({error})")
    if not rows:
        fail(f"{folder}: broken JSON in metrics.jsonl, whose only line is cut")
    args.setdefault("script", folder.resolve().name.split("__")[0])
    return args | {"folder": str(folder)}, rows


def group_runs(runs: list[tuple[dict, list]]) -> dict[str, list[tuple[dict, list]]]:
    """Runs by method: the script's name and the flags in which its runs differ."""
    groups = {}
    for args, rows in runs:
        peers = [other for other, _ in runs if other["script"] == args["script"]]
        label = NAMES.get(args["script"], args["script"])
        ignored = NO_METHOD | flags.changeable(args["script"])
        for flag, value in args.items():
            others = [other.get(flag) for other in peers]
            if flag not in ignored and any(other != value for other in others):
                label += f", {SHORT.get(flag, flag.replace('_', '-'))} {short(value, others)}"
        groups.setdefault(label, []).append((args, rows))
    return groups


def separate_repeats(groups: dict) -> dict:
    """Groups in which no seed repeats: such runs get a curve each, with their folder's name."""
    result = {}
    for label, group in groups.items():
        seeds = {args.get("seed") for args, _ in group}
        folders = [args["folder"] for args, _ in group]
        for run, folder in zip(group, folders):
            name = label if len(seeds) == len(group) else f"{label}, {short(folder, folders)}"
            result.setdefault(name, []).append(run)
    return result


def note_short_runs(groups: dict) -> None:
    """Print a line for each run that ends before others of its method."""
    for label, group in groups.items():
        ends = {args["folder"]: last_step(rows) for args, rows in group}
        for folder, end in ends.items():
            if end == min(ends.values()) < max(ends.values()):
                print(f"{label}: {folder} ends at step {end}, and so do the means over seeds")


def last_step(rows: list[dict]) -> int:
    return max(row["step"] for row in rows)


def short(value, others: list) -> str:
    """The last parts of a path, as few as tell it from the other paths.

    >>> short("a/model", ["a/model", "b/base"]), short("a/model", ["a/model", "b/model"])
    ('model', 'a/model')
    """
    if isinstance(value, list):
        return " ".join(map(str, value))
    if not isinstance(value, str):
        return f"{value}"
    parts = value.rstrip("/").split("/")
    for n in range(1, len(parts)):
        name = "/".join(parts[-n:])
        same_end = [f"/{other}".rstrip("/").endswith(f"/{name}") for other in {*others} - {value}]
        if not any(same_end):
            return name
    return value


def curve(group: list, pick) -> list[tuple[float, float, float]]:
    """[(step, mean over seeds, half-width of the 95% band)] of the finite values of pick(row).

    Only of steps at which every run has a value, as a mean over fewer seeds would make a jump. Runs
    without any value do not count.
    """
    runs = []
    for _, rows in group:
        picked = {row["step"]: pick(row) for row in rows}
        runs.append({s: v for s, v in picked.items() if v is not None and math.isfinite(v)})
    runs = [run for run in runs if run]
    points = []
    for step in sorted(set.intersection(*map(set, runs)) if runs else []):
        values = [run[step] for run in runs]
        points.append((step, mean(values), half_width(values)))
    return points


def half_width(values: list[float]) -> float:
    """Half of the width of the mean's 95% interval (Student's t); 0 for a single value.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    n = len(values)
    if n < 2:
        return 0.0
    t = T[n - 2] if n - 2 < len(T) else 1.96 + 2.6 / (n - 1)  # to 1% from 11 degrees on
    return t * stdev(values) / n**0.5


def accuracy(row: dict) -> float | None:
    """Mean of avg@k over the evaluation sets."""
    values = [value for key, value in row.items() if re.fullmatch(r"eval/.*/avg@\d+", key)]
    return mean(values) if values and None not in values else None


def reached(points: list[tuple], threshold: float) -> float | None:
    """The first step at which the curve, interpolated linearly, reaches the threshold, or None.

    >>> reached([(0, 0.2, 0), (10, 0.4, 0), (20, 0.8, 0)], 0.5)
    12.5
    """
    for i, (step, value, *_) in enumerate(points):
        if value >= threshold:
            if i == 0:
                return float(step)
            step0, value0 = points[i - 1][:2]
            return step0 + (step - step0) * (threshold - value0) / (value - value0)
    return None


def seconds_to(group: list, step: float) -> float:
    """Seconds of the steps up to `step`, which may be a fraction: the mean over seeds.

    Of the runs that reach the step; curve() makes sure that some do.
    """
    totals = []
    for _, rows in group:
        if last_step(rows) < step:
            continue
        times = [(row["step"], row["time/step"]) for row in rows if row.get("time/step")]
        totals.append(sum(t * min(1.0, max(0.0, step - (s - 1))) for s, t in times))
    return mean(totals)


def multiple(group: list, kind: str, at_step: int) -> float | None:
    """The ratio of a kind of thoughts at `at_step`, interpolated linearly, to those at the start.

    Thoughts are counted in the evaluations (start: step 0), or without evaluations in the training
    samples (start: step 1, before any update). None if there are none at the start, or if the runs
    end before `at_step`.
    """

    def on_eval(row):
        values = [v for k, v in row.items() if k.startswith("eval/") and k.endswith(kind)]
        return mean(values) if values else None

    points = curve(group, on_eval) or curve(group, lambda row: row.get(kind))
    if not points or not points[0][1] or not points[0][0] <= at_step <= points[-1][0]:
        return None
    (step0, value0), (step1, value1) = (
        max(p[:2] for p in points if p[0] <= at_step),
        min(p[:2] for p in points if p[0] >= at_step),
    )
    share = (at_step - step0) / (step1 - step0) if step1 > step0 else 0.0
    return (value0 + share * (value1 - value0)) / points[0][1]


def table(groups: dict, thresholds: tuple[float, ...], at_step: int) -> list[list[str]]:
    """The table as lists of cells: a header, then a row for each method."""
    curves = {label: curve(group, accuracy) for label, group in groups.items()}
    base = next((label for label in groups if label.split(",")[0] == "GRPO"), None)
    best = [max(p[1] for p in curves[label]) for label in groups if curves[label]]
    if not thresholds and best:
        top = max(p[1] for p in curves[base]) if base and curves[base] else max(best)
        thresholds = tuple(share * top for share in (0.5, 0.8, 0.95))
    header = ["method", "seeds", "final", "best"]
    for threshold in thresholds:
        header += [f"steps to {threshold:.3f}", "seconds", "vs GRPO"]
    header += [f"reflections at {at_step}", f"transitions at {at_step}"]
    lines = [header]
    for label, group in groups.items():
        points = curves[label]
        count = sum(bool(curve([run], accuracy)) for run in group)  # that the accuracy is of
        line = [label, str(count or len(group))]
        line += (
            [f"{points[-1][1]:.3f}", f"{max(p[1] for p in points):.3f}"] if points else 2 * ["-"]
        )
        for threshold in thresholds:
            step = reached(points, threshold)
            other = reached(curves[base], threshold) if base else None
            line += (
                ["-", "-"] if step is None else [f"{step:.1f}", f"{seconds_to(group, step):.0f}"]
            )
            line.append(f"{step / other:.2f}x" if step and other else "-")
        for kind in ("thoughts/reflection", "thoughts/transition"):
            times = multiple(group, kind, at_step)
            line.append("-" if times is None else f"{times:.2f}x")
        lines.append(line)
    return lines


def switch_of(rows: list[dict]) -> int | None:
    """The last step of phase pretrain, if a step of phase rl follows it."""
    phases = {row["step"]: row["phase"] for row in rows if "phase" in row}
    return next((s for s in phases if (phases[s], phases.get(s + 1)) == ("pretrain", "rl")), None)


def draw_panels(groups: dict, output: Path) -> None:
    """One panel for each metric that the runs have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    keys = {key for group in groups.values() for _, rows in group for row in rows for key in row}
    evals = sorted(k for k in keys if re.fullmatch(r"eval/.*/(avg|pass)@\d+", k))
    title = "Held-out {2}: {1}"  # of eval/NAME/avg@k
    panels = [(k, title.format(*k.split("/")), "fraction correct") for k in evals]
    panels += [panel for panel in PANELS if panel[0] in keys]
    columns = 3
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(14, 3.3 * lines), layout="constrained", squeeze=False
    )
    handles, seeds = {}, {}  # by method; seeds: in each panel
    for axis, (key, title, unit) in zip(axes.flat, panels):
        bands = []
        for i, (label, group) in enumerate(groups.items()):
            points = curve(group, lambda row: row.get(key))
            if not points:
                continue
            count = sum(any(row.get(key) is not None for row in rows) for _, rows in group)
            seeds.setdefault(label, set()).add(count)
            colour, style = COLOURS[i % 8], STYLES[(i // 8 + i) % 4]
            steps, middle, half = zip(*points)
            marker = "o" if key.startswith("eval/") else None
            (handles[label],) = axis.plot(
                steps, middle, color=colour, linestyle=style, marker=marker, markersize=4, lw=1.6
            )
            if count > 2:  # Student's t makes the band of two wider than the picture
                bands.append((steps, middle, half, colour))
            switch = switch_of(group[0][1])
            if switch and max(steps) > switch:
                axis.axvline(switch, color=colour, linestyle=(0, (2, 3)), lw=1)
                axis.annotate(
                    f"S = {switch}",
                    (switch, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, -9),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
        if key == "sync/logprob_gap":
            axis.set_yscale("log")
        limits = axis.get_ylim()  # of the curves: a wide band would dwarf them
        for steps, middle, half, colour in bands:
            low, high = ([m + sign * h for m, h in zip(middle, half)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_ylim(limits)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    names = []
    for label, counts in seeds.items():
        few, many = min(counts), max(counts)
        number = f"{few} to {many}" if few < many else str(few)
        names.append(f"{label} ({number} seed{'s' if many > 1 else ''})")
    figure.legend(
        handles.values(), names, loc="outside upper center", ncols=min(4, len(names)), frameon=False
    )
    figure.savefig(output, dpi=100)
    plt.close(figure)


def draw(folders: list[Path], output: Path, thresholds=(), at_step: int = 20) -> list[list[str]]:
    """Draw the runs in `folders` to the file `output`. Returns the table, header first."""
    groups = separate_repeats(group_runs(read_runs(folders)))
    note_short_runs(groups)
    order = list(NAMES.values())  # the scripts' order, whichever way the folders came
    rank = {name: i for i, name in enumerate(order)}
    groups = dict(sorted(groups.items(), key=lambda item: rank.get(item[0].split(",")[0], 9)))
    draw_panels(groups, output)
    return table(groups, thresholds, at_step)


def aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def main(args: Args) -> None:
    if not args.runs:
        fail("no run is given: name the folder of at least one run")
    check_outputs(args)
    lines = draw(list(args.runs), args.output, args.thresholds, args.at_step)
    print(aligned(lines))
    print(f"curves in {args.output}")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows(lines)


if __name__ == "__main__":
    main(tyro.cli(Args))
