"""Interleaved timings in one process: medians, ratios and their quartiles."""

import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import jsoftmax
from jsoftmax.cli._machine import processor

F = Callable[..., Any]


class Case(NamedTuple):
    """One row: ours and its peers, on the same arguments; `calls` are peers outside JAX, which bring their own."""

    group: str
    name: str
    shape: tuple[int, ...]
    candidates: dict[str, F]
    arguments: tuple[Any, ...]
    dtype: str = "float32"
    calls: dict[str, F] = {}  # noqa: RUF012  (nobody writes to it)


def torch() -> Any:
    """PyTorch, or None where it is not installed; its idle threads would spin on the cores that JAX needs."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when it is imported
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def normal(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Scores from N(0, 3²)."""
    return (3 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def interleaved(
    candidates: dict[str, F],
    arguments: tuple[Any, ...],
    calls: dict[str, F] | None = None,
    fewest: int = 15,
    second_call: bool = False,
) -> dict[str, Any]:
    """Medians in ms over interleaved calls of compiled programs, and the ratios of the first to each other one; MiB of
    their temporaries.

    second_call: times the second of two calls in a row, as in a loop of this program. Otherwise the call after one that
    has given back a gigabyte also takes the time in which the system clears those pages.
    """
    programs: dict[str, F] = {name: jax.jit(f).lower(*arguments).compile() for name, f in candidates.items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes / 2**20 for name, program in programs.items()}  # pyright: ignore[reportFunctionMemberAccess]
    programs |= {name: lambda *_, call=call: call() for name, call in (calls or {}).items()}
    for program in programs.values():
        jax.block_until_ready(program(*arguments))
    times: dict[str, list[float]] = {name: [] for name in programs}
    first, *others = programs
    started = time.perf_counter()
    while len(times[first]) < fewest or (time.perf_counter() - started < 2 and len(times[first]) < 200):
        for name, program in programs.items():
            if second_call:
                timed(program, *arguments)
            times[name].append(timed(program, *arguments)[0])
    result: dict[str, Any] = {"ms": {name: statistics.median(t) for name, t in times.items()}, "MiB": memory}
    result["ratio"] = {}
    for name in others:
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        result["ratio"][name] = statistics.quantiles(ratios, n=4)
    result["calls"] = len(times[first])
    return result


def timed(program: F, *arguments: Any) -> tuple[float, Any]:
    """Milliseconds of one call, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(program(*arguments))
    return 1e3 * (time.perf_counter() - start), result


def run(cases: list[Case], output: pathlib.Path, fewest: int = 15, second_call: bool = False) -> None:
    """Times every case, prints it, and writes all of them."""
    rows = []
    for case in cases:
        result = interleaved(case.candidates, case.arguments, case.calls, fewest, second_call)
        rows.append({"group": case.group, "name": case.name, "shape": case.shape, "dtype": case.dtype, **result})
        against = "  ".join(
            f"{peer} {middle:.2f} [{low:.2f}, {high:.2f}]" for peer, (low, middle, high) in result["ratio"].items()
        )
        first = next(iter(case.candidates))
        print(f"{case.name:32} {case.shape!s:16} {result['ms'][first]:8.3f} ms  {first} / {against}", flush=True)
        print(f"{'':32} MiB of temporaries:", {name: round(n, 1) for name, n in result["MiB"].items()}, flush=True)
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")
    print(f"written to {output}")


def about() -> dict[str, str]:
    """The versions and the machine that the numbers depend on."""
    device = jax.devices()[0]
    here = pathlib.Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jsoftmax": jsoftmax.__version__,
        **{
            peer: version
            for peer in ("optax", "distrax", "torch", "entmax", "numpyro", "jax-cce")
            if (version := _version(peer))
        },
        "commit": commit,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
