"""Resident memory of a process and its descendants. It also runs in TRL's environment."""

import threading
import time

import psutil


def resident_gib(pid: int) -> float:
    """Of a process and all its descendants; what they may share, such as libraries, counts once."""
    pages = []
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            memory = process.memory_info()
            pages.append((memory.rss, memory.shared))
    except psutil.NoSuchProcess:  # one has ended: the next look is right again
        return 0.0
    once = max(shared for _, shared in pages)
    return (once + sum(resident - shared for resident, shared in pages)) / 2**30


def watch_memory(pid: int) -> list[float]:
    """[peak so far] of resident_gib, kept up to date by a thread."""
    peak = [0.0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], resident_gib(pid))
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    return peak
