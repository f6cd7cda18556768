"""Make the study's tables and pictures from study/results/*.csv: `make study`.

    python study/report.py

It fills the marked tables in docs/study.md and study/tables.md, and draws docs/study/*.png.
"""

import math
import re
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plot
from docs.generate import fill
from study import pictures, smollm, switch
from study.experiments import (
    GUARD,
    KS,
    RECORDED,
    RESULTS,
    ROOT,
    SAMPLES,
    SWEEP_SEED,
    VARIANTS,
    WORLD_VARIANTS,
    WORLDS,
    held_out,
    read_csv,
)

PICTURES = ROOT / "docs" / "study"
NAMES = {  # of the variants, as the prose has them
    "grpo": "GRPO",
    "dr-grpo": "Dr.GRPO",
    "no-std": "GRPO, A = r − mean",
    "rloo": "RLOO",
    "reinforce++": "Reinforce++",
    "psr-rl": "PSR-RL",
    "nsr-rl": "NSR-RL",
    "w-reinforce": "W-REINFORCE",
    "grpo-microbatch-mean": "GRPO, mean per micro-batch",
    "prerl": "PreRL",
    "psr-prerl": "PSR-PreRL",
    "nsr-prerl": "NSR-PreRL",
    "nsr-prerl-every-wrong": "NSR-PreRL, all incorrect, A = −1",
    "nsr-prerl-late": "NSR-PreRL, first 8 tokens left out",
    "nsr-rl-then-rl": "NSR-RL, then GRPO",
    "dsrl-10-reset": "DSRL, S = 10, optimiser reset",
    "dsrl-10-two-rates": "DSRL, S = 10, learning rate 3e-4, then 1e-3",
    "grpo-1e-3": "GRPO, 1e-3, 150 steps",
    "prerl-1e-3": "PreRL, 1e-3, 150 steps",
    "dsrl-3-1e-3": "DSRL, S = 3, 1e-3",
    "prerl-positive-0.1": "PreRL, positives × 0.1",
    **{f"dsrl-{s}": f"DSRL, S = {s}" for s in (5, 10, 20, 40)},
}
SHOWN = ("grpo", "prerl", "nsr-prerl", "nsr-prerl-late", "dsrl-10")
SHOWN += ("prerl-positive-0.1", "nsr-rl-then-rl", "grpo-1e-3", "dsrl-10-two-rates")
THRESHOLDS = (0.5, 0.8, 0.9)
DIFFERS = {  # what a world changes, in words
    "lab": "the study's world",
    "short": "no restated problem",
    "down": "short, steps count down",
    "tag": "more to restate",
    "paired": "never y without x",
    "rare": "careful mode 1%",
    "sloppy": "more mistakes",
    "seed2": "another base model",
    "harder": "6 to 8 steps",
}


# ------------------------------------------------------------------------------------- the results


def read_results() -> tuple[dict, dict]:
    """{variant: {seed: rows}} of study.csv, and {variant: [{k: pass@k} of each seed]}."""
    runs, finals = {}, {}
    for row in read_csv("study"):
        name, seed = row.pop("variant"), int(row.pop("seed"))
        runs.setdefault(name, {}).setdefault(seed, []).append(numbers(row))
    for row in read_csv("study_pass64"):
        finals.setdefault(row["variant"], []).append({k: float(row[str(k)]) for k in KS})
    return runs, finals


def read_worlds(lab_runs: dict) -> dict:
    """{world: {variant: {seed: rows}}} of worlds.csv; "lab" also has the study's runs."""
    runs = {world: {} for world in WORLDS} | {"lab": dict(lab_runs)}
    for row in read_csv("worlds"):
        world, name, seed = row.pop("world"), row.pop("variant"), int(row.pop("seed"))
        runs[world].setdefault(name, {}).setdefault(seed, []).append(numbers(row))
    return runs


def read_smollm() -> dict:
    """{variant: {seed: rows}} of smollm.csv."""
    runs = {name: {} for name in smollm.VARIANTS}
    for row in read_csv("smollm"):
        name, seed = row.pop("variant"), int(row.pop("seed"))
        runs[name].setdefault(seed, []).append(numbers(row))
    return runs


