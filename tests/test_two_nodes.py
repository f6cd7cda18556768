"""Two machines made of network namespaces, each with its own loopback; gloo between them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_reliability import HANG
from test_scripts import ROOT, SMALL, metrics, run, same, weights

if os.geteuid() != 0 or not shutil.which("ip"):
    pytest.skip("network namespaces need root and iproute2", allow_module_level=True)
TRY = f"prerl-try-{os.getpid()}"  # every pytest worker collects this file at the same moment
if subprocess.run(["ip", "netns", "add", TRY], capture_output=True).returncode:
    pytest.skip("network namespaces are not allowed here", allow_module_level=True)
subprocess.run(["ip", "netns", "del", TRY], check=True)

pytestmark = pytest.mark.slow
FLAGS = "--num-steps 3 --warmup-steps 1 --eval-every 3".split()


@pytest.fixture
def nodes():
    """Two namespaces joined by a cable: (name, interface, address) of each."""
    mark = os.getpid() % 10000
    ends = [(f"prerl-{mark}-{i}", f"ve{mark}{i}", f"10.77.0.{i}") for i in (1, 2)]
    ip = lambda *words: subprocess.run(["ip", *words], check=True)  # noqa: E731
    try:
        for name, _, _ in ends:
            ip("netns", "add", name)
        (name1, if1, _), (name2, if2, _) = ends
        ip("link", "add", if1, "netns", name1, "type", "veth", "peer", if2, "netns", name2)
        for name, interface, address in ends:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield ends
    finally:
        for name, _, _ in ends:
            subprocess.run(["ip", "netns", "del", name], check=False)


def start(nodes, rank: int, folder: Path, *flags: str) -> subprocess.Popen:
    name, interface, _ = nodes[rank]
    torchrun = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank {rank}"
    torchrun += f" --master-addr {nodes[0][2]} --master-port 29577 dsrl.py"
    command = ["ip", "netns", "exec", name, sys.executable, *torchrun.split(), *SMALL]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    log = open(folder.parent / f"node{rank}.log", "w")
    return subprocess.Popen(
        [*command, "--output-dir", str(folder), *flags],
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_two_nodes_train_as_one(nodes, tmp_path):
    processes = [start(nodes, rank, tmp_path / "two", *FLAGS) for rank in (0, 1)]
    for rank, process in enumerate(processes):
        assert process.wait(HANG) == 0, (tmp_path / f"node{rank}.log").read_text()
    run("dsrl", tmp_path / "one", *FLAGS, "--num-processes", "2")
    assert [row["step"] for row in metrics(tmp_path / "two")] == [0, 1, 2, 3]
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        for key in ("reward/mean", "policy/loss", "policy/logprob", "eval/lab/avg@2"):
            assert a.get(key) == b.get(key), key
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_a_killed_node_stops_the_other(nodes, tmp_path):
    """With an error, and soon: a collective would wait for 30 minutes."""
    flags = ["--num-steps", "500", "--eval-every", "0"]
    processes = [start(nodes, rank, tmp_path / "run", *flags) for rank in (0, 1)]
    deadline = time.monotonic() + HANG
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
        time.sleep(0.1)
    pids = subprocess.run(
        ["ip", "netns", "pids", nodes[1][0]], capture_output=True, text=True, check=True
    ).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    assert processes[0].wait(HANG) != 0
    assert "rank 0 failed" in (tmp_path / "node0.log").read_text()
