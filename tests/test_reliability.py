"""Runs that are killed, interrupted, resumed elsewhere, or fed with faults, as subprocesses."""

import datetime
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
import warm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import (
    ROOT,
    SMALL,
    completions,
    environment,
    learned,
    metrics,
    run,
    same,
    weights,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig

import dsrl
import harness
import inputs

HANG = 300  # seconds. Nothing that works takes as long, on the busiest machine
FLAGS = "--num-steps 6 --warmup-steps 3 --save-every 1 --eval-every 3".split()


def start(script: str, folder: Path, *flags: str) -> subprocess.Popen:
    """The run in a session of its own; what it prints goes to a file beside its folder."""
    command = [*warm.python(), f"{script}.py", *SMALL, "--output-dir", str(folder), *flags]
    env = environment()
    log = open(folder.with_suffix(".log"), "a")
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder, and their forks' servers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def abandoned_memory() -> set[str]:
    """Shared memory that no process has mapped."""
    mapped = ""
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += path.read_text()
        except OSError:
            continue
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in mapped}


def wait_until(condition) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run("dsrl", folder, *FLAGS)
    return folder


@pytest.mark.slow
def test_killed_again_and_again(whole, tmp_path):
    """SIGKILL in the warm-up, at the switch, during a save and after: the same run in the end."""
    folder, rng, tried = tmp_path / "run", random.Random(0), 0
    saving = lambda: any(folder.glob("checkpoints/*.tmp"))  # noqa: E731
    for moment in (
        lambda: lines(folder) >= 2,
        lambda: lines(folder) >= 3 and saving(),
        lambda: lines(folder) >= 4,
        lambda: lines(folder) >= 6,
    ):
        process = start("dsrl", folder, *FLAGS, "--resume", "auto")
        wait_until(lambda: process.poll() is not None or moment())
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(rng.random() * 0.3)
        process.kill()  # the launcher alone: its ranks must not outlive it
        process.wait()
        wait_until(lambda: not processes_of(folder))
        tried += 1
    run("dsrl", folder, *FLAGS, "--resume", "auto")
    assert tried == 4
    assert [learned(row) for row in metrics(folder)] == [learned(row) for row in metrics(whole)]
    assert same(weights(folder), weights(whole))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step_000005", "step_000006"]  # two are kept, nothing is half-written


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_disk_full_while_running(whole, small_disk):
    """The run dies and says why, its last whole checkpoint stays; with space again it goes on."""
    folder, console = small_disk / "run", small_disk.parent / "run.log"
    folder.with_suffix(".log").symlink_to(console)
    process = start("dsrl", folder, *FLAGS)
    wait_until(lambda: process.poll() is not None or lines(folder) >= 4)

    def ended_while_full() -> bool:
        with open(small_disk / "junk", "ab", buffering=0) as junk, pytest.raises(OSError):
            while True:  # a checkpoint that was removed has left room
                junk.write(bytes(4096))
        return process.poll() is not None

    wait_until(ended_while_full)
    assert process.wait() == 1
    assert f"rank 0 failed: {folder} is on a full disk: make room" in console.read_text()
    assert 4 <= lines(folder) < 7
    (small_disk / "junk").unlink()
    run("dsrl", folder, *FLAGS, "--resume", "auto")
    assert [learned(row) for row in metrics(folder)] == [learned(row) for row in metrics(whole)]
    assert same(weights(folder), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_after_the_step(whole, tmp_path, number):
    """A checkpoint is saved, the exit code says why, nothing stays behind, and it can go on."""
    folder = tmp_path / "run"
    before = abandoned_memory()
    flags = ["--save-every", "0"]  # the only checkpoint is the signal's
    process = start("dsrl", folder, *FLAGS, *flags)
    wait_until(lambda: process.poll() is not None or lines(folder) >= 3)
    process.send_signal(number)
    assert process.wait(HANG) == 128 + number
    steps = lines(folder) - 1
    assert 2 <= steps < 6
    wait_until(lambda: not processes_of(folder))
    left = abandoned_memory() - before  # runs of other tests may have some, until they end
    wait_until(lambda: not left & abandoned_memory())
    output = folder.with_suffix(".log").read_text()
    assert f"stopped after step {steps}" in output and "Traceback" not in output
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    run("dsrl", folder, *FLAGS, *flags, "--resume", "auto")
    assert same(weights(folder), weights(whole))
    assert [row["step"] for row in metrics(folder)] == list(range(7))


def test_second_signal_stops_at_once(tmp_path):
    folder = tmp_path / "run"
    process = start("dsrl", folder, "--num-steps", "500", "--eval-every", "0")
    wait_until(lambda: process.poll() is not None or lines(folder) >= 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert "stopped after step" not in folder.with_suffix(".log").read_text()
    wait_until(lambda: not processes_of(folder))


@pytest.mark.slow
def test_a_lost_terminal(tmp_path):
    """SIGHUP, more than once, and nobody reads the output: as for SIGTERM, the run is saved."""
    folder = tmp_path / "run"
    command = [sys.executable, "dsrl.py", *SMALL, "--output-dir", str(folder), *FLAGS]
    env = environment()
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(
        [*command, "--save-every", "0"], cwd=ROOT, env=env, start_new_session=True, **pipe
    )
    assert any(line.startswith("step 2/") for line in process.stdout)
    process.stdout.close()
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.01)  # each has been passed on
    assert process.wait(HANG) in (128 + signal.SIGHUP, 128 + signal.SIGTERM)
    steps = lines(folder) - 1
    assert 2 <= steps < 6
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    assert "Traceback" not in (folder / "log_rank0.txt").read_text()


def test_signals_before_the_ranks_start():
    """The launcher ends at once; under nohup, which ignores SIGHUP, that does nothing."""
    program = (
        "import harness, os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "harness.forward_signals(); os.kill(os.getpid(), signal.SIGHUP);"
        "print('goes on', flush=True); os.kill(os.getpid(), signal.SIGTERM); print('goes on')"
    )
    command = [*warm.python(), "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (143, "goes on\n", "")


@pytest.mark.slow
def test_which_checkpoint_is_resumed(whole, tmp_path, one_rank, capsys):
    """A broken one never is. From an older one, what came later goes: metrics and checkpoints."""
    folder = shutil.copytree(whole, tmp_path / "run")
    five, six = (folder / "checkpoints" / f"step_00000{step}" for step in (5, 6))

    def found(resume: str, steps: int = 6) -> Path | None:
        return harness.find_checkpoint(folder, SimpleNamespace(resume=resume, num_steps=steps))

    def refused(*words) -> str:
        with pytest.raises(SystemExit):
            found(*words)
        return capsys.readouterr().err

    assert found("auto") == six and found(str(five)) == five
    assert f"--num-steps 5 is before {six}" in refused("auto", 5)
    part = next(six.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    assert found("auto") == five and "is not a whole checkpoint" in refused(str(six))
    assert "is not a checkpoint" in refused(str(six.rename(folder / "best")))
    shutil.copytree(folder / "best", six)
    run("dsrl", folder, *FLAGS, "--save-every", "0", "--resume", str(five))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000005"]
    assert [learned(row) for row in metrics(folder)] == [learned(row) for row in metrics(whole)]
    assert same(weights(folder), weights(whole))
    (five / ".metadata").unlink()
    assert "holds no whole checkpoint: give another --output-dir" in refused("auto")
    (folder / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")  # a new run would remove them
    assert "holds another run" in run("dsrl", folder, *FLAGS, code=2) and five.is_dir()
    (tmp_path / "metrics.jsonl").rename(folder / "metrics.jsonl")
    shutil.rmtree(five)
    assert "finished run without a checkpoint: give another --output-dir" in refused("auto")
    assert len(metrics(folder)) == 7
    shutil.rmtree(folder / "model")
    assert found("auto") is None
    (folder / "args.json").write_text("")
    with pytest.raises(SystemExit):
        harness.read_args(folder)
    assert "no readable args.json" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(whole, tmp_path):
    """Weights and optimiser reshard; what follows is equal up to the order of additions."""
    folder = tmp_path / "run"
    run("dsrl", folder, *FLAGS[2:], "--num-steps", "4")
    run("dsrl", folder, *FLAGS, "--resume", "auto", "--num-processes", "2")
    ours, theirs = metrics(folder), metrics(whole)
    assert [row["step"] for row in ours] == list(range(7))
    for key in ("reward/mean", "completion/length", "policy/counted_tokens"):
        assert ours[5][key] == theirs[5][key]
    for key in ("policy/loss", "policy/grad_norm", "policy/logprob"):
        assert ours[5][key] == pytest.approx(theirs[5][key], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_changed_flags_are_refused(whole):
    """With the list of differences; more steps are no difference."""
    flags = [*FLAGS, "--resume", "auto", "--seed", "2", "--num-generations", "8"]
    output = run("dsrl", whole, *flags, code=2)
    assert "--seed was 1, is now 2" in output and "--num-generations was 4, is now 8" in output
    assert "--script was 'dsrl', is now 'prerl'" in run("prerl", whole, "--resume", "auto", code=2)
    file = whole / "args.json"
    kept, args = file.read_text(), json.loads(file.read_text())
    assert [*args["content"]] == ["the model", "data set lab (train)", "data set lab"]
    args["content"]["data set lab (train)"] = "of other problems"
    file.write_text(json.dumps(args))
    output = run("dsrl", whole, *FLAGS, "--resume", "auto", code=2)
    file.write_text(kept)
    assert f"cannot continue {whole}: data set lab (train) has changed under" in output


# ------------------------------------------------------------------------------ injected faults


def damaged(script: str, tmp_path: Path, old: str, new: str, *flags: str) -> str:
    """A copy of the script with one line changed, run beside the real helpers."""
    text = (ROOT / f"{script}.py").read_text()
    assert text.count(old) == 1
    (tmp_path / f"{script}.py").write_text(text.replace(old, new))
    command = [*warm.python(), str(tmp_path / f"{script}.py"), *SMALL, *flags]
    command += ["--num-steps", "4", "--eval-every", "0", "--output-dir", tmp_path / "run"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode not in (0, 2), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_one_skipped_sync_in_bfloat16(tmp_path):
    """At the paper's learning rate log-probs hardly tell; the bits do, in the very step."""
    flags = "--dtype bfloat16 --learning-rate 1e-6".split()
    skipped = "        if updates and step != 2:\n"
    output = damaged("grpo_baseline", tmp_path, "        if updates:\n", skipped, *flags)
    assert "the engine's weights are not the policy's (embed_tokens, " in output
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 1


def test_canary_sees_another_policy(tmp_path):
    """Weights that change after the check: the run stops before it trains on their samples."""
    scaled = "        common.check_sync(engine, policy)\n        if step == 2:\n"
    scaled += "            with torch.no_grad():\n"
    scaled += "                policy.lm.model.layers[1].mlp.up_proj.weight.mul_(1.5)\n"
    output = damaged(
        "grpo_baseline", tmp_path, "        common.check_sync(engine, policy)\n", scaled
    )
    assert "sync/logprob_gap is" in output and "another policy than the trainer's" in output
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 2


# In step 1 rank 1 fails, and its end would take for ever if it were an orderly one, as NCCL's can.
# Rank 0 waits for ever, as in a collective that notices nothing, with SIGTERM put off.
RANK_1_FAILS = """        import atexit
        import time

        def fail(*words, **options):
            if rank == 0:
                time.sleep(10000)
            atexit.register(time.sleep, 10000)
            raise MemoryError("injected")

"""
PLACES = {
    "between two layers": "policy.lm.model.layers[1].register_forward_pre_hook(fail)",
    "in the rollout": "engine.generate = fail",
    "in the verify": "grading.verify = fail",
}


@pytest.mark.parametrize("place", PLACES)
def test_one_rank_fails(tmp_path, place):
    """The run ends soon, with the failed rank's line, wherever the others are.

    It takes seconds. Without care it is 30 minutes, a collective's limit, or for ever.
    """
    clock = "        clock = harness.timer()\n"
    text = (
        (ROOT / "dsrl.py")
        .read_text()
        .replace(clock, RANK_1_FAILS + f"        {PLACES[place]}\n" + clock)
    )
    (tmp_path / "dsrl.py").write_text(text)
    command = [*warm.python(), str(tmp_path / "dsrl.py"), *SMALL, "--num-processes", "2"]
    command += ["--eval-every", "0", "--output-dir", str(tmp_path / "run")]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    read = (tmp_path / "log").read_text
    wait_until(lambda: process.poll() is not None or "rank 1 failed: injected" in read())
    assert process.wait(HANG) == 1, read()
    assert "rank 1 failed: injected" in read()
    wait_until(lambda: not processes_of(tmp_path / "run"))


def test_few_samples_on_two_ranks(tmp_path):
    """Fewer problems to evaluate than ranks, empty micro-batches, the cosine at every step."""
    problem = tmp_path / "one.jsonl"
    problem.write_text(json.dumps({"problem": "Q 81#3 A", "answer": "4"}))
    flags = "--num-processes 2 --num-prompts 2 --num-generations 2 --num-steps 2 --eval-every 1"
    flags += f" --max-tokens-per-microbatch 16 --alignment-every 1 --eval-datasets {problem}"
    run("nsr_prerl", tmp_path / "run", *flags.split())
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all("eval/one/avg@2" in row for row in rows)
    assert all("alignment/cosine_to_grpo" in row for row in rows[1:])


def test_steps_that_train_on_nothing(tmp_path):
    """One line each, once: truncated responses, no boxes, groups without an advantage.

    The same 8 problems and the same weights twice: the second step draws other samples.
    """
    data = tmp_path / "data.jsonl"
    rows = [{"problem": f"Q {v}#3 A", "answer": "01"} for v in range(10, 18)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--num-steps 2 --max-completion-length 4 --eval-every 1 --temperature 2".split()
    output = run("grpo_baseline", tmp_path / "run", *flags, "--dataset", str(data))
    first, second = (
        sorted((row["prompt"], row["response"]) for row in completions(tmp_path / "run", step))
        for step in (1, 2)
    )
    assert {x for x, _ in first} == {x for x, _ in second} and first != second
    assert output.count("warning: ") == 3
    for line in (
        "warning: step 0: 100% of the responses reached --max-completion-length 4 and get ",
        r"warning: step 0: no response has its answer in \boxed{}, so all get reward 0",
        "warning: step 1: every group is all correct or all incorrect",
    ):
        assert line in output


def test_gradients_that_are_not_finite(tmp_path):
    """No update is made, the samples are saved, and after three in a row the run stops."""
    loss = "                loss = -(batch.per_token(share) * objective).sum()"
    output = damaged("prerl", tmp_path, loss, f"{loss} * math.inf")
    assert output.count("the gradient is not finite, so the update is skipped") == 3
    assert "not finite 3 times in a row" in output
    skipped = tmp_path / "run" / "skipped"
    assert sorted(p.name for p in skipped.iterdir()) == [
        f"step_{step:06d}.pt" for step in (1, 2, 3)
    ]
    saved = torch.load(skipped / "step_000001.pt", weights_only=False)
    assert len(saved["samples"]) == len(saved["advantages"]) == 32


def test_a_weight_that_is_not_finite(tmp_path):
    checked = "        common.check_sync(engine, policy)\n"
    fault = "        if step == 2:\n            with torch.no_grad():\n"
    fault += "                policy.lm.model.norm.weight.fill_(math.nan)\n"
    output = damaged("grpo_baseline", tmp_path, checked, checked + fault)
    assert "a weight is not finite" in output
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 2


def test_resume_from_nowhere(tmp_path):
    output = run("dsrl", tmp_path, "--resume", str(tmp_path / "step_000001"), code=2)
    assert "error: --resume" in output and "is not a checkpoint" in output


def test_heads_that_do_not_divide(tmp_path):
    flags = "--num-processes 3 --tensor-parallel-size 3".split()
    output = run("dsrl", tmp_path, *flags, code=2)
    assert "error: --tensor-parallel-size 3 does not divide the model's" in output


def test_disk_space(tmp_path, monkeypatch, capsys):
    args = SimpleNamespace(num_steps=60, save_every=10, dtype="float32")
    base = str(ROOT / "lab" / "base")
    harness.check_disk(tmp_path, base, args)
    monkeypatch.setattr(harness.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(SystemExit) as error:
        harness.check_disk(tmp_path, base, args)
    assert error.value.code == 2
    assert (
        "has 0.001 GiB free, but the run needs 0.010 GiB (3 checkpoints and the model)"
        in capsys.readouterr().err
    )
    # What a resumed run's checkpoints take is there for the next ones.
    checkpoint = tmp_path / "checkpoints" / "step_000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "__0_0.distcp").write_bytes(bytes(10**8))
    harness.check_disk(tmp_path, base, args)


def test_tensorboard_of_a_resumed_run(tmp_path, one_rank):
    """Steps that were made after the checkpoint and are made again are there once."""
    args = SimpleNamespace(track="none")
    for begin, end in ((1, 4), (3, 5)):
        file = tmp_path / "metrics.jsonl"
        if file.exists():  # as load_checkpoint() cuts it
            file.write_text("".join(file.read_text().splitlines(keepends=True)[: begin - 1]))
        log = harness.make_logger(tmp_path, args)
        for step in range(begin, end + 1):
            log(step, {"step": step, "reward/mean": 10.0 * begin + step})
    board = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in board.Scalars("reward/mean")]
    assert found == [(1, 11), (2, 12), (3, 33), (4, 34), (5, 35)]


def test_tracking_of_a_resumed_run(tmp_path, one_rank, monkeypatch):
    """wandb is given the id of the run before, trackio its name; a new run gets its own."""
    calls = []
    service = SimpleNamespace(log=lambda metrics, step: None)
    service.init = lambda **options: calls.append((os.environ.get("WANDB_RUN_ID"), options))
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for folder in ("a", "a", "b"):
        os.environ.pop("WANDB_RUN_ID", None)
        (tmp_path / folder).mkdir(exist_ok=True)
        log = harness.make_logger(tmp_path / folder, SimpleNamespace(track="wandb"))
        log(1, {"step": 1})
    (first, new), (second, resumed), (other, _) = calls
    assert first == second != other and len(other) == 8
    assert new["name"] == resumed["name"] == "a"
    assert "resume" not in new and resumed["resume"] == "allow"


def test_words_of_a_run(tmp_path, monkeypatch, one_rank):
    """The console: of a run without a step, a set named with @, a loss without samples."""
    said = []
    harness.say_summary(tmp_path, lambda *words: said.extend(words))
    assert said[-1].endswith(f"are in {tmp_path}")
    scores = {"eval/my@set/avg@2": 0.5, "eval/my@set/pass@2": 1.0, "eval/my@set/length": 3.0}
    assert harness.eval_line(scores) == "my@set/avg@2 0.500  my@set/pass@2 1.000"
    warn = harness.make_warner(dsrl.Args(), said.append)
    warn({"step": 2, "policy/counted_samples": 8})
    assert "warning" not in said[-1]
    warn({"step": 3, "policy/counted_samples": 0})
    assert said[-1].startswith("warning: step 3: no sample is in the loss")
    flags = ["dsrl.py", "--preset", "smollm", "--preset=lab"]  # the last one counts
    monkeypatch.setattr(sys, "argv", flags)
    args = harness.parse_args(dsrl.Args)
    assert (args.preset, args.dataset) == ("lab", "lab")


def test_unwritable_folder():
    output = run("dsrl", Path("/proc/nowhere"), code=2)
    assert "error: the output folder cannot be written" in output


def test_engines_without_a_prompt(tmp_path):
    output = run("prerl", tmp_path, "--num-prompts", "1", "--num-processes", "2", code=2)
    assert "error: --num-prompts 1: each of the 2 engines needs a prompt" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(weight_decay=-1.0), "--weight-decay must be 0 or more"),
        (dict(tis_cap=math.nan), "--tis-cap must be 0 or more"),
        (dict(clip=(0.2, math.inf)), "--clip must be 0 or more"),
        (dict(sign_weights=(-1.0, 1.0)), "--sign-weights must be 0 or more"),
        (dict(learning_rate=math.nan), "--learning-rate must be positive"),
        (dict(tensor_parallel_size=0), "--tensor-parallel-size must be positive"),
        (dict(tensor_parallel_size=2), "does not divide the 1 processes"),
        (dict(num_generations=1), "makes every advantage 0"),
        (dict(num_generations=1, advantage="reinforce++"), "makes every advantage 0"),
        (dict(eval_datasets=("a/test.jsonl", "b/test.jsonl")), "two evaluation sets have the name"),
        (dict(resume="auto"), "--resume needs --output-dir"),
        (dict(seed=-1), "--seed must be from 0 to 4294967295, not -1"),
        (dict(seed=2**32), "--seed must be from 0 to 4294967295"),
        (dict(temperature=2.1), "--temperature must be at most 2"),
        (dict(max_tokens_per_microbatch=0), "--max-tokens-per-microbatch must be positive"),
        (dict(track="wandb"), "pip install wandb"),
    ],
)
def test_values_no_run_can_have(one_rank, capsys, flags, message):
    harness.check_args(dsrl.Args())
    harness.check_args(dsrl.Args(num_generations=1, advantage="sign"))
    harness.check_args(dsrl.Args(num_generations=1, advantage="reinforce++", warmup_steps=0))
    with pytest.raises(SystemExit) as error:
        harness.check_args(dsrl.Args(**flags))
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("template", [False, True])
def test_tokenizers_that_add_bos(tiny_model_dir, one_rank, template):
    """A prompt has one BOS, whether the tokenizer or the chat template puts it there."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert tokenizer.encode("1+1")[0] == bos
    if template:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
            "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
        )
    args = SimpleNamespace(system_prompt="think")
    problems = [{"problem": "1+1", "answer": "2"}]
    ids = inputs.encode_prompts(problems, tokenizer, args)[0]["prompt_ids"]
    text = "s:thinku:1+1a:" if template else "think1+1"
    assert ids.count(bos) == 1 and ids[0] == bos
    assert tokenizer.decode(ids[1:]).replace("?", "") == text


def test_the_datas_own_system_message(tiny_model_dir, one_rank, capsys):
    """Counts unless --system-prompt takes its place; without a chat template a line says so."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "1+1"}]
    for given, wanted in (("", "be1+1"), ("think", "think1+1")):
        args = SimpleNamespace(system_prompt=given)
        problems = [{"problem": messages, "answer": "2"}]
        ids = inputs.encode_prompts(problems, tokenizer, args)[0]["prompt_ids"]
        assert tokenizer.decode(ids).replace("?", "") == wanted
    assert capsys.readouterr().out.count("no chat template") == 2


# The form in which each family writes a turn; the words are ours.
TURNS = {
    "ChatML": "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n",
    "Llama 3": "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot_id|>",
    "Gemma": "<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n",
    "EOS": "{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n",
    "blanks are tokens": "{{ m['role'] }}\n{{ m['content'] }}\n\n<|im_end|>",
    "no end": "{{ m['role'] }}: {{ m['content'] }}\n",
    "leaves answers out": "{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% endif %}",
    "refuses answers": "{{ raise_exception('no') if m['role'] == 'assistant' else m['content'] }}",
}
ENDS = {"Llama 3": "<|eot_id|>", "Gemma": "<end_of_turn>"}


@pytest.mark.parametrize("family", TURNS)
def test_what_ends_a_response(tiny_model_dir, tmp_path, family):
    """EOS, generation_config's ids and the token behind a template's turn, whichever these are."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    special = "<|im_start|> <|im_end|> <|start|> <|end|> <|eot_id|> <start_of_turn> <end_of_turn>"
    tokenizer.add_special_tokens({"additional_special_tokens": special.split()})
    tokenizer.add_tokens(["\n\n"])
    tokenizer.chat_template = f"{{% for m in messages %}}{TURNS[family]}{{% endfor %}}"
    end = ENDS.get(family, "<|im_end|>")
    none = ("EOS", "no end", "leaves answers out", "refuses answers")
    ids = [2] if family in none else [2, tokenizer.vocab[end]]
    assert inputs.find_stop_tokens(tmp_path, tokenizer, len(tokenizer)) == ids
    for listed in (7, [7, 2, 10**6]):  # one id, or some; one that the tokenizer does not have
        config = json.dumps({"eos_token_id": listed})
        (tmp_path / "generation_config.json").write_text(config)
        assert inputs.find_stop_tokens(tmp_path, tokenizer, len(tokenizer)) == sorted({*ids, 7})
    tokenizer.chat_template = tokenizer.eos_token = None
    assert inputs.find_stop_tokens(tmp_path, tokenizer, len(tokenizer)) == [2, 7]  # of the file
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(SystemExit):
        inputs.find_stop_tokens(tmp_path, tokenizer, len(tokenizer))
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(SystemExit):
        inputs.find_stop_tokens(tmp_path, tokenizer, len(tokenizer))


def chat(tokenizer, template: str, **flags) -> str:
    """A prompt as the model gets it, with a system prompt."""
    tokenizer.chat_template = template
    args = SimpleNamespace(system_prompt="be", **flags)
    problems = [{"problem": "1+1", "answer": "2"}]
    return tokenizer.decode(inputs.encode_prompts(problems, tokenizer, args)[0]["prompt_ids"])


EACH = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
    ],
)
def test_templates_without_a_system_role(tiny_model_dir, one_rank, capsys, template):
    """It raises, as Gemma's, or drops it silently: the prompt stands before the problem."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert chat(tokenizer, EACH).replace("?", "") == "system:be;user:1+1;"
    assert "no system prompt" not in capsys.readouterr().out
    text = chat(tokenizer, template + EACH)
    assert text.replace("?", "") == "user:be1+1;"  # the tokenizer has no line break
    assert capsys.readouterr().out.count("the chat template has no system prompt") == 1
    refused = "{{ raise_exception('never') }}"
    with pytest.raises(SystemExit):
        chat(tokenizer, refused)
    assert "error: the chat template refuses problem 0: never" in capsys.readouterr().err


def test_the_date_in_a_prompt_is_the_runs(tiny_model_dir, tmp_path, one_rank):
    """The day on which the run began, also when it goes on later; another run's is today."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    template = "{{ strftime_now('%d%m%Y') }}" + EACH
    assert chat(tokenizer, template, date="2001-02-03").startswith("03022001")
    (tmp_path / "args.json").write_text(json.dumps({"date": "2001-02-03"}))
    args = SimpleNamespace(output_dir=str(tmp_path), resume="auto")
    inputs.fix_date(args)
    assert args.date == "2001-02-03"
    args.resume = ""
    inputs.fix_date(args)
    assert args.date == str(datetime.date.today())


def test_a_folder_that_names_another_tokenizer(tmp_path, one_rank, capsys):
    """As deepseek-math-7b's: a byte-level tokenizer.json in a folder of Llama's. Spaces stay."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    LlamaConfig(vocab_size=len(words)).save_pretrained(tmp_path)
    text = "Please reason step by step."
    wrong = AutoTokenizer.from_pretrained(tmp_path)
    assert wrong.decode(wrong.encode(text, add_special_tokens=False)) != text
    tokenizer = inputs.load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert "the file is used" in capsys.readouterr().out
    capsys.readouterr()
    inputs.load_tokenizer(str(ROOT / "lab" / "base"))
    assert not capsys.readouterr().out


def test_a_token_without_an_embedding(tiny_model_dir, tmp_path):
    """As Gemma 3's, one more than embeddings: it trains, and the token is never sampled."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    tokenizer.save_pretrained(model)
    assert len(tokenizer) == 154  # of 96 embeddings
    flags = f"--model {model} --num-steps 1 --eval-every 0 --max-completion-length 16"
    run("grpo_baseline", tmp_path / "run", *flags.split(), "--advantage", "sign")
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "step_000001.parquet")
    assert max(i for row in rows.to_pylist() for i in row["response_ids"]) < 96
    assert metrics(tmp_path / "run")[-1]["sync/logprob_gap"] < 1e-5


def test_long_prompts_are_left_out(tiny_model_dir, one_rank, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_PROMPT_LENGTH", 5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    args = SimpleNamespace(system_prompt="", max_completion_length=6)
    problems = [{"problem": text, "answer": "2"} for text in ("1+1", "1+1+1+1", "2", "3" * 6)]
    kept = inputs.encode_prompts(problems, tokenizer, args)
    assert [(p["id"], p["problem"]) for p in kept] == [(0, "1+1"), (2, "2")]
    assert "2 of 4 prompts are longer than 5 tokens" in capsys.readouterr().out
    # The engine's context is what the longest of these and a response need, or the model's.
    for limit, context, completion in ((512, 9, 6), (9, 9, 6), (8, 8, 5)):
        args.max_completion_length = 6
        config = SimpleNamespace(max_position_embeddings=limit)
        inputs.fit_context([kept[1:], kept], config, args)
        assert (args.context, args.max_completion_length) == (context, completion)
        cut = "--max-completion-length is reduced to 5" in capsys.readouterr().out
        assert cut == (limit == 8)
    with pytest.raises(SystemExit):
        inputs.fit_context([kept], SimpleNamespace(max_position_embeddings=3), args)
    assert "the longest prompt has 3 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inputs.encode_prompts([{"problem": "3" * 6, "answer": "2"}], tokenizer, args)
    assert "all 1 prompts are longer than 5 tokens" in capsys.readouterr().err


def test_killed_before_the_first_step(tmp_path):
    """While it starts, a signal ends it at once, with the signal's exit code."""
    folder = tmp_path / "run"
    process = start("dsrl", folder)
    wait_until(lambda: process.poll() is not None or (folder / "log_rank0.txt").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) == 128 + signal.SIGTERM
    wait_until(lambda: not processes_of(folder))
    assert "Warning" not in folder.with_suffix(".log").read_text()


def test_models_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    output = run("dsrl", tmp_path / "run", "--model", str(tmp_path / "empty"), code=2)
    assert "there is no model.safetensors" in output
    data = tmp_path / "data.jsonl"
    data.write_text("")
    output = run("dsrl", tmp_path / "run", "--dataset", str(data), code=2)
    assert f"error: data set {data} cannot be loaded" in output
    data.write_text('{"text": "1+1", "label": "2"}\n')
    output = run("dsrl", tmp_path / "run", "--dataset", str(data), code=2)
    assert "no row has a problem (column problem, question or prompt)" in output