def read_switch() -> dict:
    """{(world, method, optimizer): {(base, seed): rows}} of switch.csv; empty before its runs.

    Steps that only warm an optimiser's moments are not counted.
    """
    runs, columns = {}, ("world", "method", "optimizer")
    if not (RESULTS / "switch.csv").exists():
        return runs
    for row in read_csv("switch"):
        name, pair = tuple(row.pop(key) for key in columns), (row.pop("base"), row.pop("seed"))
        row = numbers(row)
        row["step"] -= switch.OPTIMIZERS[name[2]].idle
        if row["step"] >= 0:
            runs.setdefault(name, {}).setdefault(pair, []).append(row)
    return runs


def numbers(row: dict) -> dict:
    """A row's values as numbers, without those that are missing."""
    return {k: v if k == "phase" else float(v) for k, v in row.items() if v}


def at(rows: list[dict], column: str, step: int) -> float | None:
    return next((row.get(column) for row in rows if row["step"] == step), None)


def last(rows: list[dict], column: str) -> float:
    return [row[column] for row in rows if column in row][-1]


def points(rows: list[dict], column: str) -> list[tuple[float, float]]:
    return [(row["step"], row[column]) for row in rows if column in row]


def multiple(rows: list[dict], column: str) -> float | None:
    """Ratio of a kind of thoughts at step 20 to that at step 0; None without either."""
    before, after = at(rows, column, 0), at(rows, column, 20)
    return after / before if before and after is not None else None


# -------------------------------------------------------------------------------------- the tables


def interval(values: list[float | None], digits: int = 3, widest: float = 0.5) -> str:
    """Mean ± half of the 95% interval over seeds (Student's t), or each seed's value.

    Each seed's value is shown if half of the interval is more than `widest` times the mean, or if a
    value is missing: the mean would then describe no seed.

    >>> interval([0.5, 0.6, 0.7]), interval([0.5]), interval([0.5, None])
    ('0.600 ± 0.248', '0.500', '0.500, -')
    >>> interval([0.14, 0.38, 0.79], 2), interval([])
    ('0.14, 0.38, 0.79', '-')
    """
    if len(values) < 2 or None in values or plot.half_width(values) > widest * mean(values):
        return each(values, digits, ", ") or "-"
    return f"{mean(values):.{digits}f} ± {plot.half_width(values):.{digits}f}"


def each(values: list[float | None], digits: int = 2, between: str = " ") -> str:
    """The values of all seeds; "-" for a missing one.

    >>> each([0.5, None, 0.975]), each([])
    ('0.50 - 0.97', '')
    """
    return between.join("-" if v is None else f"{v:.{digits}f}" for v in values)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


ACCURACY = ["step 20", "best", "end", "hard, end", "hard pass@8, end", "hard pass@64, end"]
ACCURACY += [f"steps to {threshold}" for threshold in THRESHOLDS]


def accuracy_table(runs: dict, finals: dict, names=tuple(VARIANTS), columns=ACCURACY) -> str:
    lines = []
    for name in names:
        seeds = list(runs[name].values())
        curves = [points(rows, "lab avg@8") for rows in seeds]
        cells = {
            "step 20": [at(rows, "lab avg@8", 20) for rows in seeds],
            "best": [max(v for _, v in curve) for curve in curves],
            "end": [last(rows, "lab avg@8") for rows in seeds],
            "hard, end": [last(rows, "hard avg@8") for rows in seeds],
            "hard pass@8, end": [last(rows, "hard pass@8") for rows in seeds],
            "hard pass@64, end": [final[64] for final in finals.get(name, [])],
        }
        cells = {column: interval(values, widest=0.25) for column, values in cells.items()}
        for threshold in THRESHOLDS:
            steps = [plot.reached(curve, threshold) for curve in curves]
            cells[f"steps to {threshold}"] = interval(steps, 1)
        lines.append([NAMES[name], *(cells[column] for column in columns)])
    return markdown(["", *columns], lines)


def shape_table(runs: dict) -> str:
    header = ["", "length, 0 → end", "entropy, 1 → end", "reflections × at 20"]
    header += ["transitions × at 20", "seconds in steps"]
    lines = []
    for name in VARIANTS:
        seeds = list(runs[name].values())
        line = [NAMES[name]]
        for column, digits in (("lab length", 0), ("entropy", 2)):
            ends = interval([last(rows, column) for rows in seeds], digits)
            line.append(f"{points(seeds[0], column)[0][1]:.{digits}f} → {ends}")
        for column in ("lab reflection", "lab transition"):
            line.append(interval([multiple(rows, column) for rows in seeds], 1))
        line.append(interval([sum(row.get("seconds", 0) for row in rows) for rows in seeds], 0))
        lines.append(line)
    return markdown(header, lines)


