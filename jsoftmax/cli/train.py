"""`python -m jsoftmax train`: scanned digits, a linear model and a small network, with every φ and every loss."""

import argparse
import concurrent.futures
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jsoftmax import PHIS, entmax, exp, fenchel_young_loss, log_softmax, losses, optim
from jsoftmax.cli._progress import tracked
from jsoftmax.phi import Phi

EPOCHS, BATCH = 40, 128
HIDDEN = {"linear": (), "network": (64,)}
CLASSES = 10


class Data(NamedTuple):
    """Scanned digits, 8 × 8 pixels in [0, 1], and their labels."""

    inputs: jax.Array
    labels: jax.Array


class Arm(NamedTuple):
    """One way to train: a loss with its φ, and the log-probabilities that are tested; hashable, part of a program."""

    name: str
    phi: Phi
    loss: Callable[..., jax.Array]
    """(z, labels) ↦ the loss of each row."""
    log_p: Callable[[jax.Array], jax.Array] | None
    """z ↦ log p; None for a loss that gives scores only."""

    @property
    def shown_phi(self) -> str:
        """φ, where the loss has one."""
        return "" if self.name in (*_SPARSE, "Z-loss") else str(self.phi)


def _with_phi(f: Callable[..., jax.Array], phi: Phi, **options: Any) -> Arm:
    """A loss of p = φ(z)/Σ φ(z)."""
    return Arm("", phi, functools.partial(f, phi=phi, **options), functools.partial(log_softmax, phi=phi))


def _sparse(alpha: float) -> Arm:
    """α-entmax and its loss."""
    return Arm("", exp, functools.partial(fenchel_young_loss, alpha=alpha), lambda z: jnp.log(entmax(z, alpha)))


_SPARSE = {"sparsemax": 2.0, "entmax15": 1.5}
LOSSES: dict[str, Callable[[Phi, float], Arm]] = {
    "cross-entropy": lambda phi, margin: _with_phi(losses.cross_entropy, phi),
    "soft-margin": lambda phi, margin: _with_phi(losses.cross_entropy, phi, margin=margin),
    "focal": lambda phi, margin: _with_phi(losses.focal_cross_entropy, phi),
    "Poly-1": lambda phi, margin: _with_phi(losses.poly_cross_entropy, phi),
    "Z-loss": lambda phi, margin: Arm("", phi, losses.spherical_z_loss, None),
    **{name: lambda phi, margin, alpha=alpha: _sparse(alpha) for name, alpha in _SPARSE.items()},
}


def arms(names: list[str], phis: list[str] | None, margin: float) -> list[Arm]:
    """Cross-entropy with every φ and the other losses with exp, unless φ are named; then all with each of them."""
    chosen = [phi for phi in PHIS if phis is None or str(phi) in phis]
    made = []
    for name in names:
        for phi in chosen:
            if phis is None and name != "cross-entropy" and phi != exp:
                continue
            arm = LOSSES[name](phi, margin)._replace(name=name)
            if arm.shown_phi or phi is chosen[0]:
                made.append(arm)
    return made


