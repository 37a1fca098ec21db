"""A plan for huge vocabularies over many devices: what is sent, how long it takes, what is held.

    python -m benchmarks.scaling [--bandwidth 5e10 …]     measures, checks, writes results/scaling.json and scaling.md
    python -m benchmarks.scaling --render                 writes scaling.md of the JSON files that there are

Measured: what a step of `linear_cross_entropy` costs on this device, and steps on virtual devices. Checked against the
collectives of compiled programs: the bytes. Assumed, and arguments: the link, the accelerator.
"""

import argparse
import json
import math
import pathlib
import re
import statistics
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from benchmarks import measure
from benchmarks.heads import arrays
from jsoftmax import heads

RESULTS = pathlib.Path(__file__).parent / "results"
TEXT = pathlib.Path(__file__).parent / "scaling.md"
VOCABULARIES = [10**n for n in (6, 7, 8, 9)]
DEVICES = (8, 64, 512, 4096)
NUMBER = 4
"""Bytes of a float32 or int32."""


class Assumed(NamedTuple):
    """The assumptions, which are not measured."""

    tokens: int
    features: int
    latency: float
    bandwidth: float
    network: str
    flops: float
    memory: float
    weight_bytes: int


class Mesh(NamedTuple):
    """The numbers of parts into which tokens and classes are cut."""

    tokens: int
    classes: int


# --- the model -----------------------------------------------------------------------------------------------


class Collective(NamedTuple):
    kind: str
    size: float
    """Bytes of the whole array that is gathered, summed, or summed and scattered."""
    devices: int

    def sent(self) -> float:
        """Bytes that each device sends, at least."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * (self.devices - 1) / self.devices * self.size

    def seconds(self, assumed: Assumed) -> float:
        hops = self.devices - 1 if assumed.network == "ring" else math.ceil(math.log2(self.devices))
        times = 2 if self.kind == "all-reduce" else 1
        return times * hops * assumed.latency + self.sent() / assumed.bandwidth


def collectives(tokens: int, features: int, classes: int, mesh: Mesh) -> list[Collective]:
    """The collectives of a step, value and gradient, whose tokens come sharded over all devices."""
    n = tokens / mesh.tokens
    over_classes = [
        Collective("all-gather", NUMBER * n * (features + 1), mesh.classes),  # hidden states and labels
        Collective("all-reduce", NUMBER * n, mesh.classes),  # the maximum
        Collective("all-reduce", NUMBER * 3 * n, mesh.classes),  # the sums, and the label's score
        Collective("all-reduce", NUMBER * n, mesh.classes),  # the losses' weights
        Collective("reduce-scatter", NUMBER * n * features, mesh.classes),  # the gradient of the hidden states
    ]
    over_tokens = [Collective("all-reduce", NUMBER * classes / mesh.classes * features, mesh.tokens)]  # of the weight
    return over_classes + over_tokens


def sent(assumed: Assumed, classes: int, mesh: Mesh) -> float:
    return sum(c.sent() for c in collectives(assumed.tokens, assumed.features, classes, mesh))


def seconds(assumed: Assumed, classes: int, mesh: Mesh) -> float:
    return sum(c.seconds(assumed) for c in collectives(assumed.tokens, assumed.features, classes, mesh))


def held(assumed: Assumed, classes: int, mesh: Mesh) -> float:
    """Bytes on each device of the weight with its gradient and optimiser, and of gathered hidden states with theirs."""
    gathered = 2 * NUMBER * assumed.tokens / mesh.tokens * assumed.features if mesh.classes > 1 else 0
    return assumed.weight_bytes * classes * assumed.features / mesh.classes + gathered


def best(assumed: Assumed, classes: int, devices: int) -> Mesh | None:
    """The mesh of powers of two that fits in memory and needs the least time on the links."""
    meshes = [Mesh(2**i, devices // 2**i) for i in range(devices.bit_length())]
    fitting = [mesh for mesh in meshes if held(assumed, classes, mesh) <= assumed.memory]
    return min(fitting, key=lambda mesh: seconds(assumed, classes, mesh), default=None)


def even(assumed: Assumed, devices: int) -> float:
    """The vocabulary for which sharding tokens takes as long on the links as sharding classes."""
    by_classes = seconds(assumed, 0, Mesh(1, devices))
    by_tokens = [seconds(assumed, classes, Mesh(devices, 1)) for classes in (0, 1)]
    return (by_classes - by_tokens[0]) / (by_tokens[1] - by_tokens[0])


# --- what is checked and measured ----------------------------------------------------------------------------


def step(mesh: Mesh) -> Any:
    """Value and gradient of the mean loss; the tokens come sharded over all devices."""
    devices = jax.devices()[: mesh.tokens * mesh.classes]
    of_devices = jax.make_mesh(mesh, ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    tokens, classes = PartitionSpec(("tokens", "classes")), PartitionSpec("classes")

    def loss(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        whole, y = (jax.lax.all_gather(a, "classes", tiled=True) for a in (hidden, labels))
        losses = heads.linear_cross_entropy(whole, weight, y, axis_name="classes")
        return jax.lax.pmean(jnp.mean(losses), ("tokens", "classes"))

    gradients = (PartitionSpec(), (tokens, classes))
    f = jax.value_and_grad(loss, (0, 1))
    return jax.jit(jax.shard_map(f, mesh=of_devices, in_specs=(tokens, classes, tokens), out_specs=gradients))


def compiled_bytes(mesh: Mesh, tokens: int, features: int, classes: int) -> dict[str, float]:
    """Bytes, by kind of collective, of the arrays that the compiled program gathers, sums and scatters, single numbers
    left out."""
    text = step(mesh).lower(*arrays(tokens, features, classes)).compile().as_text()
    found: Counter[str] = Counter()
    lines = re.findall(r" = (.*) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(", text)
    for results, kind in lines:
        for shape in re.findall(r"[fs]32\[([\d,]+)\]", results):
            size = NUMBER * math.prod(map(int, shape.split(",")))
            found[kind] += size * (mesh.classes if kind == "reduce-scatter" else 1)
    return dict(found)


def check() -> list[dict[str, Any]]:
    """Checks that the model's bytes are those of compiled programs."""
    tokens, features, classes = 64, 16, 1024
    rows = []
    for mesh in (Mesh(1, 8), Mesh(2, 4), Mesh(8, 1)):
        model: Counter[str] = Counter()
        for c in collectives(tokens, features, classes, mesh):
            model[c.kind] += int(c.size)
        found = compiled_bytes(mesh, tokens, features, classes)
        if found != dict(model):
            raise SystemExit(f"{mesh}: the compiled program has {found} bytes, the model {dict(model)}.")
        rows.append({"mesh": mesh, "bytes": found})
        print(f"{mesh}: {found} bytes in the compiled program, as in the model", flush=True)
    return rows