def thoughts_table(runs: dict) -> str:
    """Each seed's ratios of the two thoughts to the start, at step 20 and at the end."""
    header = ["", "reflections × at 20", "at 60", "transitions × at 20", "at 60"]
    lines = []
    for name in ("grpo", "prerl", "nsr-prerl", "dsrl-10", "nsr-rl"):
        line = [NAMES[name]]
        for column in ("lab reflection", "lab transition"):
            seeds = list(runs[name].values())
            line.append(each([multiple(rows, column) for rows in seeds], 1, ", "))
            ends = [last(rows, column) / at(rows, column, 0) for rows in seeds]
            line.append(each(ends, 1, ", "))
        lines.append(line)
    return markdown(header, lines)


def sweep_table(runs: dict) -> str:
    """Held-out avg@8 by learning rate: mean over a run's evaluations (best, last)."""
    rates = ("1e-4", "3e-4", "1e-3")
    lines = []
    for script, label in plot.NAMES.items():
        rows = [runs[f"sweep-{script}-{rate}"][SWEEP_SEED] for rate in rates]
        values = [[v for _, v in points(r, "lab avg@8")][1:] for r in rows]
        lines.append([label, *(f"{mean(v):.3f} ({max(v):.3f}, {v[-1]:.3f})" for v in values)])
    return markdown(["mean (best, last)", *rates], lines)


def samples_table() -> str:
    """Each seed's fractions of the last step's training samples: SAMPLES."""
    rows, lines = read_csv("study_samples"), []
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        lines.append([NAMES[name], *(each([float(row[key]) for row in own]) for key in SAMPLES)])
    header = [key.replace("its own", "the restated problem") for key in SAMPLES]
    return markdown(["", *header], lines)


def bases_table() -> str:
    """A column per world: metrics of its base model, and gradients of that model's responses."""
    rows = sorted(read_csv("worlds_bases"), key=lambda row: list(WORLDS).index(row["world"]))
    keys = [key for key in rows[0] if key != "world"]
    lines = [[key, *(f"{float(row[key]):.3f}" for row in rows)] for key in keys]
    for line in lines:
        line[0] = re.sub("^their (fraction .*)", r"\1 in these tokens", line[0])
    return markdown(["", *(f"`{row['world']}`" for row in rows)], lines)


def worlds_table(runs: dict) -> str:
    """Each seed's values in each world, on held-out problems like those of training."""
    header = ["world", "", "step 20", "end", "steps to 0.5", "steps to 0.8"]
    header += ["reflections × at 20", "transitions × at 20", "hard avg@8 and pass@8, step 10"]
    header += ["restated, last step"]
    samples = read_csv("worlds_samples")
    samples += [{"world": "lab", **row} for row in read_csv("study_samples")]
    lines = []
    for world in WORLDS:
        on = held_out(world)
        for name in [name for name in WORLD_VARIANTS if name in SHOWN and runs[world].get(name)]:
            seeds = list(runs[world][name].values())
            curves = [points(rows, f"{on} avg@8") for rows in seeds]
            own = [row for row in samples if (row["world"], row["variant"]) == (world, name)]
            line = [
                each([at(rows, f"{on} avg@8", 20) for rows in seeds]),
                each([curve[-1][1] for curve in curves]),
                *(each([plot.reached(c, t) for c in curves], 0) for t in THRESHOLDS[:2]),
                each([multiple(rows, f"{on} reflection") for rows in seeds], 1),
                each([multiple(rows, f"{on} transition") for rows in seeds], 1),
                f"{each([at(rows, 'hard avg@8', 10) for rows in seeds])}, "
                f"{each([at(rows, 'hard pass@8', 10) for rows in seeds])}",
                each([float(row["restated"]) for row in own]),
            ]
            lines.append([f"`{world}`", NAMES[name], *line])
    return markdown(header, lines)


def guard_table(runs: dict) -> str:
    """Each seed's gain in held-out avg@8 over the 12 steps of tests/test_learning.py."""
    lines = []
    for name in GUARD:
        gains = [last(rows, "lab avg@8") - at(rows, "lab avg@8", 0) for rows in runs[name].values()]
        lines.append([f"`{name}`", each(gains, 3, ", ")])
    return markdown(["run", "gain of each seed"], lines)


