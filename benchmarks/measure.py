"""Interleaved timings in one process: medians, ratios and their quartiles."""

import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax

import jsoftmax


def interleaved(candidates: dict[str, Callable[..., Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Medians in ms over interleaved calls of compiled programs, and the ratios of the first to each other one."""
    programs = {name: jax.jit(f).lower(*arguments).compile() for name, f in candidates.items()}
    for program in programs.values():
        jax.block_until_ready(program(*arguments))
    times: dict[str, list[float]] = {name: [] for name in programs}
    first, *others = programs
    started = time.perf_counter()
    while len(times[first]) < 15 or (time.perf_counter() - started < 2 and len(times[first]) < 200):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times[name].append(1e3 * (time.perf_counter() - start))
    result: dict[str, Any] = {"ms": {name: statistics.median(t) for name, t in times.items()}}
    result["ratio"] = {}
    for name in others:
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        result["ratio"][name] = statistics.quantiles(ratios, n=4)
    result["calls"] = len(times[first])
    return result


def about() -> dict[str, str]:
    """What the numbers depend on."""
    device = jax.devices()[0]
    here = pathlib.Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jsoftmax": jsoftmax.__version__,
        "commit": commit,
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
