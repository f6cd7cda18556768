"""Resident memory of a process and its descendants. Also imported in TRL's environment."""

import threading
import time

import psutil


def resident_gib(pid: int) -> float:
    """GiB of a process and all its descendants; shared memory, such as libraries, counts once."""
    pages = []
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            memory = process.memory_info()
            pages.append((memory.rss, memory.shared))
    except psutil.NoSuchProcess:  # one has ended; the next call is correct again
        return 0.0
    once = max(shared for _, shared in pages)
    return (once + sum(resident - shared for resident, shared in pages)) / 2**30


def watch_memory(pid: int) -> list[float]:
    """A list with the peak of resident_gib() so far, which a thread updates."""
    peak = [0.0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], resident_gib(pid))
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    return peak