def commands_table() -> str:
    """Each variant's name, its name in the CSV files, and its command line."""
    commands = {name: f"`{line}`" for name, line in WORLD_VARIANTS.items()}
    commands |= dict.fromkeys(RECORDED, "of revision 79819ce, which had its flag")
    lines = [[NAMES[name], f"`{name}`", command] for name, command in commands.items()]
    return markdown(["", "in the CSV files", "command, after --preset lab"], lines)


def smollm_table(runs: dict) -> str:
    """SmolLM2's only seed: held-out accuracy, and metrics of the training samples."""
    header = ["", "avg@4, 0 → end", "pass@4, 0 → end"]
    tens = [range(first, first + 10) for first in (1, 11, 21, 31)]
    header += [f"reward, steps {ten[0]}–{ten[-1]}" for ten in tens]
    header += ["length, 1 → end", "truncated, end", "entropy, 1 → end", "log π, 1 → end"]
    header += ["reflections per response, most in a step", "transitions"]
    lines = []
    for name, seeds in runs.items():
        (rows,) = seeds.values()

        def both(column: str, first: int, digits: int = 3) -> str:
            return f"{at(rows, column, first):.{digits}f} → {last(rows, column):.{digits}f}"

        line = [NAMES[name], both("avg@4", 0), both("pass@4", 0)]
        line += [f"{mean(r['reward'] for r in rows if r['step'] in ten):.3f}" for ten in tens]
        line += [both("length", 1, 1), f"{last(rows, 'truncated'):.2f}"]
        line += [both("entropy", 1, 2), both("logprob", 1, 2)]
        line += [f"{max(r.get(c, 0) for r in rows):.3f}" for c in ("reflection", "transition")]
        lines.append(line)
    return markdown(header, lines)


def responses_table() -> str:
    """The recorded responses: of the base model once, and of each method's last step."""
    first, lines = next(iter(smollm.VARIANTS)), []
    for row in read_csv("smollm_responses"):
        if row["step"] == "1" and row["variant"] != first:
            continue
        before = row["step"] == "1"
        name = "before training" if before else f"{NAMES[row['variant']]}, step {row['step']}"
        response = row["response"].replace("|", "\\|")
        correct = "yes" if float(row["reward"]) else "no"
        lines.append([name, row["question"], f"`{response}`", correct])
    lines.sort(key=lambda line: line[0] != "before training")
    return markdown(["", "question", "response", "correct"], lines)


SWITCH_NAMES = NAMES | {
    "dsrl-3": "DSRL, S = 3",
    "random-rl": "random negatives, given x",
    "random-prerl": "random negatives, given BOS",
    "random-5-then-grpo": "5 steps of random negatives given BOS, then GRPO",
    "nsr-rl-5-then-grpo": "5 steps of NSR-RL, then GRPO",
    "nsr-rl-4": "NSR-RL, 4 mini-batches, clipped",
    "nsr-prerl-4": "NSR-PreRL, 4 mini-batches, clipped",
}
NOT_RUN = "No runs yet: `python study/switch.py` makes them.\n"


def switch_table(runs: dict) -> str:
    """A row a method and optimiser in the world "switch"; each value of bases and seeds."""
    header = ["", "optimiser", "base.seed", *(f"avg@8 at {step}" for step in (5, 10, 15, 20))]
    header += ["end", "pass@8 at 20", "steps to 0.8", "`Let` at 20", "p(Let\\|N) at 20"]
    header += ["p(Let\\|BOS) at 20", "reflections × at 20", "transitions × at 20"]
    header += ["length at 20", "restated at 20"]
    lines = []
    for method in switch.METHODS:
        for optimizer in switch.OPTIMIZERS:
            seeds = runs.get(("switch", method, optimizer), {})
            if not seeds:
                continue
            rows = list(seeds.values())

            def values(column: str, step: int = 20, digits: int = 2, rows=rows) -> str:
                return each([at(r, f"eval {column}", step) for r in rows], digits)

            line = [SWITCH_NAMES[method], optimizer, " ".join(map(".".join, seeds))]
            line += [values("avg@8", step) for step in (5, 10, 15, 20)]
            line += [each([last(r, "eval avg@8") for r in rows]), values("pass@8")]
            line.append(each([plot.reached(points(r, "eval avg@8"), 0.8) for r in rows], 1))
            line += [values("Let"), values("p(Let|N)"), values("p(Let|BOS)")]
            line += [
                each([multiple(r, f"eval {thought}") for r in rows], 1)
                for thought in ("reflection", "transition")
            ]
            lines.append([*line, values("length", digits=0), values("restated")])
    return markdown(header, lines) if lines else NOT_RUN


