"""What the benchmarks share: interleaved timings and the machine's name."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Figures = list[tuple[str, str]]  # what was measured, and how it came out


def interleaved(
    work: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | None = None
) -> dict[str, float]:
    """Median seconds of each piece of work, one after the other in each round.

    The first round, which finds memory and caches cold, does not count. On a GPU a piece is over
    when the device is done.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for round in range(repeats + 1):
        for name, piece in work.items():
            _wait_for(device)
            started = time.perf_counter()
            piece()
            _wait_for(device)
            if round:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(seconds: Mapping[str, float], what: str) -> Figures:
    """Each of them against the first."""
    (_, first), *_ = seconds.items()
    return [
        (f"{what}, {name}", f"{taken * 1e3:9.1f} ms   {first / taken:5.2f} ×")
        for name, taken in seconds.items()
    ]


def machine(device: torch.device | None = None) -> str:
    """Processor, cores, versions, for the head of a table."""
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {os.cpu_count()} cores"
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    if hasattr(torch.cpu, "get_capabilities"):
        return str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))
    return platform.machine()


def show(title: str, figures: Figures) -> None:
    """Print them as aligned lines under a title."""
    print(f"\n{title}")
    width = max(len(name) for name, _ in figures)
    for name, figure in figures:
        print(f"  {name:<{width}}  {figure}", flush=True)
