"""Draw the curves to expect from the exercises of docs/lecture.md, from the study's recorded runs.

`python lab/exercises.py` writes docs/lecture.png and the table in docs/lecture.md.
"""

import csv
import sys
from pathlib import Path
from statistics import mean

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from docs.generate import fill  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# title; the script's run and the changed one, as the study names them, and how each is labelled
EXERCISES = [
    ("1. Only incorrect responses, given x", ("grpo", "GRPO"), ("nsr-rl", "A < 0 only")),
    ("2. Only correct responses, given BOS", ("prerl", "PreRL"), ("psr-prerl", "A > 0 only")),
    ("3. The warm-up keeps x", ("dsrl-10", "DSRL, S = 10"), ("nsr-rl-then-rl", "with x")),
    (
        "4. Every incorrect response",
        ("nsr-prerl", "NSR-PreRL"),
        ("nsr-prerl-every-wrong", "A = ±1"),
    ),
    ("5. A longer warm-up", ("dsrl-10", "DSRL, S = 10"), ("dsrl-40", "S = 40")),
]
COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito's


def read_rewards() -> dict[str, dict[str, list[float]]]:
    """{variant: {seed: reward/mean of steps 1, 2, ...}}."""
    found = {}
    with open(ROOT / "study" / "results" / "study.csv") as lines:
        for row in csv.DictReader(lines):
            if row["reward"]:
                seeds = found.setdefault(row["variant"], {})
                seeds.setdefault(row["seed"], []).append(float(row["reward"]))
    return found


def smooth(values: list[float], width: int = 5) -> list[float]:
    return [mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def table(rewards: dict) -> str:
    """The mean reward of the last ten steps, a number per seed, as a Markdown table."""
    text = "| exercise | script | changed |\n|---|---|---|\n"
    for title, *pair in EXERCISES:
        text += f"| {title} |"
        for variant, label in pair:
            last = [f"{mean(curve[-10:]):.2f}" for _, curve in sorted(rewards[variant].items())]
            text += f" {label}: {', '.join(last)} |"
        text += "\n"
    return text


def draw(rewards: dict, file: Path) -> None:
    figure, axes = plt.subplots(1, 5, figsize=(15, 3), sharey=True, layout="constrained")
    for ax, (title, *pair) in zip(axes, EXERCISES):
        for colour, (variant, label), y in zip(COLOURS, pair, (0.16, 0.04)):
            for curve in rewards[variant].values():
                ax.plot(range(1, len(curve) + 1), smooth(curve), color=colour, lw=1)
            ax.text(0.04, y, label, color=colour, transform=ax.transAxes)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        ax.set_ylim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward, mean of 5 steps")
    figure.savefig(file, dpi=110)


def main() -> None:
    rewards = read_rewards()
    draw(rewards, ROOT / "docs" / "lecture.png")
    page = ROOT / "docs" / "lecture.md"
    page.write_text(fill(page.read_text(), "exercises", table(rewards)))


if __name__ == "__main__":
    main()