SWITCH_FEW = [*switch.MAIN, "psr-rl", "nsr-rl", "nsr-rl-5-then-grpo", "random-rl"]


def switch_few_table(runs: dict) -> str:
    """The study's argument: accuracy with steps of length 0.03."""
    columns = {f"avg@8 at {s}": lambda rows, s=s: at(rows, "eval avg@8", s) for s in (10, 20)}
    return switch_methods_table(runs, SWITCH_FEW, columns)


METHOD_COLUMNS = {
    "avg@8 at 20": lambda rows: at(rows, "eval avg@8", 20),
    "pass@8 at 5": lambda rows: at(rows, "eval pass@8", 5),
    "p(careful \\| x) at 20": lambda rows: at(rows, "eval p(Let|N)", 20),
    "reflections ×": lambda rows: multiple(rows, "eval reflection"),
    "transitions ×": lambda rows: multiple(rows, "eval transition"),
    "length at 20": lambda rows: at(rows, "eval length", 20),
}


def switch_methods_table(runs: dict, methods=tuple(switch.METHODS), columns=METHOD_COLUMNS) -> str:
    """Methods with steps of length 0.03: a base's seeds together, its columns side by side."""
    header = [""] + [f"base {base}: {name}" for base in ("1", "2") for name in columns]
    lines = []
    for method in methods:
        line = [SWITCH_NAMES[method]]
        for base in ("1", "2"):
            seeds = of_base(runs, "switch", method, base).values()
            for name, read in columns.items():
                line.append(
                    mean_and_range(map(read, seeds), 2 if "@" in name or "p(" in name else 1)
                )
        if any(cell != "-" for cell in line[1:]):
            lines.append(line)
    return markdown(header, lines) if lines else NOT_RUN


def mean_and_range(values, digits: int = 2) -> str:
    """The mean of the seeds, and their lowest and highest value.

    >>> mean_and_range([0.5, 0.75, 1.0]), mean_and_range([0.5]), mean_and_range([None])
    ('0.75 (0.50-1.00)', '0.50', '-')
    """
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
    return text


def speed(rows: list[dict]) -> float | None:
    """Mean avg@8 of the evaluations at steps 5 to 20."""
    found = [value for step, value in points(rows, "eval avg@8") if 5 <= step <= 20]
    return mean(found) if found else None


def switch_rates_table(runs: dict) -> str:
    """Speed at each rate, of each base: its seeds together."""
    header = ["optimiser"] + [f"base {b}: {SWITCH_NAMES[m]}" for b in "12" for m in switch.MAIN]
    lines = []
    for optimizer in switch.OPTIMIZERS:
        line = [optimizer]
        for base in "12":
            for method in switch.MAIN:
                seeds = of_base(runs, "switch", method, base, optimizer).values()
                line.append(mean_and_range(map(speed, seeds)))
        if any(cell != "-" for cell in line[1:]):
            lines.append(line)
    return markdown(header, lines) if lines else NOT_RUN


def switch_best_table(runs: dict) -> str:
    """Each method at its best rate: that of the highest speed, by the seeds that all rates have.

    A cell has every seed at that rate.
    """
    kinds = {"length": "steps of one length", "adamw": "AdamW"}
    header = [""] + [f"base {b}: {kind}" for b in "12" for kind in kinds.values()]
    lines = []
    for method in switch.MAIN:
        line = [SWITCH_NAMES[method]]
        for base in "12":
            for kind in kinds:
                line.append(best(runs, method, base, kind))
        if any(cell != "-" for cell in line[1:]):
            lines.append(line)
    return markdown(header, lines) if lines else NOT_RUN


