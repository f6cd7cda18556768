"""Runs where a user may be: paths, locale, limits, and folders that are in use."""

import fcntl
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_inputs import write
from test_scripts import ROOT, SMALL, metrics, run
from transformers import AutoModelForCausalLM

import harness
from lab import task

# In a mount namespace of its own: the model's folder is read-only, /dev/shm has 2 MiB. Standard
# input is closed. $0 is the model's folder, $@ the command.
SITUATION = """
mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 99
mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 99
ulimit -n 256
exec "$@" <&-
"""


@pytest.mark.slow
def test_everything_unusual_at_once(tmp_path):
    """Spaces and unicode in relative paths, from elsewhere, in the C locale, and resumed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    place = tmp_path / "Ünï cödé π 目录"
    (place / "here").mkdir(parents=True)
    shutil.copytree(ROOT / "lab" / "base", place / "das Modell ü")
    write(place / "here" / "meine Aufgäben.jsonl", task.problems("train")[:20])
    data, folder = "meine Aufgäben.jsonl", place / "here" / "läufe" / "run 1"
    command = [sys.executable, str(ROOT / "grpo_baseline.py"), *SMALL, "--num-prompts", "4"]
    command += ["--model", "../das Modell ü", "--dataset", data, "--eval-datasets", data]
    command += ["--output-dir", "läufe/run 1", "--save-every", "1", "--eval-every", "2"]
    for flags in (["--num-steps", "1"], ["--num-steps", "2", "--resume", "auto"]):
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", SITUATION, "../das Modell ü", *command, *flags],
            cwd=place / "here",
            env={**{name: os.environ[name] for name in ("PATH", "HOME")}, "LC_ALL": "C"},
            capture_output=True,
            timeout=900,
            check=False,
        )
        output = (done.stdout + done.stderr).decode()
        if done.returncode == 99:
            pytest.skip("file systems cannot be mounted here")
        assert done.returncode == 0, output
    assert "continuing from läufe/run 1/checkpoints/step_000001" in output
    assert [row["step"] for row in metrics(folder)] == [0, 1, 2]
    assert all(row["sync/logprob_gap"] < 1e-5 for row in metrics(folder)[1:])
    assert "eval/meine Aufgäben/avg@2" in metrics(folder)[-1]
    AutoModelForCausalLM.from_pretrained(folder / "model")


def test_too_few_open_files():
    """Refused at once; a limit that may be raised is raised."""
    program = "import harness, resource; harness.raise_open_files(); "
    program += "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = 'ulimit -{} 100; exec "$0" -c "$1"'
    runs = [
        subprocess.run(
            ["bash", "-c", command.format(kind), sys.executable, program],
            cwd=ROOT, text=True, capture_output=True, check=False,
        )
        for kind in ("Sn", "n")
    ]  # fmt: skip
    assert runs[0].returncode == 0 and "(100, " not in runs[0].stdout, runs[0].stderr
    assert runs[1].returncode == 2
    assert runs[1].stderr.splitlines() == [
        "error: a process may open only 100 files but needs 256: raise ulimit -n"
    ]


@pytest.mark.parametrize(
    ("free", "ranks", "refused"), [(2, 1, 0), (0, 1, 1), (2, 2, 1), (64, 2, 0)]
)
def test_too_little_shared_memory(one_rank, monkeypatch, capsys, free, ranks, refused):
    usage = SimpleNamespace(free=free * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(harness.dist, "get_world_size", lambda: ranks)
    args = SimpleNamespace(tensor_parallel_size=ranks)
    if refused:
        with pytest.raises(SystemExit):
            harness.check_args(args)
        assert capsys.readouterr().err.startswith("error: /dev/shm has less than ")
    else:
        harness.check_args(args)


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused while the first lives, also with --resume, and harms nothing."""
    (tmp_path / "args.json").write_text('{"seed": 1}')
    flags = ["--num-processes", "2", "--resume", "auto"]
    with open(tmp_path / "args.json") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        lines = run("dsrl", tmp_path, *flags, code=2).splitlines()
    assert [line for line in lines if not line.startswith("the model's context")] == [
        f"error: another run is writing to {tmp_path}: give another --output-dir"
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["args.json"]
    assert (tmp_path / "args.json").read_text() == '{"seed": 1}'


def test_the_lock_ends_with_the_run(tmp_path):
    harness.lock_folder(tmp_path)
    with pytest.raises(BlockingIOError):
        harness.lock_folder(tmp_path)
    while harness.LOCKS:
        harness.LOCKS.pop().close()
    harness.lock_folder(tmp_path)
    harness.LOCKS.pop().close()