class Result(NamedTuple):
    """One model trained in one way: per seed, the final test scores and the curve of the test loss."""

    model: str
    loss: str
    phi: str
    accuracy: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray
    curve: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many seeds (default 5)")
    which = f"which losses (default all): {', '.join(LOSSES)}"
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help=which)
    names = [str(phi) for phi in PHIS]
    which = f"which φ, for every loss that takes one: {', '.join(names)}"
    parser.add_argument("--phi", nargs="+", choices=names, metavar="PHI", help=which)
    parser.add_argument("--margin", type=float, default=1.0, metavar="M", help="the soft-margin loss's (default 1)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="optax's (default adam)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, metavar="R", help="for all alike (default 0.01)")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the test losses over the epochs")
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables as Markdown, as in docs/benchmarks/digits.md"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, print, draw."""
    if arguments.seeds < 2:
        print(f"train: --seeds must be at least 2, for a standard error; got {arguments.seeds}.")
        return 2
    console = Console()
    train, test = digits()
    console.print(
        f"scanned digits: {len(train.labels)} to train, {len(test.labels)} to test; {EPOCHS} epochs of "
        f"{arguments.optimizer}({arguments.learning_rate:g}), {arguments.seeds} seeds.\n"
        "Test accuracy, negative log-likelihood and mean predictive entropy: mean ± standard error."
    )
    optimizer = Optimizer(arguments.optimizer, arguments.learning_rate)
    ways = arms(arguments.loss, arguments.phi, arguments.margin)
    jobs = [(model, arm) for model in HIDDEN for arm in ways]
    started = time.perf_counter()

    def one(job: tuple[str, Arm]) -> Result:
        return fit(*job, optimizer, train=train, test=test, seeds=arguments.seeds)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # one compiles while the other trains
        results = list(tracked(pool.map(one, jobs), "models trained", len(jobs), console))
    console.print(f"{len(jobs)} models trained in {time.perf_counter() - started:.0f} s.")
    if arguments.markdown:
        print(_markdown(_COLUMNS, map(_cells, results)))
    else:
        console.print(_results_table(results), *_remarks(results), sep="\n")
    runs = second_order(train)
    if arguments.markdown:
        print(_markdown(_RUN_COLUMNS, map(_run_cells, runs)))
    else:
        console.print(_runs_table(runs), "ms: until the objective is 0.01 % above the least one found.", sep="\n")
    if arguments.plot:
        try:
            from jsoftmax import plot  # noqa: PLC0415  (matplotlib is an extra)
        except ModuleNotFoundError as missing:
            print(f"train: --plot needs the package {missing.name!r}: pip install 'jsoftmax[plot]'.")
            return 2
        plot.learning_curves(results, arguments.plot)
        console.print(f"drawn in {arguments.plot}")
    return 0


def digits() -> tuple[Data, Data]:
    """Training and test set, stratified."""
    inputs, labels = load_digits(return_X_y=True)
    parts = train_test_split(inputs / 16, labels, test_size=0.3, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (jnp.asarray(part) for part in parts)
    return Data(x_train.astype(jnp.float32), y_train), Data(x_test.astype(jnp.float32), y_test)


def initial(key: jax.Array, sizes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    """Weights of variance 1/fan-in, no bias at first."""
    layers = zip(jax.random.split(key, len(sizes) - 1), itertools.pairwise(sizes), strict=True)
    return [(jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n)) for k, (m, n) in layers]


def scores(parameters: Any, inputs: jax.Array, phi: Phi) -> jax.Array:
    """The model's scores, brought into φ's domain by a softplus where that is not all of R."""
    *hidden, (weight, bias) = parameters
    for w, b in hidden:
        inputs = jax.nn.relu(inputs @ w + b)
    z = inputs @ weight + bias
    low, high = (edge + margin for edge, margin in zip(phi.domain, (1e-3, -1e-3), strict=True))
    if np.isfinite(low):
        z = low + jax.nn.softplus(z - low)
    return high - jax.nn.softplus(high - z) if np.isfinite(high) else z


class Optimizer(NamedTuple):
    """One of optax's by name, and its learning rate."""

    name: str
    rate: float

    def make(self) -> optax.GradientTransformation:
        """The transformation."""
        return OPTIMIZERS[self.name](self.rate)


OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "rmsprop": optax.rmsprop, "sgd": optax.sgd}


def loss(parameters: Any, data: Data, arm: Arm) -> jax.Array:
    """The mean loss."""
    return jnp.mean(arm.loss(scores(parameters, data.inputs, arm.phi), data.labels))


@functools.partial(jax.jit, static_argnames=("arm", "optimizer"))
def _fit(
    parameters: Any, batches: jax.Array, arm: Arm, optimizer: Optimizer, *, train: Data, test: Data
) -> tuple[jax.Array, ...]:
    """Training over batches `[seeds, epochs, steps, BATCH]` of row numbers, vmapped over the seeds."""
    transformation = optimizer.make()

    def step(carry: Any, rows: jax.Array) -> Any:
        parameters, state = carry
        gradient = jax.grad(loss)(parameters, Data(train.inputs[rows], train.labels[rows]), arm)
        updates, state = transformation.update(gradient, state, parameters)
        return (optax.apply_updates(parameters, updates), state), None

    def epoch(carry: Any, rows: jax.Array) -> Any:
        carry, _ = jax.lax.scan(step, carry, rows)
        return carry, loss(carry[0], test, arm)

    def of_seed(parameters: Any, batches: jax.Array) -> tuple[jax.Array, ...]:
        (parameters, _), curve = jax.lax.scan(epoch, (parameters, transformation.init(parameters)), batches)
        z = scores(parameters, test.inputs, arm.phi)
        log_p = z if arm.log_p is None else arm.log_p(z)
        right = jnp.argmax(log_p, -1) == test.labels
        if arm.log_p is None:
            nll = mean_entropy = jnp.full((), jnp.nan)
        else:
            nll = -jnp.mean(jnp.take_along_axis(log_p, test.labels[:, None], -1))
            terms = jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0, log_p)
            mean_entropy = -jnp.mean(jnp.sum(terms, -1))
        return jnp.mean(right), nll, mean_entropy, curve

    return jax.vmap(of_seed)(parameters, batches)


