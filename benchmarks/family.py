"""Value and vjp of softmax, log_softmax and log_normalizer beside jax.nn: one process, calls interleaved."""

import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jsoftmax

FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "softmax": (jsoftmax.softmax, jax.nn.softmax),
    "log_softmax": (jsoftmax.log_softmax, jax.nn.log_softmax),
    "log_normalizer": (jsoftmax.log_normalizer, lambda z: jax.nn.logsumexp(z, -1)),
}
SHAPES = ((1024, 1024), (256, 32768), (1_000_000, 8))


def vjp(f: Callable[..., Any]) -> Callable[..., Any]:
    def value_and_vjp(z: jax.Array, g: jax.Array) -> Any:
        value, pull = jax.vjp(f, z)
        return value, pull(g)

    return value_and_vjp


def interleaved(ours: Callable[..., Any], peer: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, float]:
    """Medians in ms over interleaved calls, and the ratio's median with its quartiles."""
    ours, peer = jax.jit(ours), jax.jit(peer)
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    while len(times[0]) < 15 or (time.perf_counter() - started < 2 and len(times[0]) < 200):
        for f, taken in zip((ours, peer), times, strict=True):
            if not taken:
                jax.block_until_ready(f(*arguments))
            start = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            taken.append(1e3 * (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ours_ms": statistics.median(times[0]),
        "peer_ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "calls": len(ratios),
    }


def run(output: pathlib.Path) -> None:
    rows = []
    print("ours / jax.nn: median of the ratio [quartiles], medians in ms")
    for shape in SHAPES:
        z = 3 * jax.random.normal(jax.random.key(0), shape)
        for name, (ours, peer) in FUNCTIONS.items():
            g = jax.random.normal(jax.random.key(1), ours(z).shape)
            for what, a, b, arguments in (("value", ours, peer, (z,)), ("vjp", vjp(ours), vjp(peer), (z, g))):
                row = {"function": name, "what": what, "shape": shape, **interleaved(a, b, arguments)}
                rows.append(row)
                print(
                    f"{shape!s:16} {name:15} {what:6} {row['ratio']:.2f} [{row['ratio_low']:.2f}, "
                    f"{row['ratio_high']:.2f}]  {row['ours_ms']:.2f} / {row['peer_ms']:.2f}"
                )
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jsoftmax": jsoftmax.__version__,
        "dtype": str(jnp.float32.dtype),
    }
    output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"written to {output}")