def best(runs: dict, method: str, base: str, kind: str) -> str:
    """The rate of the highest speed and its seeds' speeds; "-" unless there is a choice."""
    rates = [name for name in switch.OPTIMIZERS if name.startswith(kind) and name[-1].isdigit()]
    rates = [name for name in rates if not name.startswith("adamw-batch")]
    found = {rate: of_base(runs, "switch", method, base, rate) for rate in rates}
    found = {rate: seeds for rate, seeds in found.items() if seeds}
    shared = set.intersection(*(set(seeds) for seeds in found.values())) if found else set()
    if len(found) < 2 or not shared:
        return "-"
    speeds = {
        rate: [speed(seeds[pair]) for pair in sorted(shared)] for rate, seeds in found.items()
    }
    rate = max(speeds, key=lambda name: mean(speeds[name]))
    return f"{mean_and_range(map(speed, found[rate].values()))} at {rate.removeprefix(f'{kind}-')}"


def of_base(runs: dict, world: str, method: str, base: str, optimizer: str = "length-0.03") -> dict:
    """{(base, seed): rows} of the runs from one base."""
    pairs = runs.get((world, method, optimizer), {}).items()
    return {pair: rows for pair, rows in pairs if pair[0] == base}


def read_forecasts() -> dict:
    """{(world, base): {update: figures}} of switch_updates.csv, with the base's own as "base"."""
    found = {}
    for name in ("switch_bases", "switch_updates"):
        if (RESULTS / f"{name}.csv").exists():
            for row in read_csv(name):
                base = found.setdefault((row.pop("world"), row.pop("base")), {})
                update = row.pop("update", "base")
                base[update] = {key: float(value) for key, value in row.items()}
    return found


def switch_doses_table(runs: dict) -> str:
    """A row a world and base: what the first gradients foretell, and what steps of length .03 made.

    The forecast is d log-odds of "Let" given the prompt per unit of a step's length, by the first
    update of NSR-PreRL and of GRPO.
    """
    forecasts, methods = read_forecasts(), switch.MAIN[:4]
    header = ["world", "base", "log-odds given x", "cosine of the log-odds' gradients"]
    header += ["⟨g₁, g₂⟩ < 0", "forecast: GRPO", "NSR-PreRL", "signs: GRPO", "NSR-PreRL"]
    header += [f"{what} at 20: {SWITCH_NAMES[m]}" for what in ("avg@8", "`Let`") for m in methods]
    lines = []
    for world, base in [(world, base) for world in switch.WORLDS for base in ("1", "2")]:
        found = forecasts.get((world, base))
        line = [f"`{world}`", base, *["-"] * 7]
        if found:
            own = found["base"]
            line[2:4] = [f"{own[key]:.2f}" for key in ("m(x)", "cosine of the two gradients")]
            line[4] = f"{own['fraction negative']:.1%}"
            line[5:] = [
                f"{found[update][key]:.2f}"
                for key in ("x", "x_signs")
                for update in ("GRPO", "NSR-PreRL")
            ]
        for column in ("eval avg@8", "eval Let"):
            for method in methods:
                seeds = of_base(runs, world, method, base).values()
                line.append(mean_and_range([at(rows, column, 20) for rows in seeds]))
        if any(cell != "-" for cell in line[2:]):
            lines.append(line)
    return markdown(header, lines) if lines else NOT_RUN


# ------------------------------------------------------------------------------------ the pictures


def curves(runs: dict, names: list[str], column: str) -> dict:
    """{variant: [(step, value) points of each seed]}, for the variants that have runs."""
    return {
        name: [points(rows, column) for rows in runs[name].values()]
        for name in names
        if runs.get(name)
    }