def median_seconds(f: Any, given: Any, calls: int) -> float:
    program = f.lower(*given).compile()
    jax.block_until_ready(program(*given))
    return statistics.median(measure.timed(program, *given)[0] for _ in range(calls)) / 1e3


def cost() -> list[dict[str, Any]]:
    """Nanoseconds of value and gradient for each token × class × feature, on one device without collectives."""

    def loss(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        return heads.linear_cross_entropy(hidden, weight, labels).mean()

    rows = []
    for shape in ((2048, 512, 8192), (2048, 512, 65_536)):
        taken = median_seconds(jax.jit(jax.value_and_grad(loss, (0, 1))), arrays(*shape), 5)
        rows.append({"shape": shape, "seconds": taken, "ns": 1e9 * taken / math.prod(shape)})
        print(f"{shape}: {taken:.3f} s, {rows[-1]['ns']:.4f} ns", flush=True)
    return rows


def weak() -> list[dict[str, Any]]:
    """Weak scaling: each virtual device has the same number of classes."""
    rows = []
    for devices in (1, 2, 4, 8):
        shape = (512, 256, 8192 * devices)
        taken = median_seconds(step(Mesh(1, devices)), arrays(*shape), 9)
        rows.append({"devices": devices, "shape": shape, "seconds": taken})
        print(f"{devices} virtual devices, {shape}: {1e3 * taken:.1f} ms", flush=True)
    return rows


# --- the text ------------------------------------------------------------------------------------------------


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---:"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render(runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    assumed = Assumed(**first["assumed"])
    ns = first["cost"][-1]["ns"]
    text = TEMPLATE
    rule = assumed.flops / assumed.bandwidth
    for name, value in {
        "PLAN": plan(assumed, ns),
        "EVEN": even_table(assumed),
        "COST": cost_table(runs),
        "WEAK": weak_table(runs),
        "PODS": pods_table(),
        "TOKENS": f"{assumed.tokens:,}",
        "FEATURES": f"{assumed.features:,}",
        "LATENCY": f"{1e6 * assumed.latency:g} µs",
        "BANDWIDTH": f"{assumed.bandwidth / 1e9:g} GB/s",
        "NETWORK": NETWORKS[assumed.network],
        "FLOPS": f"{assumed.flops / 1e12:g} Tflop/s",
        "MEMORY": f"{assumed.memory / 1e9:g} GB",
        "BYTES": str(assumed.weight_bytes),
        "FIT": f"{assumed.memory / assumed.weight_bytes / assumed.features / 1e6:.1f} million",
        "NS": f"{ns:.4f}",
        "RULE": f"{rule:,.0f}",
        "MORE": f"{100 * 5.5 / assumed.features:.1f} %",
    }.items():
        text = text.replace(f"<{name}>", value)
    return text


NETWORKS = {
    "tree": "halving and doubling, 2 log₂ n hops for an all-reduce, log₂ n for a gather or scatter over n devices",
    "ring": "a ring, 2 (n − 1) hops for an all-reduce, n − 1 for a gather or scatter over n devices",
}


def plan(assumed: Assumed, ns: float) -> str:
    rows = []
    for classes in VOCABULARIES:
        for devices in DEVICES:
            chosen = best(assumed, classes, devices)
            meshes = (Mesh(1, devices), Mesh(devices, 1), chosen)
            entries = assumed.tokens * classes * assumed.features / devices
            rows.append(
                [
                    f"10^{len(str(classes)) - 1}",
                    f"{devices:,}",
                    " / ".join(_number(held(assumed, classes, mesh) / 1e9) for mesh in meshes[:2]),
                    "none fits" if chosen is None else f"{chosen.tokens} × {chosen.classes:,}",
                    " / ".join("–" if m is None else _number(sent(assumed, classes, m) / 1e9) for m in meshes),
                    " / ".join("–" if m is None else _number(1e3 * seconds(assumed, classes, m)) for m in meshes),
                    _number(1e3 * 8 * entries / assumed.flops),
                    _number(ns * 1e-9 * entries),
                ]
            )
    titles = [
        "V",
        "devices",
        "held, GB: classes / tokens",
        "best mesh, tokens × classes",
        "sent, GB: classes / tokens / best",
        "links, ms: classes / tokens / best",
        "accelerator, ms",
        "this CPU, s",
    ]
    return table(titles, rows)


def _number(x: float) -> str:
    """A number with at least two digits."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def even_table(assumed: Assumed) -> str:
    counts = [2**k for k in (14, 17, 20, 23)]
    rows = [[f"{n:,}", *(f"{even(assumed._replace(tokens=n), devices):,.0f}" for devices in DEVICES)] for n in counts]
    return table(["tokens of a step", *(f"{devices:,} devices" for devices in DEVICES)], rows)


def cost_table(runs: list[dict[str, Any]]) -> str:
    rows = [
        [_where(run), " × ".join(f"{n:,}" for n in row["shape"]), f"{row['seconds']:.3f}", f"{row['ns']:.4f}"]
        for run in runs
        for row in run["cost"]
    ]
    return table(["device", "tokens × features × classes", "seconds", "ns"], rows)


def weak_table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        one = run["weak"][0]["seconds"]
        for row in run["weak"]:
            n, taken = row["devices"], row["seconds"]
            of_each = f"{taken / n / one:.2f}"
            rows.append([_where(run), str(n), f"{row['shape'][2]:,}", f"{1e3 * taken:.0f}", of_each])
    return table(["device", "virtual devices", "V", "ms", "ms / devices, to that of one"], rows)


def pods_table() -> str:
    """A table of programs compiled for pods (`benchmarks.pod`): memory of each chip, and MiB of collectives by kind."""
    rows = []
    for path in sorted(RESULTS.glob("pod-*.json")):
        pod = json.loads(path.read_text())
        for row in pod["rows"]:
            moved = {c["kind"]: f"{_number(c['bytes'] / 2**20)} ({c['count']})" for c in row["collectives"]}
            memory = [_number(row[name] / 2**20) for name in ("arguments", "temporaries")]
            kinds = [
                moved.get(kind, "") for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute")
            ]
            rows.append([pod["topology"], " × ".join(map(str, row["mesh"])), row["program"], *memory, *kinds])
    titles = ["chips", "tokens × classes", "program", "arguments", "temporaries", "all-gather", "all-reduce"]
    return table([*titles, "reduce-scatter", "permute"], rows)


def _where(run: dict[str, Any]) -> str:
    return f"jax {run['jax']}, {run['processor']}, {run['cores']} cores"


TEMPLATE = """# Huge vocabularies over many devices: a plan

`python -m benchmarks.scaling` makes this page (`--help` lists the assumptions that can be changed). One step is value
and gradient of `heads.linear_cross_entropy` in float32, with <TOKENS> tokens and <FEATURES> features. Tokens come from
a model whose batch is sharded over all devices. Nothing here ran on more than one machine: the plan is arithmetic,
from one measured cost and from assumed links.

- **Sharding classes** (`axis_name`, or `shards`): a device holds V/n rows of the weight. The hidden states are
  gathered, and their gradient is summed and scattered. Five more numbers for each token are summed.
- **Sharding tokens**: a device holds all of the weight, whose gradient [V, d] is summed over devices.
- **A mesh** of both, tokens × classes, sums the gradient of a part of the weight over fewer devices.

Assumed:

- a link has a latency of <LATENCY> and sends <BANDWIDTH>. All links are equal, and none slows another down;
- collectives go by <NETWORK>;
  they do not overlap with computing;
- an accelerator does <FLOPS> in the head's products, 8 flops for each token × class × feature, and holds <MEMORY>;
- weight, gradient and Adam's state take <BYTES> bytes for each entry; gathered hidden states and their gradient are
  held, too.

Before it measures, the script compares the bytes with the collectives of programs compiled for 8 devices on three
meshes, and stops where they differ.

<PLAN>
"Best" is the mesh of powers of two that fits in memory and needs the least time on the links. The computing is the same
for all meshes.

What it says:

- Sharding tokens sends less than sharding classes if V is less than the number of tokens of a step (plus <MORE>),
  whatever the features, devices and bandwidth are: the former sends 8 V d bytes, the latter 8 N d and 44 N. But the
  whole weight must fit on a device: up to V = <FIT> here.
- What sharding classes sends does not grow with V, and hardly with the number of devices. Computing takes longer than
  the links while a device has more classes than flop/s divided by bytes/s, <RULE> here. So 4,096 devices are too many
  for 10^6 classes, but not for 10^9, unless tokens are sharded as well.
- A mesh sends less than either: its two sums are of [N/T, d] and [V/C, d]. The best T is near √(N n / V), if that is
  more than 1 and memory allows it.

The table has the vocabulary for which both need the same time on the links, latency included. Below it, shard tokens:

<EVEN>
## Pods, compiled

XLA compiled these programs for chips that are not here (`python -m benchmarks programs --pod v5e:16x16`, or `v5p:4x4x4`
for 64 chips in three dimensions): 8,192 tokens for each row of chips, 4,096 features, 2^20 classes, bfloat16. The table
has, for each chip, MiB of memory that arguments and temporaries take, and MiB of the collectives' arrays, with the
number of collectives. The script checks that no collective is in a loop, and that no array as large as half of the
weight, or of a row's scores, is moved.

<PODS>
Compared with the model:

- bfloat16 hidden states, their gradient and the weight's gradient are sent as bfloat16. That is half the bytes of the
  model, which assumes float32. On a mesh, the rows' shares of the weight's gradient are thus rounded before they are
  summed;
- for TPUs with the classes over all chips, 1 × 16, 1 × 64 and 1 × 256, XLA sums the gradient of the hidden states by an
  all-reduce, of which each chip keeps its part. This sends twice as much as the model's reduce-scatter. On the other
  meshes, and on GPUs, it is a reduce-scatter. For 64 chips of a v5p it makes an all-reduce of the gather of the hidden
  states, too;
- the k largest of each chip are summed into an array for all chips of a row: tokens × k × chips numbers, and as many
  indices. On 256 chips this is more than everything else together. A draw sends the log-normalisers of chunks of 128
  classes, 1/128 of the scores, to all chips of a row. The model covers training steps only.

## The cost of a device, measured

The numbers are nanoseconds of value and gradient for each token × class × feature. The plan's last column assumes <NS>.

<COST>
## Weak scaling on virtual devices, measured

Each of n virtual CPU devices has 512 tokens, 256 features and 8,192 classes. The devices share the cores of one
machine.

<WEAK>
n devices compute n times as much on the same cores. In the last column, 1 means that the exchanges cost nothing in
comparison; less than 1 means that one device alone does not keep the cores busy. The table says nothing about links,
as a collective here is a copy in memory. Nor does it say what it costs to wait for the slowest of many machines, or to
share a network with others.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--tokens", type=int, default=2**20, help="of a step")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--latency", type=float, default=5e-6, help="seconds of a hop")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="bytes per second that a device sends")
    parser.add_argument("--network", choices=list(NETWORKS), default="tree")
    parser.add_argument("--flops", type=float, default=2e14, help="of an accelerator, in the products, per second")
    parser.add_argument("--memory", type=float, default=8e10, help="bytes of an accelerator")
    parser.add_argument("--weight-bytes", type=int, default=16, help="for each entry, with the optimiser's state")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "scaling.json")
    parser.add_argument("--render", action="store_true", help="only write the text")
    arguments = vars(parser.parse_args())
    output, only_text = arguments.pop("output"), arguments.pop("render")
    if not only_text:
        jax.config.update("jax_num_cpu_devices", 8)
        made = {"assumed": arguments, "checked": check(), "cost": cost(), "weak": weak()}
        output.write_text(json.dumps({**measure.about(), **made}, indent=1) + "\n")
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("scaling*.json"))]
    TEXT.write_text(render(runs))
    print(f"written: {TEXT}")


if __name__ == "__main__":
    main()
