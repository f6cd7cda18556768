"""Does it learn? The lab's base model for 12 steps, as a user runs it.

The margins are what seeds 1, 2 and 3 cleared with room to spare: benchmark/results/learning.csv.
"""

import sys
from pathlib import Path

import pytest
from test_scripts import metrics, run_script

FLAGS = "--preset lab --learning-rate 1e-3 --num-steps 12 --eval-every 12".split()


def learn(script: str, folder: Path, *flags: str) -> tuple[float, list[dict]]:
    """Gain in held-out avg@8, and the lines of metrics."""
    run_script(script, folder, *FLAGS, *flags)
    rows = metrics(folder)
    return rows[-1]["eval/lab/avg@8"] - rows[0]["eval/lab/avg@8"], rows[1:]