def draw_pictures(runs: dict, worlds: dict, small: dict) -> None:
    accuracy, unit = (0, 1.04), "fraction correct (avg@8)"
    switch = {"mark": (10, "DSRL: S")}

    names = ["grpo", "prerl", "nsr-prerl", "dsrl-10"]
    pictures.draw(
        PICTURES / "methods.png",
        "In the lab GRPO, PreRL and DSRL end level; NSR-PreRL is slower, and 2 of 3 seeds collapse",
        [
            (f"Held-out problems of {on}", unit, curves(runs, names, f"{key} avg@8"), options)
            for on, key, options in (
                ("3 to 6 steps", "lab", {"limits": accuracy, **switch}),
                ("6 to 8 steps", "hard", {"limits": accuracy, **switch}),
            )
        ]
        + [("Response length", "tokens", curves(runs, names, "lab length"), switch)],
        columns=3,
        height=3.1,
    )
    pictures.draw(
        PICTURES / "signs.png",
        "Negative samples alone work given x; given BOS they make most seeds collapse",
        [
            (
                "log π(y|x): the post-train space",
                unit,
                curves(runs, ["grpo", "psr-rl", "nsr-rl"], "lab avg@8"),
                {"limits": accuracy, "width": 0.3},
            ),
            (
                "log π(y|BOS): the pre-train space",
                unit,
                curves(
                    runs,
                    "prerl psr-prerl nsr-prerl nsr-prerl-late nsr-prerl-every-wrong".split(),
                    "lab avg@8",
                ),
                {"limits": accuracy, "width": 0.3},
            ),
        ],
        columns=2,
        height=3.6,
    )
    names = ["grpo", "dsrl-5", "dsrl-10", "dsrl-20", "dsrl-40", "nsr-rl-then-rl"]
    looks = pictures.LOOKS | {"dsrl-10": ("S = 10", *pictures.LOOKS["dsrl-10"][1:])}
    looks["grpo"] = ("S = 0 (GRPO)", *looks["grpo"][1:])
    pictures.draw(
        PICTURES / "warmup.png",
        "A longer warm-up delays learning and ends no higher",
        [
            (f"Held-out problems of {on}", unit, curves(runs, names, f"{key} avg@8"), options)
            for on, key, options in (
                ("3 to 6 steps", "lab", {"limits": accuracy, "width": 0.42}),
                ("6 to 8 steps", "hard", {"limits": accuracy, "width": 0.42}),
            )
        ],
        columns=2,
        height=3.6,
        looks=looks,
    )
    pictures.draw(
        PICTURES / "long.png",
        "At learning rate 1e-3 two of three seeds of PreRL collapse, none of GRPO",
        [
            (
                f"Held-out problems of {on}",
                unit,
                curves(runs, ["grpo-1e-3", "prerl-1e-3"], f"{key} avg@8"),
                {"limits": accuracy, "width": 0.22},
            )
            for on, key in (("3 to 6 steps", "lab"), ("6 to 8 steps", "hard"))
        ],
        columns=2,
        height=3.1,
    )
    names = ["grpo", "prerl", "nsr-prerl", "dsrl-10", "nsr-prerl-late"]
    pictures.draw(
        PICTURES / "worlds.png",
        "In no world is NSR-PreRL faster than GRPO; PreRL fails where y was never seen without x",
        [
            (
                f"{world}: {DIFFERS[world]}",
                "fraction correct",
                curves(worlds[world], names, f"{held_out(world)} avg@8"),
                {"limits": accuracy, "width": 0.46},
            )
            for world in WORLDS
        ],
        columns=3,
        height=2.6,
    )
    names = list(smollm.VARIANTS)
    looks = pictures.LOOKS | {"dsrl-5": ("DSRL", *pictures.LOOKS["dsrl-10"][1:])}
    pictures.draw(
        PICTURES / "smollm.png",
        "SmolLM2-135M, one seed: GRPO and DSRL learn, PreRL stays, NSR-PreRL falls to 0",
        [
            ("Held-out avg@4", "fraction correct", curves(small, names, "avg@4"), {}),
            ("Held-out pass@4", "fraction with a correct one", curves(small, names, "pass@4"), {}),
            ("Entropy of π(·|x)", "nats per token", curves(small, names, "entropy"), {}),
        ],
        columns=3,
        height=3.1,
        looks=looks,
    )
    pictures.draw_pass_against_avg(PICTURES / "pass_against_avg.png", worlds)
    draw_switch(read_switch())


def draw_switch(runs: dict) -> None:
    """The world "switch", steps of one length, a row a base; nothing before there are runs."""
    panels = []
    for base in ("1", "2"):
        own = {m: of_base(runs, "switch", m, base) for m in switch.MAIN}
        for title, column, unit in (
            (f"Base {base}: accuracy", "eval avg@8", "fraction correct (avg@8)"),
            (f"Base {base}: the careful mode, given x", "eval p(Let|N)", "p(careful | x)"),
        ):
            if found := curves(own, switch.MAIN, column):
                panels.append((title, unit, found, {"limits": (0, 1.04), "width": 0.5}))
    if panels:
        title = (
            "The switch world: a careful mode that the prompt switches off; steps of length 0.03"
        )
        looks = pictures.LOOKS | {
            "dsrl-5": ("DSRL, S = 5", *pictures.LOOKS["dsrl-10"][1:]),
            "random-prerl": ("random negatives", pictures.GREY, ":"),
            "random-5-then-grpo": ("random negatives,\nthen GRPO", pictures.ORANGE, "--"),
        }
        pictures.draw(PICTURES / "switch.png", title, panels, columns=2, height=3.1, looks=looks)
    gains, leads = forecast_points(runs)
    if leads:
        title = "The first gradients foretell the careful mode, but not accuracy"
        pictures.draw_forecast(PICTURES / "forecast.png", title, gains, leads)


