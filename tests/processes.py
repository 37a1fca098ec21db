"""One of several processes that share the classes of a head; run by test_processes.py.

python processes.py PORT PROCESS COUNT compare FOLDER     writes the loss and its derivatives to PROCESS.npz there
python processes.py PORT PROCESS COUNT endless FOLDER     does so, too, then steps until it is killed, or a peer is
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jsoftmax import heads

HEARTBEAT, SHUTDOWN = 4, 4
TOKENS, FEATURES, CLASSES = 6, 3, 32
SPECS = (PartitionSpec(), PartitionSpec("classes"), PartitionSpec("classes"))


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    return tuple(rng.normal(size=shape) for shape in shapes), rng.integers(0, CLASSES, TOKENS)


def loss_and_derivatives(loss):
    """Losses of the tokens, the gradient of their mean and a Hessian product."""

    def run(*given):
        gradient = jax.grad(lambda *given: jnp.mean(loss(*given)), (0, 1, 2))
        along = tuple(jnp.cos(a) for a in given)
        return loss(*given), gradient(*given), jax.jvp(gradient, given, along)[1]

    return run


def of_classes(labels):
    mesh = jax.make_mesh((jax.device_count(),), ("classes",), axis_types=(AxisType.Auto,))

    def loss(hidden, weight, bias):
        return heads.linear_cross_entropy(hidden, weight, labels, bias, axis_name="classes")

    run = loss_and_derivatives(jax.shard_map(loss, mesh=mesh, in_specs=SPECS, out_specs=PartitionSpec()))
    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec())), mesh


def main(port, process, count, task, folder):
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        int(count),
        int(process),
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    given, labels = arrays()
    run, mesh = of_classes(labels)
    shardings = [NamedSharding(mesh, spec) for spec in SPECS]
    given = [
        jax.make_array_from_callback(a.shape, sharding, a.__getitem__)
        for a, sharding in zip(given, shardings, strict=True)
    ]
    found = [np.asarray(a) for a in jax.tree.leaves(run(*given))]
    unfinished = pathlib.Path(folder, f"{process}.part.npz")
    np.savez(unfinished, *found)
    unfinished.rename(unfinished.with_name(f"{process}.npz"))
    while task == "endless":
        jax.block_until_ready(run(*given))


if __name__ == "__main__":
    main(*sys.argv[1:])
