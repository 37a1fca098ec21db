"""What it costs to begin: the import, tracing and compiling of small programs, and calls outside `jit`; beside peers.

The times are medians, the ratios those of the medians; nothing is cached between two turns, in which ours and the peer
follow one another.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

import jsoftmax as js
from benchmarks import measure
from benchmarks.family import hvp, plain_entropy, value_and_vjp
from benchmarks.measure import F
from jsoftmax import losses

CODE = "import time, jax; t = time.perf_counter(); import jsoftmax; print(1e3 * (time.perf_counter() - t))"
SHAPE = (64, 1000)
SMALL = (4, 8)
TURNS = 7
CALLS = 500


def functions() -> dict[str, tuple[F, F]]:
    """Ours and the peer's, of scores alone."""

    def labels(z: jax.Array) -> jax.Array:
        return jnp.zeros(z.shape[:-1], int)

    return {
        "softmax": (js.softmax, jax.nn.softmax),
        "log_softmax": (js.log_softmax, jax.nn.log_softmax),
        "log_normalizer": (js.log_normalizer, lambda z: jax.nn.logsumexp(z, -1)),
        "entropy": (js.entropy, plain_entropy),
        "cross_entropy": (
            lambda z: losses.cross_entropy(z, labels(z)),
            lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels(z)),
        ),
    }


def imported() -> list[float]:
    """What `import jsoftmax` adds to `import jax`, in fresh processes, ms."""

    def once() -> float:
        return float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)

    return [once() for _ in range(12)][2:]  # the first ones compile the byte code


def build(f: F, mode: str) -> float:
    """Tracing and compiling the function's value, value and vjp, or Hessian product, ms."""
    z = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    g = jax.eval_shape(f, z)
    g = jax.ShapeDtypeStruct(g.shape, g.dtype)
    program, given = {"value": (f, (z,)), "value and vjp": (value_and_vjp(f), (z, g)), "HVP": (hvp(f), (z, g, z))}[mode]
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(program).lower(*given).compile()
    return 1e3 * (time.perf_counter() - start)


def call(f: F) -> float:
    """One call outside jit, of an array of `SMALL`, ms."""
    z = jnp.ones(SMALL)
    f(z).block_until_ready()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        f(z).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def run(output: pathlib.Path) -> None:
    times = imported()
    print(f"import jsoftmax after import jax: {statistics.median(times):.0f} ms [{min(times):.0f}, {max(times):.0f}]")
    rows = []
    for name, pair in functions().items():
        for mode in ("value", "value and vjp", "HVP", "call"):
            turns = [[call(f) if mode == "call" else build(f, mode) for f in pair] for _ in range(TURNS)]
            ours, peer = (statistics.median(side) for side in zip(*turns, strict=True))
            rows.append({"name": name, "mode": mode, "ms": {"ours": ours, "peer": peer}, "ratio": ours / peer})
            print(f"{name:16} {mode:14} {ours:9.3f} ms, the peer's {peer:9.3f}: {ours / peer:5.2f}", flush=True)
    result = {**measure.about(), "import_ms": statistics.median(times), "rows": rows}
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {output}")