SHORT = {  # the worlds in the picture: p(careful | x), or what else differs from 3%
    "switch": "3%",
    "switch-0.3": "0.3%",
    "switch-1": "1%",
    "switch-10": "10%",
    "switch-alone-20": "alone 20%",
    "switch-alone-80": "alone 80%",
    "switch-short": "short",
    "switch-no-flag": "no flag",
}


def forecast_points(runs: dict) -> tuple[dict, dict]:
    """What the first gradients foretell, against what five steps of length 0.03 made.

    Returns:
        {(method, base): [(foretold, measured)]}: rise of the log-odds of the careful mode given x.
        {(world, base): (NSR-PreRL's first gain over GRPO's, DSRL's lead in avg@8 at step 10)}.
    """
    gains, leads = {}, {}
    for (world, base), updates in read_forecasts().items():
        own = {m: of_base(runs, world, m, base).values() for m in ("grpo", "nsr-prerl", "dsrl-5")}
        for method in ("grpo", "nsr-prerl"):
            risen = average(map(mode_gain, own[method]))
            if risen is not None:
                foretold = 5 * 0.03 * updates[NAMES[method]]["x"]
                gains.setdefault((method, base), []).append((foretold, risen))
        ends = [average(at(rows, "eval avg@8", 10) for rows in own[m]) for m in ("dsrl-5", "grpo")]
        if None not in ends:
            forecast = updates["NSR-PreRL"]["x"] / updates["GRPO"]["x"]
            leads[SHORT[world], base] = forecast, ends[0] - ends[1]
    return gains, leads


def average(values) -> float | None:
    """The mean of those that are there."""
    values = [value for value in values if value is not None]
    return mean(values) if values else None


def mode_gain(rows: list[dict], step: int = 5) -> float | None:
    """How much the log-odds of the careful mode given x have risen by a step."""
    column = "eval p(Let|x)" if "eval p(Let|x)" in rows[0] else "eval p(Let|N)"
    before, after = at(rows, column, 0), at(rows, column, step)
    if before is None or after is None:
        return None
    return math.log(after / (1 - after)) - math.log(before / (1 - before))


def tables(runs: dict, finals: dict, worlds: dict, small: dict) -> dict[Path, dict[str, str]]:
    """The tables of each page: {page: {mark: table}}."""
    return {
        ROOT / "docs" / "study.md": {
            "switch, few": switch_few_table(read_switch()),
        },
        ROOT / "study" / "tables.md": {
            "commands": commands_table(),
            "accuracy": accuracy_table(runs, finals),
            "thoughts": thoughts_table(runs),
            "shape": shape_table(runs),
            "samples": samples_table(),
            "sweep": sweep_table(runs),
            "bases": bases_table(),
            "worlds": worlds_table(worlds),
            "smollm": smollm_table(small),
            "responses": responses_table(),
            "guard": guard_table(runs),
            "switch": switch_table(read_switch()),
            "switch, methods": switch_methods_table(read_switch()),
            "switch, rates": switch_rates_table(read_switch()),
            "switch, best": switch_best_table(read_switch()),
            "switch, doses": switch_doses_table(read_switch()),
        },
    }


def render(text: str, parts: dict[str, str]) -> str:
    """The page's text with its tables updated."""
    for name, table in parts.items():
        text = fill(text, f"{name}: made by study/report.py", table)
    return text


def read_all() -> tuple[dict, dict, dict, dict]:
    runs, finals = read_results()
    return runs, finals, read_worlds(runs), read_smollm()


def main() -> None:
    runs, finals, worlds, small = read_all()
    draw_pictures(runs, worlds, small)
    for page, parts in tables(runs, finals, worlds, small).items():
        page.write_text(render(page.read_text(), parts))


if __name__ == "__main__":
    main()
