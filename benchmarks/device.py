"""Times on the accelerator that is here, of the cases of `benchmarks.programs`, beside their peers, PyTorch and a copy.

`python -m benchmarks device --output benchmarks/results/device-<device>-jax-<version>.json`; `--render` reads files of
such names. Arrays are of 256 MiB of float32 scores, so that a call lasts longer than its launch and nothing stays in
the cache. Calls are queued without waiting, several at a time, and the queues of ours and of the peers follow one
another in one process.
"""

import concurrent.futures
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.programs import CLASSES, FEATURES, HEADS, TOKENS, Case, cells, in_mode, value_and_gradients

SHAPES = ((8192, 8192), (512, 131072), (8_388_608, 8), (65536, 1000))
ROUNDS = 7
QUEUED_MS = 10.0
"""A queue is as many calls as last about so long."""

Call = Callable[[], Any]


def arrays(given: tuple[Any, ...], classes: int) -> tuple[jax.Array, ...]:
    """Arrays of scores, labels and keys, made from their shapes."""
    made = []
    for i, a in enumerate(given):
        if a.dtype == jnp.uint32:
            made.append(jax.random.key_data(jax.random.key(i)))
        elif a.dtype == jnp.int32:
            made.append(jax.random.randint(jax.random.key(i), a.shape, 0, classes))
        else:
            made.append((3 * jax.random.normal(jax.random.key(i), a.shape, jnp.float32)).astype(a.dtype))
    return tuple(made)


def torch_functions(torch: Any) -> dict[str, Any]:
    """PyTorch's functions for the cases, to be compiled by its compiler."""
    functional = torch.nn.functional

    def entropy(z: Any) -> Any:
        return -(functional.softmax(z, -1) * functional.log_softmax(z, -1)).sum(-1)

    return {
        "softmax": lambda z: functional.softmax(z, -1),
        "log_softmax": lambda z: functional.log_softmax(z, -1),
        "log_normalizer": lambda z: torch.logsumexp(z, -1),
        "entropy": entropy,
        "cross_entropy": lambda z, y: functional.cross_entropy(z, y, reduction="none"),
    }


def torch_call(torch: Any, f: Any, mode: str, given: tuple[jax.Array, ...]) -> Call:
    """f compiled by PyTorch, on the same arrays. The cotangent is the argument after the scores."""
    z, *more = (torch.from_dlpack(a) for a in given)
    more = [a.long() if a.dtype == torch.int32 else a for a in more]
    torch._dynamo.reset()  # else a function of many shapes gets a program for all of them
    program = torch.compile(f, dynamic=False)
    if mode == "value":
        return lambda: program(z, *more)
    g, *more = more
    z = z.clone().requires_grad_()

    def both() -> Any:
        value = program(z, *more)
        return value, torch.autograd.grad(value, z, g)

    return both


def queue(call: Call, wait: Callable[[Any], Any], calls: int) -> float:
    """Milliseconds for each of `calls` queued calls."""
    started = time.perf_counter()
    for _ in range(calls - 1):
        call()
    wait(call())
    return 1e3 * (time.perf_counter() - started) / calls


def interleaved(programs: dict[str, tuple[Call, Callable[[Any], Any]]]) -> dict[str, Any]:
    """Medians in ms, and ratios of the first to each other one with their quartiles."""
    for call, wait in programs.values():
        queue(call, wait, 2)
    lengths = {name: max(2, min(200, round(QUEUED_MS / queue(*pair, 2)))) for name, pair in programs.items()}
    rounds = [{name: queue(*pair, lengths[name]) for name, pair in programs.items()} for _ in range(ROUNDS)]
    first, *others = programs
    return {
        "ms": {name: statistics.median(turn[name] for turn in rounds) for name in programs},
        "ratio": {name: statistics.quantiles([turn[first] / turn[name] for turn in rounds], n=4) for name in others},
    }


def copy_rate(shape: tuple[int, ...]) -> float:
    """GB/s of z + 1, its bytes read and written."""
    z = jnp.ones(shape)
    program = jax.jit(lambda z: z + 1).lower(z).compile()
    ms = interleaved({"copy": (lambda: program(z), jax.block_until_ready)})["ms"]["copy"]
    return 2 * z.nbytes / ms / 1e6


def heads_rows(sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Times of the heads, their temporaries, and how many TFLOP/s the fewest three products would be."""
    tokens, features, classes = sizes
    hidden, weight = (
        (scale * jax.random.normal(jax.random.key(i), (n, features))).astype(jnp.bfloat16)
        for i, (n, scale) in enumerate(((tokens, 0.5), (classes, 0.05)))
    )
    labels = jax.random.randint(jax.random.key(2), (tokens,), 0, classes)
    rows = []
    for name, f in HEADS.items():
        program = jax.jit(value_and_gradients(f)).lower(hidden, weight, labels).compile()
        call = functools.partial(program, hidden, weight, labels)
        ms = interleaved({name: (call, jax.block_until_ready)})["ms"][name]
        memory = program.memory_analysis().temp_size_in_bytes / 2**20  # pyright: ignore[reportOptionalMemberAccess]
        rate = 3 * 2 * tokens * features * classes / ms / 1e9
        rows.append({"name": name, "sizes": sizes, "ms": ms, "MiB": memory, "TFLOP/s": rate})
        print(f"{name:32} {ms:8.2f} ms  {memory:8.0f} MiB of temporaries  {rate:6.0f} TFLOP/s", flush=True)
    return rows


def run(
    output: pathlib.Path,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    sizes: tuple[int, int, int] = (TOKENS, FEATURES, CLASSES),
) -> None:
    """Compiles and times every cell, and writes the results after each."""
    torch = measure.torch()
    others = torch_functions(torch) if torch is not None and torch.cuda.is_available() else {}
    about: dict[str, Any] = {**measure.about(), "copy_GB_per_s": copy_rate(shapes[0]), "heads": heads_rows(sizes)}
    print({name: value for name, value in about.items() if name != "heads"}, flush=True)
    wanted = cells(shapes)

    def built(cell: tuple[Case, str, tuple[int, ...], str]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        case, mode, shape, dtype = cell
        z, more = jax.ShapeDtypeStruct(shape, dtype), case.more(shape, jnp.dtype(dtype))
        made = {}
        for side, f in {"ours": case.ours, "peer": case.peer}.items():
            if f is not None:
                program, given = in_mode(f, mode, z, more)
                made[side] = jax.jit(program).lower(*given).compile(), given
        return made

    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = list(pool.map(built, wanted))
    rows = []
    for (case, mode, shape, dtype), made in zip(wanted, compiled, strict=True):
        calls: dict[str, tuple[Call, Callable[[Any], Any]]] = {}
        real: tuple[jax.Array, ...] = ()
        for side, (program, given) in made.items():
            real = arrays(given, shape[-1])
            calls[side] = functools.partial(program, *real), jax.block_until_ready
        if torch is not None and mode != "HVP" and case.name in others:
            call = torch_call(torch, others[case.name], mode, real)
            calls["torch.compile"] = call, lambda _, torch=torch: torch.cuda.synchronize()
        row = {"name": case.name, "mode": mode, "shape": list(shape), "dtype": dtype, **interleaved(calls)}
        rows.append(row)
        output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        against = "  ".join(f"{n} {m:.2f} [{a:.2f}, {b:.2f}]" for n, (a, m, b) in row["ratio"].items())
        print(f"{case.name:24} {mode:14} {shape!s:14} {dtype:8} {row['ms']['ours']:8.3f} ms; / {against}", flush=True)
    print(f"written to {output}")
