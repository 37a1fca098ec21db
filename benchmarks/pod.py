"""Steps of a class-sharded head compiled for a whole pod, which need not be there: memory of a chip, collectives.

`python -m benchmarks programs --pod v5e:16x16` writes `benchmarks/results/pod-v5e-16x16.json`, and
`python -m benchmarks.scaling --render` the table of `benchmarks/scaling.md`; `v5p:4x4x4` are 64 chips of a v5p, and
`h100:8` eight GPUs of one machine.
The weight's classes are cut over one axis of a mesh, the tokens over both; hidden states are gathered along the
classes' axis.
"""

import json
import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, programs
from jsoftmax import heads

TOKENS_OF_A_ROW, FEATURES, CLASSES = 8192, 4096, 2**20
AXES = ("tokens", "classes")
SPECS = (P(AXES), P("classes"), P(AXES))
"""Of hidden states, weight, labels."""

RESULTS = pathlib.Path(__file__).parent / "results"


def gathered(*arrays: jax.Array) -> list[jax.Array]:
    """The tokens of a row of chips, gathered on each of its chips."""
    return [jax.lax.all_gather(a, "classes", tiled=True) for a in arrays]


def mean(losses: jax.Array) -> jax.Array:
    return jax.lax.pmean(jnp.mean(losses), AXES)


def loss(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    h, y = gathered(hidden, labels)
    return mean(heads.linear_cross_entropy(h, weight, y, axis_name="classes"))


def statistics(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    h, y = gathered(hidden, labels)
    found = heads.linear_statistics(h, weight, y, axis_name="classes")
    return mean(found.entropy - found.log_prob)


def top_k(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> Any:
    (h,) = gathered(hidden)
    return heads.linear_top_k(h, weight, 50, axis_name="classes")


def categorical(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> Any:
    (h,) = gathered(hidden)
    return heads.linear_categorical(jax.random.key(0), h, weight, axis_name="classes")


GRADIENTS = (P(), (P(AXES), P("classes")))
PROGRAMS: dict[str, tuple[Callable[..., Any], Any]] = {
    "loss and gradients": (jax.value_and_grad(loss, (0, 1)), GRADIENTS),
    "statistics and gradients": (jax.value_and_grad(statistics, (0, 1)), GRADIENTS),
    "top 50": (top_k, P("tokens")),
    "a draw": (categorical, P("tokens")),
}


def devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, such as v5e:16x16 or v5p:4x4x4, or GPUs of one machine, h100:8; or a message that
    says what is missing."""
    programs.configure()
    kind, _, size = topology.partition(":")
    try:
        if kind == "h100":
            of_gpus = {"topology": f"1x1x{size}", "target_config": programs.H100}
            return list(topologies.get_topology_desc(kind, "cuda", **of_gpus).devices)
        return list(
            topologies.get_topology_desc(topology, "tpu", chips_per_host_bounds=(2, 2, 1), num_slices=1).devices
        )
    except Exception as error:
        sys.exit(programs.missing(topology, error, programs.NEEDS["h100" if kind == "h100" else "v5e"]))


def meshes(count: int) -> list[tuple[int, int]]:
    """Tokens × classes: a square, or twice as many classes as tokens; and classes alone."""
    side = 2 ** (int(math.log2(count)) // 2)
    return [(side, count // side), (1, count)]


def collectives(text: str) -> list[dict[str, Any]]:
    """For each kind of collective: how many there are, how many of them in loops, and the bytes of their results on a
    chip, all and the largest."""
    computations = hlo.parse(text)
    in_loops = inside_loops(computations)
    found: dict[str, dict[str, Any]] = {}
    for name, instructions in computations.items():
        for instruction in instructions.values():
            kind = instruction.operation.removesuffix("-start")
            if kind not in hlo.COLLECTIVES:
                continue
            if name.startswith("all-reduce-scatter"):  # a TPU's fusion of a sum and its slice
                kind = "reduce-scatter"
            shapes = [hlo.size(shape) for shape in re.findall(r"\w+\[[\d,]*\]", instruction.shape)]
            both_sides = instruction.operation in {"all-gather-start", "reduce-scatter-start"}
            size = max(shapes) if both_sides else sum(shapes)
            row = found.setdefault(kind, {"kind": kind, "count": 0, "bytes": 0, "largest": 0, "in_loops": 0})
            row["count"] += 1
            row["bytes"] += size
            row["largest"] = max(row["largest"], size)
            row["in_loops"] += name in in_loops
    return sorted(found.values(), key=lambda row: row["kind"])


def inside_loops(computations: hlo.Computations) -> set[str]:
    """The computations that run in loops."""
    found: set[str] = set()
    waiting = [hlo.called(i, "body") for c in computations.values() for i in c.values() if i.operation == "while"]
    while waiting:
        name = waiting.pop()
        if name is None or name in found:
            continue
        found.add(name)
        for instruction in computations.get(name, {}).values():
            waiting += [hlo.called(instruction, key) for key in ("body", "calls", "to_apply", "async_execution_thread")]
    return found


def row_of(of_devices: list[Any], mesh: tuple[int, int], name: str, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """The counts of one program on a chip. sizes: tokens of a row of chips, features, classes."""
    tokens, features, classes = sizes
    made = Mesh(np.array(of_devices).reshape(mesh), AXES)
    f, out = PROGRAMS[name]
    shapes = (
        ((tokens * mesh[0], features), jnp.bfloat16),
        ((classes, features), jnp.bfloat16),
        ((tokens * mesh[0],), jnp.int32),
    )
    given = [
        jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(made, spec))
        for shape, spec in zip(shapes, SPECS, strict=True)
    ]
    compiled: Any = jax.jit(jax.shard_map(f, mesh=made, in_specs=SPECS, out_specs=out)).lower(*given).compile()
    memory = compiled.memory_analysis()
    return {
        "program": name,
        "mesh": list(mesh),
        "sizes": list(sizes),
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
    }


def check(row: dict[str, Any]) -> None:
    """Checks that neither weight nor scores are gathered: nothing moves in a loop, and no array that moves is as large
    as half of the whole weight, or of a row of chips' scores, in bfloat16."""
    tokens, features, classes = row["sizes"]
    for made in row["collectives"]:
        if made["in_loops"] or made["largest"] >= classes * min(features, tokens):
            raise SystemExit(f"{row['program']} on {row['mesh']} moves weight or scores: {made}")


def run(topology: str, output: pathlib.Path | None = None) -> None:
    """Compiles every program for the pod and writes its counts."""
    of_devices = devices(topology)
    rows = []
    for mesh in meshes(len(of_devices)):
        for name in PROGRAMS:
            row = row_of(of_devices, mesh, name, (TOKENS_OF_A_ROW, FEATURES, CLASSES))
            check(row)
            rows.append(row)
            moved = ", ".join(f"{c['count']} {c['kind']} {c['bytes'] / 2**20:.1f} MiB" for c in row["collectives"])
            print(f"{mesh} {name}: temporaries {row['temporaries'] / 2**20:.0f} MiB; {moved}", flush=True)
    path = output or RESULTS / f"pod-{topology.replace(':', '-')}.json"
    path.write_text(json.dumps({"topology": topology, "jax": jax.__version__, "rows": rows}, indent=1) + "\n")
