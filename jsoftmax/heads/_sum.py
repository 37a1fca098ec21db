"""Σ w loss over the tokens. Its gradient is computed along with the value: on CPU by three products (MATH 11.5)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._loops import checkpointed_scan, cut
from jsoftmax._pytree import jvp_of_live, without_zeros
from jsoftmax.heads import _head, _statistics
from jsoftmax.heads._head import SHARDS, Head, Plan
from jsoftmax.heads._loss import token_losses
from jsoftmax.heads._statistics import Extras, Rates, Statistics, TokenConstants, statistics
from jsoftmax.losses._cross_entropy import zero_weightless
from jsoftmax.sharding import first_shard_share, match_varying_axes, psum


class WeightedHead(NamedTuple):
    """A head, a weight for each of its tokens, and the options of the loss."""

    head: Head
    token_weights: Array
    """`[N]`."""
    smoothing: Array | None
    z_loss: Array | None

    @property
    def wanted(self) -> Extras:
        return Extras(spread=self.smoothing is not None)

    def losses(self, found: Statistics, plan: Plan) -> Array:
        """The loss of each token. Where the weight is 0, an infinite loss counts as 0."""
        loss = token_losses(self.head, plan, found, self.smoothing, self.z_loss)[:, 0]
        return zero_weightless(loss, self.token_weights)

    def total(self, found: Statistics, plan: Plan) -> tuple[Array, Array]:
        """Σ w loss, and the losses."""
        losses = self.losses(found, plan)
        return jnp.sum(self.token_weights * losses), losses

    def by_streaming(self, plan: Plan) -> tuple[Array, Array]:
        """Σ w loss and the losses, by the rule of `statistics`, which is right for every derivative."""
        return self.total(statistics(self.head, self.wanted, plan), plan)


class _Gradients(NamedTuple):
    """Gradients in the arrays of one shard; the one in `hidden` is this shard's share of the gradient."""

    hidden: Array
    weight: Array
    bias: Array | None
    token_weights: Any

    @staticmethod
    def of(given: WeightedHead) -> "_Gradients":
        """The arrays, or tangents, that have such a gradient."""
        return _Gradients(given.head.hidden, given.head.weight, given.head.bias, given.token_weights)

    def within(self, given: WeightedHead) -> WeightedHead:
        head = given.head._replace(hidden=self.hidden, weight=self.weight, bias=self.bias)
        return given._replace(head=head, token_weights=self.token_weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def weighted_sum(given: WeightedHead, plan: Plan) -> Array:
    """Σ w loss  (MATH 11.5)."""
    return given.by_streaming(plan)[0]


@functools.partial(weighted_sum.defjvp, symbolic_zeros=True)
def _weighted_sum_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """⟨∂h, ḣ⟩ + ⟨∂W, Ẇ⟩ + ⟨∂b, ḃ⟩ + ⟨loss, ẇ⟩  (MATH 11.5). It is taken by streaming if W is a constant, if another
    argument has a tangent, for distributions, and for shards of one array."""
    (given,), dots = primals, without_zeros(tangents[0])
    rates = _Gradients.of(dots)
    others = jax.tree.leaves(_Gradients(None, None, None, None).within(dots))  # pyright: ignore[reportArgumentType]
    # the name of SHARDS is bound only while the map over shards is traced
    by_streaming = others or given.head.targets is not None or plan.axis_name == SHARDS
    if rates.weight is None or by_streaming:
        return jvp_of_live(lambda given: given.by_streaming(plan)[0], given, dots)
    value, gradients = _value_and_gradients(given, plan)
    *shares, of_weights = [
        None if b is None else jnp.sum(a * b.astype(a.dtype)) for a, b in zip(gradients, rates, strict=True)
    ]
    rate = psum(sum(share for share in shares if share is not None), plan.axis_name)
    return value, rate if of_weights is None else rate + of_weights


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _value_and_gradients(given: WeightedHead, plan: Plan) -> tuple[Array, _Gradients]:
    """Σ w loss and its gradient. On CPU, or if the caller chose the blocks, this takes three products; otherwise four,
    in fewer and larger kernels."""
    on_cpu, elsewhere = (functools.partial(f, plan=plan) for f in (_by_token_blocks, _streamed))
    if plan.accelerator_block in (None, (plan.tokens, plan.classes)):
        return on_cpu(given)
    return lax.platform_dependent(given, cpu=on_cpu, default=elsewhere)


def _by_token_blocks(given: WeightedHead, plan: Plan) -> tuple[Array, _Gradients]:
    """One block of tokens after the other, each with all classes. The products h Wᵀ of a block are kept: tokens × V
    numbers."""
    head = _head.with_padding(given.head, plan)
    blocks = jax.tree.map(lambda a: cut(a, plan.classes), head.only(*_head.PER_CLASS))
    wide = head.hidden.dtype
    start_of_shard = _head.first_class(head, plan)
    zero = jnp.zeros_like(head.hidden, shape=())  # sharded as tokens and classes are; so the sums are too
    zeros = [None if a is None else jnp.zeros_like(a, wide) + zero for a in (blocks.weight, blocks.bias)]

    def body(carry: Any, rows: WeightedHead) -> tuple[Any, Any]:
        first, sums = carry

        def run(sums: Any) -> Any:
            whole = rows._replace(head=head.merge_fields(rows.head), smoothing=given.smoothing, z_loss=given.z_loss)
            return _of_token_block(whole, blocks, start_of_shard, sums, plan)

        def skip(sums: Any) -> Any:
            nothing = jnp.zeros_like(rows.token_weights)
            return sums, (nothing[0], jnp.zeros_like(rows.head.hidden), nothing)

        counted = head.counted
        run_or_skip = run if counted is None else functools.partial(lax.cond, first < counted, run, skip)
        sums, made = run_or_skip(sums)
        return (first + plan.tokens, sums), made

    rows = WeightedHead(head.only("hidden", "labels", "banned"), given.token_weights, None, None)
    rows = jax.tree.map(lambda a: cut(a, plan.tokens), rows)
    start = (jnp.zeros((), jnp.int32), zeros)
    (_, sums), (values, by_hidden, losses) = checkpointed_scan(body, start, rows)
    classes = head.weight.shape[0]
    by_weight, by_bias = [None if a is None else a.reshape(-1, *a.shape[2:])[:classes] for a in sums]
    made: Any = (by_hidden.reshape(head.hidden.shape), by_weight, by_bias, losses.reshape(-1))
    return jnp.sum(values), _Gradients(*made)


@functools.partial(_value_and_gradients.defjvp, symbolic_zeros=True)
def _value_and_gradients_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    """Derivatives of the gradient are those of the streamed gradient."""
    (given,), dots = primals, without_zeros(tangents[0])
    return jvp_of_live(functools.partial(_streamed, plan=plan), given, dots)


def _streamed(given: WeightedHead, plan: Plan) -> tuple[Array, _Gradients]:
    """The same result by the rule of `statistics`."""

    def of(wanted: _Gradients) -> Any:
        value, losses = wanted._replace(token_weights=given.token_weights).within(given).by_streaming(plan)
        return first_shard_share(value, plan.axis_name), (value, losses)

    wanted = _Gradients.of(given)._replace(token_weights=None)
    shares, (value, losses) = jax.grad(of, has_aux=True)(wanted)
    return value, jax.tree.map(lambda a: a.astype(value.dtype), shares._replace(token_weights=losses))


def _of_token_block(rows: WeightedHead, blocks: Head, first: Array, sums: Any, plan: Plan) -> Any:
    """The sums [∂W, ∂b] with the share of this block added; and Σ w loss, ∂h and the losses of its tokens."""
    head, wide = rows.head, rows.head.hidden.dtype
    numbers = jnp.arange(blocks.weight.shape[0], dtype=jnp.int32)
    starts = first + numbers * plan.classes

    def forward(running: Any, xs: Any) -> tuple[Any, Array]:
        block, start = xs
        whole = head.merge_fields(block.widened(wide))
        o = _head.products(head.hidden, whole.weight, plan)
        x = _head.scores_from_products(whole, start, o)
        return _statistics.merge(running, _statistics.block_statistics(whole, rows.wanted, start, x, plan), plan), o

    running, products = checkpointed_scan(forward, _statistics.initial(head, rows.wanted), (blocks, starts))
    found = _statistics.finish(_statistics.merge_shards(running, head, plan), rows.wanted)
    (value, losses), by = jax.value_and_grad(rows.total, has_aux=True)(found, plan)
    log_total = None if rows.smoothing is None and rows.z_loss is None else by.log_total + by.log_normalizer
    wanted = Rates(log_total, loss=by.loss, spread=by.spread)
    known, wanted = match_varying_axes((TokenConstants.of(found), wanted), head.weight, plan.axis_name)
    product = functools.partial(jnp.matmul, precision=plan.precision)

    def backward(carry: Any, xs: Any) -> tuple[Any, None]:
        by_hidden, (by_weight, by_bias) = carry
        block, number, start, o = xs
        whole = head.merge_fields(block.widened(wide))
        x, of_x = jax.vjp(functools.partial(_head.scores_from_products, whole, start), o)
        rates = functools.partial(_statistics.block_rates, whole, Head(), start, known, wanted, x)
        (by_o,) = of_x(*jax.linear_transpose(rates, x)(wanted))
        by_hidden = by_hidden + product(by_o, whole.weight)
        by_weight = _added(by_weight, number, product(by_o.T, head.hidden))
        return (by_hidden, [by_weight, None if by_bias is None else _added(by_bias, number, by_o.sum(0))]), None

    start = (jnp.zeros_like(head.hidden), sums)
    (by_hidden, sums), _ = checkpointed_scan(backward, start, (blocks, numbers, starts, products))
    return sums, (value, by_hidden, losses)


def _added(total: Array, number: Array, block: Array) -> Array:
    """The total with one block added in place."""
    so_far = lax.dynamic_index_in_dim(total, number, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, so_far + block, number, 0)