@functools.partial(jax.jit, static_argnames=("sizes", "rows"))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _start(key: jax.Array, sizes: tuple[int, ...], rows: int) -> tuple[Any, jax.Array]:
    """One seed's first parameters and batches, the same for every way to train."""
    first, order = jax.random.split(key)
    steps = rows // BATCH
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, rows))(jax.random.split(order, EPOCHS))
    return initial(first, sizes), shuffled[:, : steps * BATCH].reshape(EPOCHS, steps, BATCH)


def fit(model: str, arm: Arm, optimizer: Optimizer, *, train: Data, test: Data, seeds: int) -> Result:
    """Train one model in one way for several seeds at once."""
    sizes = (train.inputs.shape[1], *HIDDEN[model], CLASSES)
    parameters, batches = _start(jax.random.split(jax.random.key(0), seeds), sizes, len(train.labels))
    results = map(np.asarray, _fit(parameters, batches, arm, optimizer, train=train, test=test))
    return Result(model, arm.name, arm.shown_phi, *results)


class Run(NamedTuple):
    """One optimiser of the linear model: iterations and seconds to the common loss, compilation left out."""

    name: str
    iterations: int
    seconds: float
    loss: float


DECAY = 1e-3


def second_order(train: Data) -> list[Run]:
    """The linear model with exp, full batches, weight decay: Newton–CG, L-BFGS and Adam to 0.01 % above the optimum."""
    start = [(jnp.zeros((train.inputs.shape[1], CLASSES)), jnp.zeros(CLASSES))]
    targets = jax.nn.one_hot(train.labels, CLASSES)

    def model(parameters: Any, inputs: jax.Array) -> jax.Array:
        return scores(parameters, inputs, exp)

    def objective(parameters: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        rows = -jnp.sum(targets * log_softmax(model(parameters, inputs)), -1)
        return jnp.mean(rows) + DECAY / 2 * optax.tree.norm(parameters, squared=True)

    newton = optax.chain(optim.newton_cg(model, DECAY), optax.scale_by_backtracking_linesearch(20))
    optimizers = {
        "damped Newton–CG": (newton, 12),
        "optax.lbfgs": (optax.lbfgs(), 600),
        "optax.adam(0.1)": (optax.adam(0.1), 600),
    }

    def descend(optimizer: Any, iterations: int) -> tuple[list[float], list[float]]:
        """The objectives before each step, and the seconds since the first."""
        optimizer = optax.with_extra_args_support(optimizer)

        @jax.jit
        def step(parameters: Any, state: Any) -> Any:
            batch = {"inputs": train.inputs, "targets": targets}
            value, gradient = jax.value_and_grad(objective)(parameters, **batch)
            given = {"value": value, "grad": gradient, "value_fn": objective}
            updates, state = optimizer.update(gradient, state, parameters, **given, **batch)
            return value, optax.apply_updates(parameters, updates), state

        state = optimizer.init(start)
        program = step.lower(start, state).compile()
        parameters, values, seconds, begun = start, [], [], time.perf_counter()
        for _ in range(iterations):
            value, parameters, state = program(parameters, state)
            values.append(float(value))
            seconds.append(time.perf_counter() - begun)
        return values, seconds

    runs = {name: descend(optimizer, iterations) for name, (optimizer, iterations) in optimizers.items()}
    wanted = (1 + 1e-4) * min(min(values) for values, _ in runs.values())
    results = []
    for name, (values, seconds) in runs.items():
        reached = next((i for i, value in enumerate(values) if value <= wanted), len(values) - 1)
        results.append(Run(name, reached, seconds[reached], values[reached]))
    return results


def _cells(result: Result) -> list[str]:
    def mean_and_error(values: np.ndarray, digits: int) -> str:
        if not np.all(np.isfinite(values)):
            return "" if np.any(np.isnan(values)) else "∞"
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"

    return [
        result.model,
        result.loss,
        result.phi,
        mean_and_error(100 * result.accuracy, 2),
        mean_and_error(result.nll, 4),
        mean_and_error(result.entropy, 4),
    ]


_COLUMNS = ("model", "loss", "φ", "accuracy, %", "NLL, nats", "entropy, nats")
_LEFT = ("model", "loss", "φ", "optimiser", "φ of cross-entropy, or loss")


_RUN_COLUMNS = ("optimiser", "iterations", "ms", "objective, nats")


def _run_cells(run: Run) -> list[str]:
    return [run.name, str(run.iterations), f"{1e3 * run.seconds:.0f}", f"{run.loss:.5f}"]


def _table(columns: tuple[str, ...], title: str | None = None) -> Table:
    """A table whose numbers stay whole in 80 columns: only names are folded."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in columns:
        name = column in _LEFT
        table.add_column(column, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    return table


def _results_table(results: list[Result]) -> Table:
    table = _table(("φ of cross-entropy, or loss", *_COLUMNS[3:]))
    for before, result in zip([None, *results], results, strict=False):
        if before is None or before.model != result.model:
            table.add_row(f"[bold]{result.model}[/]")
        by_phi = result.phi if result.loss == "cross-entropy" else ", ".join(filter(None, (result.loss, result.phi)))
        table.add_row(by_phi, *_cells(result)[3:])
    return table


def _remarks(results: list[Result]) -> list[str]:
    """A line for each kind of row that would be a riddle."""
    remarks = {
        "relu_power: its slope is 0 up to 0, so a score below 0 has no gradient and may stay there; a last layer that "
        "begins at 0 would not learn.": any(result.phi.startswith("relu_power") for result in results),
        "Z-loss: it gives scores but no probabilities, and so neither NLL nor entropy.": any(
            result.loss == "Z-loss" for result in results
        ),
        "NLL ∞: a sparse map gives some label of the test set the probability 0.": any(
            np.any(np.isinf(result.nll)) for result in results
        ),
    }
    return [remark for remark, is_due in remarks.items() if is_due]


def _runs_table(runs: list[Run]) -> Table:
    table = _table(_RUN_COLUMNS, "The linear model with exp, full batches, to one loss")
    for run in runs:
        table.add_row(*_run_cells(run))
    return table


def _markdown(columns: tuple[str, ...], cells: Iterable[list[str]]) -> str:
    rules = ["---" if column in _LEFT else "---:" for column in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rules, *cells))
