"""The cost of starting: the import, tracing and compiling of small programs, and calls outside `jit`; beside peers.

The times are medians, and the ratios are those of the medians. Ours and the peer take turns, and nothing is cached
between two turns.
"""

import json
import pathlib
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.measure import F, timed
from benchmarks.programs import CASES, Case, in_mode

CODE = "import time, jax; t = time.perf_counter(); import jsoftmax; print(1e3 * (time.perf_counter() - t))"
NAMES = ("softmax", "log_softmax", "log_normalizer", "entropy", "cross_entropy")
SHAPE = (64, 1000)
SMALL = (4, 8)
TURNS = 7
CALLS = 500


def imported() -> list[float]:
    """The time that `import jsoftmax` adds to `import jax`, in fresh processes, in ms."""

    def once() -> float:
        return float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)

    return [once() for _ in range(12)][2:]  # the first ones compile the byte code


def build(case: Case, f: F, mode: str) -> float:
    """The time to trace and compile the function's value, value and vjp, or Hessian product, in ms."""
    z = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    program, given = in_mode(f, mode, z, case.more(SHAPE, z.dtype))
    jax.clear_caches()
    return timed(lambda: jax.jit(program).lower(*given).compile())[0]


def call(case: Case, f: F) -> float:
    """The time of one call outside jit, with an array of the shape `SMALL`, in ms."""
    given = [jnp.ones(SMALL), *(jnp.zeros(a.shape, a.dtype) for a in case.more(SMALL, jnp.float32))]
    timed(f, *given)
    return statistics.median(timed(f, *given)[0] for _ in range(CALLS))


def run(output: pathlib.Path) -> None:
    times = imported()
    print(f"import jsoftmax after import jax: {statistics.median(times):.0f} ms [{min(times):.0f}, {max(times):.0f}]")
    rows = []
    for case in CASES:
        if case.name not in NAMES or case.peer is None:
            continue
        for mode in (*case.modes, "call"):
            pair = case.ours, case.peer
            turns = [[call(case, f) if mode == "call" else build(case, f, mode) for f in pair] for _ in range(TURNS)]
            ours, peer = (statistics.median(side) for side in zip(*turns, strict=True))
            rows.append({"name": case.name, "mode": mode, "ms": {"ours": ours, "peer": peer}, "ratio": ours / peer})
            print(f"{case.name:16} {mode:14} {ours:9.3f} ms, the peer's {peer:9.3f}: {ours / peer:5.2f}", flush=True)
    result = {**measure.about(), "import_ms": statistics.median(times), "rows": rows}
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {output}")
