"""Mutants: the package with one mistake each, and the tests that must see it.

python tests/mutants.py                 every mutant against its own tests; a table; exit code 1 if one survives
python tests/mutants.py phi/ kl         those whose file or text has one of these words
python tests/mutants.py --long          with the cells that are marked `full`
python tests/mutants.py --table FILE    writes the table there, too

A mutant flips a sign, drops a term, swaps two axes or moves a threshold in a rule. It is applied to a copy of the
package; tests/test_mutants.py asserts that each text still occurs once in its file.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutant(NamedTuple):
    """One mistake."""

    file: str
    """In the package."""
    old: str
    new: str
    killed_by: str
    """What pytest is given: test files, or some of their tests."""

    @property
    def text(self) -> str:
        return (ROOT / "jsoftmax" / self.file).read_text()

    @property
    def change(self) -> str:
        """The words that differ, with a little text around them."""
        old, new = (" ".join(part.split()) for part in (self.old, self.new))
        return f"`{old}` → `{new}`"


ORACLE, DIGITS, EDGES, CASES = (f"tests/test_{name}.py" for name in ("oracle", "digits", "edges", "cases"))
LOSSES, SPARSE, HEADS = (f"tests/test_{name}.py" for name in ("losses", "sparse", "heads"))
OPERATORS, OPTIM, GUMBEL, ORDERS = (f"tests/test_{name}.py" for name in ("operators", "optim", "gumbel", "orders"))
PHI, MIXTURES, SHARDED, MACHINERY = (
    f"tests/test_{name}.py" for name in ("phi", "mixtures", "sharded", "heads_machinery")
)
SUMS, TRANSFORMATIONS, SAMPLED = (f"tests/test_{name}.py" for name in ("sums", "transformations", "heads_sampled"))
QUADRATIC, FACTORED, ADAPTIVE = (f"tests/test_heads_{name}.py" for name in ("quadratic", "factored", "adaptive"))
TOP, DIVERGENCE = "tests/test_top_targets.py", "tests/test_divergence.py"
DRAWS, BANNED = "tests/test_heads_draws.py", "tests/test_heads_banned.py"
KERNEL = "tests/test_heads_kernel.py"
SEGMENTS, TRUNCATION, ATTENTION = (f"tests/test_{name}.py" for name in ("segments", "truncation", "attention"))

MUTANTS = (
    # φ: slopes, curvatures, domains
    Mutant("phi/polynomials.py", "return _scaled([*self._a[:-1], 0.0], z)", "return -_scaled([*self._a[:-1], 0.0], z)", f"{ORACLE} -k taylor"),
    Mutant("phi/polynomials.py", "return -term * (", "return term * (", f"{ORACLE} -k taylor"),
    Mutant("phi/polynomials.py", "_scaled([2.0, 0.0, 0.0], z) / a * (_scaled([self.epsilon, 0.0, -1.0], z)", "_scaled([2.0, 0.0, 0.0], z) / a * (_scaled([self.epsilon, 0.0, 1.0], z)", f"{ORACLE} -k spherical"),
    Mutant("phi/polynomials.py", "return -2 * below * above", "return 2 * below * above", f"{ORACLE} -k quadratic"),
    Mutant("phi/polynomials.py", "self.a0 / self.a2 - h**2", "self.a0 / self.a2 + h**2", f"{ORACLE} -k quadratic"),
    Mutant("phi/sigmoidal.py", "1 / ((1 + u) * (1 - log1p_deficit(u)))", "1 / ((1 + u) * (1 + log1p_deficit(u)))", f"{ORACLE} -k softplus"),
    Mutant("phi/sigmoidal.py", "s * (sigmoid(-z_above) - s), -(s**2)", "s * (sigmoid(-z_above) - s), (s**2)", f"{ORACLE} -k softplus"),
    Mutant("phi/sigmoidal.py", "return 1 + sigmoid(-z)", "return 1 - sigmoid(-z)", f"{ORACLE} -k sigsoftmax"),
    Mutant("phi/powers.py", "-((1 / (1 + jnp.maximum(z, 0))) ** 2)", "-(1 / (1 + jnp.maximum(z, 0)))", f"{ORACLE} -k elu1"),
    Mutant("phi/powers.py", "(self.q - 1) * (1 / (1 + a)) ** 2", "(1 - self.q) * (1 / (1 + a)) ** 2", f"{ORACLE} -k q_exponential"),
    Mutant("phi/powers.py", "jnp.where(jnp.less(self.q, 1), -jnp.inf, jnp.nan)", "jnp.where(jnp.less(self.q, 2), -jnp.inf, jnp.nan)", f"{PHI} -k zeros_and_domain"),
    Mutant("phi/powers.py", "rising = (self.power - 1) *", "rising = self.power *", f"{ORACLE} -k relu_power"),
    Mutant("phi/powers.py", "self.power / far_z / (1 + rest), jnp", "self.power / far_z / (1 - rest), jnp", f"{ORACLE} -k relu_power"),
    Mutant("phi/base.py", "_tangent(_log.fun, slope, primals, tangents)", "_tangent(_log.fun, curvature, primals, tangents)", f"{ORACLE} -k spherical"),
    Mutant("phi/base.py", "    if jax.tree.leaves(live):", "    if False:", f"{TRANSFORMATIONS} -k spherical"),
    # series
    Mutant("_series.py", "total * y**2 + 1 / (2 * k + 1)", "total * y**2 + 1 / (2 * k + 3)", f"{ORACLE} -k softplus"),
    Mutant("_series.py", "return s, s * sigmoid(-z) * z_dot", "return s, s * (1 - s) * z_dot", f"{PHI} -k sigmoid_near_one"),
    Mutant("_series.py", "return expm1(y), jnp.exp(y) * y_dot", "return expm1(y), (expm1(y) + 1) * y_dot", f"{CASES} -k small"),
    Mutant("_series.py", "1 - r / k * total", "1 + r / k * total", f"{ORACLE} -k kl_"),
    Mutant("_series.py", "1 + y_near / k * total", "1 - y_near / k * total", f"{ORACLE} -k tsallis"),
    # sums: digits, differences, classes left out
    Mutant("maps.py", " & ~jnp.isneginf(log_weights) & ~jnp.isneginf(z)", " & ~jnp.isneginf(log_weights)", f"{EDGES} -k 'test_rows and softmax'"),
    Mutant("maps.py", "None if z is None else x(z)", "None if z is None else weighted_scores(phi, z, where, None)", f"{SUMS} -k read_the_scores"),
    Mutant("maps.py", "else x + jnp.where(kept, log_weights, 0)", "else x - jnp.where(kept, log_weights, 0)", f"{LOSSES} -k prior"),
    Mutant("sums/reference.py", "u = not_below(x) - not_below(peak)", "u = x - peak", f"{CASES} -k 'products or quotient'"),
    Mutant("sums/reference.py", "small + (jnp.maximum(ones, jnp.finfo(small.dtype).eps) - 1)", "(small + jnp.maximum(ones, jnp.finfo(small.dtype).eps)) - 1", f"{DIGITS} -k 'bounds or running_sum'"),
    Mutant("sums/reference.py", "log_total = jnp.log1p(rest)\n    L = ", "log_total = jnp.log(1 + rest)\n    L = ", f"{DIGITS} -k 'small_answers or bounds'"),
    Mutant("sums/reference.py", "return jnp.where(e == 0, 0, u + m)", "return jnp.where(e == 0, 0, u - m)", f"{ORACLE} -k entropy"),
    Mutant("sums/long_rows.py", "(rest * of_top - of_others) / total, -mean)", "(rest * of_top + of_others) / total, -mean)", f"{SUMS} -k long_rows"),
    Mutant("sums/long_rows.py", "(rest * of_top - of_others) / total, -mean)", "of_top - mean, -mean)", f"{SUMS} -k digits_of_long_rows"),
    Mutant("sums/long_rows.py", "e * (x_dot - jnp.where(sure, of_top, 0))", "e * x_dot", f"{SUMS} -k long_rows"),
    Mutant("sums/long_rows.py", "jnp.where(sure, -rest, 1)", "jnp.where(sure, rest, 1)", f"{SUMS} -k long_rows"),
    Mutant("sums/long_rows.py", "of_others + at_label * of_label, of_others", "of_others + (p_y - 1) * of_label, of_others", f"{SUMS} -k rows_of_losses"),
    Mutant("sums/long_rows.py", "class_sum(e * jnp.where(is_label, 0, x_dot), axis)", "class_sum(e * x_dot, axis)", f"{SUMS} -k rows_of_losses"),
    Mutant("sums/long_rows.py", "jnp.where(is_empty(rest), -jnp.inf, log_total)", "log_total", f"{SUMS} -k maximum_is_0"),
    Mutant("sums/reference.py", "a = jnp.where(is_top, 0, a - class_sum(jnp.where(is_top, a, 0), axis))\n    return", "return", f"{ORACLE} -k confident"),
    Mutant("sums/reference.py", "of_others * x_dot - of_others * of_top", "of_others * x_dot", f"{ORACLE} -k confident"),
    Mutant("sums/reference.py", "jnp.where(is_top, x_dot, 0), axis), jnp.where(is_top, 0, p)", "jnp.where(is_top, 0, x_dot), axis), p", f"{ORACLE} -k confident"),
    Mutant("sums/reference.py", "jnp.maximum(class_sum(e, axis), jnp.finfo(e.dtype).eps) if in_one_sum", "class_sum(e, axis) if in_one_sum", f"{SUMS} -k one_sum"),
    Mutant("sums/long_rows.py", "return rest < 1 / SURE - 1", "return rest < 0", f"{SUMS} -k digits_of_long_rows"),
    Mutant("divergence.py", "-expm1(log_p) * r - of_others, r - mean)", "r - mean, r - mean)", f"{ORACLE} -k confident"),
    Mutant("sums/reference.py", "jnp.where(jnp.isneginf(x), 0, centred_rate(x, p, x_dot, axis, axis_name))", "centred_rate(x, p, x_dot, axis, axis_name)", f"{SUMS} -k equals_the_reference"),
    Mutant("sums/reference.py", "coefficients = jnp.where(is_label, at_label, p)", "coefficients = p", f"{ORACLE} -k cross_entropy"),
    Mutant("sums/cpu/rows.py", "return jnp.minimum(largest, x) - peak", "return x - peak", f"{CASES} -k long_row"),
    Mutant("sums/cpu/rows.py", "jnp.where(e == 0, 0, u + m), not_negative", "jnp.where(e == 0, 0, u - m), not_negative", f"{SUMS} -k equals_the_reference"),
    Mutant("sums/cpu/rates.py", "of_others + p_y * x_dot_y, of_kept", "of_others, of_kept", f"{SUMS} -k equals_the_reference"),
    # entropies and divergences
    Mutant("entropy.py", "H_dot = -class_sum(", "H_dot = class_sum(", f"{ORACLE} -k entropy"),
    Mutant("entropy.py", "x_dot, axis, axis_name) + H_dot, H_dot)", "x_dot, axis, axis_name) - H_dot, H_dot)", f"{ORACLE} -k entropy"),
    Mutant("entropy.py", "p * (c**2 + 2 * c - V) * x_dot", "p * (c**2 + c - V) * x_dot", f"{ORACLE} -k varentropy"),
    Mutant("divergence.py", "excess_series(r_near), p * r - p + m)", "excess_series(r_near), p * r)", f"{ORACLE} -k kl_"),
    Mutant("divergence.py", "p * expm1(-jnp.where(near", "p * expm1(jnp.where(near", f"{ORACLE} {CASES} -k kl_"),
    Mutant("divergence.py", "-jnp.where(near, r, 0)", "-r", f"{DIVERGENCE} -k gradient_of_a_gradient"),
    Mutant("divergence.py", "(share * of.p * centred", "(of.p * centred", f"{ORACLE} -k jensen"),
    Mutant("divergence.py", "beta, 1.0, -1.0, axis", "beta, -1.0, 1.0, axis", DIVERGENCE),
    Mutant("divergence.py", "(p == 0) | jnp.isinf(r_p)", "(p == 0)", DIVERGENCE),
    Mutant("divergence.py", "jnp.where(empty & ~jnp.isnan(D), 0,", "jnp.where(False, 0,", DIVERGENCE),
    Mutant("divergence.py", "delta - math.log(other), -jnp", "delta + math.log(other), -jnp", DIVERGENCE),
    Mutant("divergence.py", "log_other - log_own - nothing", "log_other - 1e9", DIVERGENCE),
    Mutant("divergence.py", "far = (other > 0) &", "far =", DIVERGENCE),
    Mutant("divergence.py", "log_own < -40, 40, 0", "log_own < -40, 0, 0", DIVERGENCE),
    Mutant("divergence.py", "other + own * jnp.exp(jnp.minimum(at_far, bound))", "other", DIVERGENCE),
    Mutant("divergence.py", "(near > _NEAR) & (other > 0.5)", "(near > 1e9) & (other > 0.5)", DIVERGENCE),
    Mutant("divergence.py", "* jnp.exp(-jnp.clip(near", "* jnp.exp(jnp.clip(near", DIVERGENCE),
    Mutant("divergence.py", "jnp.where(cancels, 0, grown)", "grown", DIVERGENCE),
    Mutant("divergence.py", "jnp.clip(delta / 2, -bound, bound)", "delta / 2", DIVERGENCE),
    Mutant("divergence.py", "of_q * q_over_m * delta_dot", "of_p * q_over_m * delta_dot", DIVERGENCE),
    Mutant("divergence.py", "(q == 0) | jnp.isinf(r_q)", "(q == 0)", DIVERGENCE),
    Mutant("divergence.py", "jnp.where(jnp.isinf(q_over_m), 0, q_over_m)", "q_over_m", DIVERGENCE),
    Mutant("divergence.py", "jnp.where(jnp.isinf(p_over_m), 0, p_over_m)", "p_over_m", DIVERGENCE),
    Mutant("divergence.py", "(q_over_m - p_over_m) * beta_dot", "(q_over_m + p_over_m) * beta_dot", DIVERGENCE),
    Mutant("divergence.py", "by_beta - of_p * p_over_m", "by_beta - of_q * p_over_m", DIVERGENCE),
    Mutant("divergence.py", "tuple(ratio * rate for", "tuple(rate for", DIVERGENCE),
    Mutant("entropy.py", "((1 + c) * centred**2 + c", "((1 - c) * centred**2 + c", f"{ORACLE} -k expansion"),
    Mutant("_orders.py", "alpha * (b - p * S)", "alpha * (b + p * S)", f"{ORACLE} -k tsallis"),
    Mutant("_orders.py", "-p * d * expm1_ratio(y_near), (r", "p * d * expm1_ratio(y_near), (r", f"{ORACLE} -k renyi"),
    Mutant("_orders.py", "R_dot = R_dot - class_sum(divergence", "R_dot = R_dot + class_sum(divergence", ORDERS),
    # derivatives by name, operators
    Mutant("derivatives.py", "_low_rank(p * s**2 + p * t, [", "_low_rank(p * s**2, [", f"{ORACLE} -k log_normalizer_hessian"),
    Mutant("derivatives.py", "[(a, a * (1 + c)), (a * c, a)]", "[(a, a * (1 + c)), (a, a)]", f"{ORACLE} -k entropy_hessian"),
    Mutant("derivatives.py", "t * (Q * p - q), [", "t * (p - q), [", f"{ORACLE} -k cross_entropy_hessian"),
    Mutant("derivatives.py", "(p * t + a * s)[", "(p * t - a * s)[", f"{ORACLE} -k second_derivative"),
    Mutant("derivatives.py", "+ t * v * w)", "- t * v * w)", f"{ORACLE} -k second_derivative_product"),
    Mutant("operators.py", "(self.d, self.right, self.left,", "(self.d, self.left, self.right,", OPERATORS),
    Mutant("operators.py", "(b - spread) / D", "(b + spread) / D", OPERATORS),
    Mutant("operators.py", "sign * jnp.prod(jnp.sign(D), -1)", "sign", OPERATORS),
    Mutant("operators.py", "return centre(centre(v) /", "return centre(v /", OPERATORS),
    # losses
    Mutant("losses/_terms.py", "else L_dot - of_kept /", "else L_dot + of_kept /", f"{ORACLE} -k cross_entropy"),
    Mutant("losses/_terms.py", "negative_log_p(x, label, order=1), normalize", "jnp.ones_like(given[2]), normalize", f"{SUMS} -k 'every_form and log_prob'"),
    Mutant("losses/_terms.py", "jnp.exp(-n), expm1(-n)", "jnp.exp(-n), jnp.exp(-n) - 1", f"{ORACLE} -k confident"),
    Mutant("losses/_cross_entropy.py", "loss = (1 - smoothing) * zero_weightless", "loss = zero_weightless", f"{ORACLE} -k cross_entropy"),
    Mutant("losses/_cross_entropy.py", "n_near ** (gamma + 1) *", "n_near**gamma *", f"{LOSSES} -k focal"),
    Mutant("losses/_cross_entropy.py", "n - epsilon * expm1(-n)", "n + epsilon * expm1(-n)", f"{ORACLE} -k poly"),
    Mutant("losses/_cross_entropy.py", "jnp.where((weight == 0) & jnp.isposinf(loss), 0, loss)", "loss", "tests/test_labels.py -k weight_of_zero"),
    Mutant("losses/_target.py", "class_sum(q, axis) - jnp.where(jnp.isneginf(L), 0, 1)", "class_sum(q, axis) - 1", f"{LOSSES} -k kl_to_target"),
    Mutant("losses/_target.py", "log_p, jnp.isneginf(x)) + 1)", "log_p, jnp.isneginf(x)))", f"{ORACLE} -k kl_to_target"),
    Mutant("losses/_target.py", "of_others + Q * expm1(", "of_others - Q * expm1(", f"{CASES} -k sure_answer"),
    Mutant("losses/_ranking.py", "reverse=True, axis=y.ndim - 1)[..., 1:]", "reverse=True, axis=y.ndim - 1)[..., :-1]", f"{ORACLE} -k plackett"),
    Mutant("losses/_z_loss.py", "z_dot - _mean(z_dot, kept) - t * along", "z_dot - _mean(z_dot, kept) + t * along", f"{ORACLE} -k spherical_z_loss"),
    Mutant("losses/_z_loss.py", "(t_dot, -along * inverse**2)", "(t_dot, along * inverse**2)", f"{ORACLE} -k spherical_z_loss"),
    # sparse maps, mixtures, temperatures
    Mutant("sparse.py", "-safe * log_p**2 * excess_ratio", "safe * log_p**2 * excess_ratio", SPARSE),
    Mutant("sparse.py", "(g - w * (jnp.sum(g", "(g + w * (jnp.sum(g", SPARSE),
    Mutant("sparse.py", "        if at_label is not None:  # p_y", "        if False:  # p_y", f"{CASES} -k fenchel"),
    Mutant("sparse.py", "jnp.sqrt(safe) if power == 2", "safe if power == 2", f"{ORACLE} -k entmax15"),
    Mutant("sparse.py", "p if sink is None else p[..., :-1]", "p if sink is None else p[..., 1:]", f"{ORACLE} -k 'entmax15 and sink'"),
    Mutant("mixtures.py", "near = far > -0.5", "near = far > 1", f"{MIXTURES} -k keeps_digits"),
    Mutant("mixtures.py", "log_p_dot + log_weights_dot", "log_p_dot - log_weights_dot", f"{MIXTURES} -k mixture"),
    Mutant("mixtures.py", "return p * sigmoid(gap)", "return p * sigmoid(-gap)", f"{ORACLE} -k sink"),
    Mutant("temperature.py", "t * (target_dot - H_dot)", "t * (target_dot + H_dot)", f"{MIXTURES} -k 'test_temperature and exp'"),
    # samples
    Mutant("gumbel/_noise.py", ".astype(dtype) + 0.5) * 2.0**-31", ".astype(dtype) + 1.0) * 2.0**-31", f"{GUMBEL} -k noise"),
    Mutant("gumbel/_concrete.py", "(count - 1) * jnp.log(temperature", "count * jnp.log(temperature", f"{GUMBEL} -k densities"),
    Mutant("gumbel/_estimators.py", "jnp.minimum(free, top) - jnp.log1p", "jnp.minimum(free, top) + jnp.log1p", f"{GUMBEL} tests/test_gumbel_statistics.py -k conditional"),
    Mutant("gumbel/_estimators.py", "- normalize(x, axis).p / 2", "+ normalize(x, axis).p / 2", f"{GUMBEL} -k reinmax"),
    # heads
    Mutant("heads/_head.py", "jnp.tanh(o / head.soft_cap)", "jnp.tanh(o)", f"{HEADS} -k options"),
    Mutant("heads/_head.py", "product(hidden_dot, weight) + product(hidden, weight_dot)", "product(hidden_dot, weight) - product(hidden, weight_dot)", f"{MACHINERY} -k 'narrow or plan'"),
    Mutant("heads/_statistics.py", "(part.gap + (1 + part.rest) *", "(part.gap - (1 + part.rest) *", f"{HEADS} -k cotangent"),
    Mutant("heads/_statistics.py", "-total(p * (1 + c) * x_dot)", "-total(p * c * x_dot)", f"{HEADS} -k cotangent"),
    Mutant("heads/_statistics.py", "total((excess + (known.mass", "total((excess - (known.mass", f"{HEADS} -k distributions"),
    Mutant("heads/_statistics.py", "else expm1(-found.loss)", "else jnp.exp(-found.loss)", f"{HEADS} -k options"),
    Mutant("heads/_statistics.py", "total(jnp.where(sure, 0, p * x_dot))", "total(p * x_dot)", f"{HEADS} -k sure"),
    Mutant("heads/_kernel.py", "(1, of_classes), 1) < classes", "(1, of_classes), 1) <= classes", f"{KERNEL} -k equals"),
    Mutant("heads/_kernel.py", "first + done.top_class", "done.top_class", f"{KERNEL} -k sharded"),
    Mutant("heads/_kernel.py", "@pl.when(number == 0)", "@pl.when(number == 1)", f"{KERNEL} -k digits"),
    Mutant("heads/_top.py", "jnp.where(x == best, places", "jnp.where(x <= best, places", f"{KERNEL} -k digits"),
    Mutant("heads/_top.py", "(x[1] > x[0]) | jnp.isnan(x[1])", "(x[1] >= x[0]) | jnp.isnan(x[1])", f"{KERNEL} -k edges"),
    Mutant("heads/divergence.py", "q * (r_q - of_q) * x_q_dot", "q * (r_q + of_q) * x_q_dot", f"{HEADS} -k jensen"),
    Mutant("heads/adaptive/_selection.py", "bound[:, i] > best[:, -1]", "bound[:, i] > best[:, 0]", f"{ADAPTIVE} -k of_log_probs"),
    Mutant("heads/adaptive/_selection.py", "jnp.where(wanted[:, None], found, -jnp.inf)", "found", f"{ADAPTIVE} -k of_log_probs"),
    Mutant("gumbel/_estimators.py", "categorical(of_index, x), maximum[..., None])", "categorical(of_index, x), None)", f"{ADAPTIVE} -k test_draws"),
    Mutant("heads/adaptive/_selection.py", "log_p[:, first:], a[:, first:]", "log_p[:, first:], log_p[:, first:]", f"{ADAPTIVE} -k test_draws"),
    Mutant("heads/adaptive/_selection.py", "params.cutoffs[i] + place)", "params.cutoffs[0] + place)", f"{ADAPTIVE} -k test_draws"),
    Mutant("heads/adaptive/_streamed.py", "expm1(-out.loss[:, None])", "jnp.exp(-out.loss[:, None])", f"{ADAPTIVE} -k 'as_on_accelerators and not draw'"),
    Mutant("heads/adaptive/_streamed.py", "jnp.where(size <= few, 1, 2)", "jnp.where(size <= few, 1, 1)", f"{ADAPTIVE} -k 'as_on_accelerators and not draw'"),
    Mutant("losses/_top.py", "count > jnp.sum(kept", "count >= jnp.sum(kept", f"{TOP} -k all_classes"),
    Mutant("losses/_top.py", "jnp.isneginf(rest) & (1 - total <=", "(1 - total <=", f"{TOP} -k impossible_has_no_mass"),
    Mutant("losses/_top.py", "any_other & (total < 1) & ~by_rounding", "any_other & (total < 1)", f"{TOP} -k impossible_has_no_mass"),
    Mutant("heads/_loss.py", "jnp.where(given.rows.reshape(loss.shape), loss, 0)", "loss", f"{TOP} -k without_the_tokens"),
    Mutant("losses/_top.py", "jnp.where(others, x, -jnp.inf)", "x", f"{TOP} -k test_losses"),
    Mutant("maps.py", "jnp.where(jnp.isneginf(log_p), lax.stop_gradient(log_p), log_p)", "log_p", f"{LOSSES} -k log_prob"),
    Mutant("heads/_head.py", " & ~is_label(x.shape, head.mode, start=start)", "", f"{DRAWS} -k mode_stays"),
    Mutant("heads/_draws.py", "jnp.minimum(token.least, jnp.max(x))", "token.least", f"{DRAWS} -k again"),
    Mutant("heads/_draws.py", "found.peak + jnp.minimum(", "found.peak - jnp.minimum(", f"{DRAWS} -k law_that_is_cut"),
    Mutant("heads/_draws.py", "of_chunk + within", "of_chunk - within", f"{DRAWS} -k 'log_prob and none'"),
    Mutant("heads/_draws.py", "jnp.where(log_prob > -jnp.inf, -rate.T, 0)", "jnp.where(log_prob > -jnp.inf, rate.T, 0)", f"{DRAWS} -k 'log_prob and none'"),
    Mutant("heads/_draws.py", "_head.block_scores(whole, first + number * CHUNK, plan)", "_head.block_scores(whole, number * CHUNK, plan)", f"{DRAWS} -k 'shards and none'"),
    Mutant("heads/_statistics.py", "without_labels(q, head.banned, start, 0.0)", "q", f"{BANNED} -k 'distributions'"),
    Mutant("heads/_loss.py", "== banned, -1), 0, loss)", "== banned, -1), loss, loss)", f"{BANNED} -k linear_cross_entropy"),
    Mutant("heads/sampled.py", "- math.log(draws.shape[0])", "+ math.log(draws.shape[0])", SAMPLED),
    Mutant("heads/factored/_sgd.py", "jnp.where(fold, 0, K) + K_y)", "jnp.where(fold, 0, K) - K_y)", FACTORED),
    # optimisers
    Mutant("optim.py", "(B.mv(forward(v)) / rows)", "B.mv(forward(v))", OPTIM),
    Mutant("optim.py", "_along(residual, new_size / size, direction)", "_along(residual, 0 * size, direction)", OPTIM),
    Mutant("optim.py", "_along(product(v), strength, v)", "_along(product(v), -strength, v)", OPTIM),
    # ragged rows, truncated laws, attention
    Mutant("segments.py", "x_dot, layout)[0] - spread(layout, ids, total)[0]", "x_dot, layout)[0] + spread(layout, ids, total)[0]", f"{SEGMENTS} -k padded_rows"),
    Mutant("segments.py", "complement * x_dot - of_others", "complement * x_dot + of_others", f"{SEGMENTS} -k near_1"),
    Mutant("segments.py", "p_dot, mean, of_others)", "p_dot, mean, -of_others)", f"{SEGMENTS} -k near_1"),
    Mutant("segments.py", "jnp.where(has_row, x, lax.stop_gradient(x))", "x", f"{SEGMENTS} -k 'edges or any_row'"),
    Mutant("segments.py", "jnp.where(peak == jnp.inf, peak, peak + log_total)", "peak + log_total", f"{SEGMENTS} -k edges"),
    Mutant("truncation.py", "above < limit, 0, 1)", "above <= limit, 0, 1)", f"{TRUNCATION} -k sorted_reference"),
    Mutant("truncation.py", "kept &= (bits >= least) | (top_p >= 1)", "kept &= (bits > least) | (top_p >= 1)", f"{TRUNCATION} -k sorted_reference"),
    Mutant("attention/_mean.py", "-(1 + jnp.where(p == 0, 0, u)", "-(jnp.where(p == 0, 0, u)", f"{ATTENTION} -k options"),
    Mutant("attention/_mean.py", "if results is Results.OUTPUT:", "if True:", f"{ATTENTION} -k digits_of_a_small"),
    Mutant("attention/_mean.py", "weighted = tangent_product(", "weighted = product(", f"{ATTENTION} -k of_bfloat16"),
    Mutant("attention/_mean.py", "factor * (part.gap + total * jnp.minimum(fall, FAR))", "factor * (part.gap - total * jnp.minimum(fall, FAR))", f"{ATTENTION} -k options"),
    Mutant("attention/_mean.py", "jnp.where(query < given.query_lengths[:, None, None, None], x, -jnp.inf)", "x", f"{ATTENTION} -k sink"),
    Mutant("attention/_blocks.py", "return lax.reduce_precision(a, narrow.nexp, narrow.nmant)", "return a", f"{ATTENTION} -k of_bfloat16"),
    Mutant("attention/_blocks.py", "bias = jnp.where(kept, bias, 0)", "bias = 1.0 * bias", f"{ATTENTION} -k left_out"),
)  # fmt: skip


HEADING = """# Mutants and the tests that see them

From `python tests/mutants.py --table tests/mutants.md`: each mistake, the tests that it is given to, and the first of them
that failed when it last ran. Where the last column is empty, it has not run since it, or what saw it, was changed.

| file | mistake | given to | seen by |
|---|---|---|---|"""


def occurrences(mutant: Mutant) -> int:
    return mutant.text.count(mutant.old)


def run(mutant: Mutant, long: bool, programs: str) -> tuple[bool, str, float]:
    """Whether the tests of a mutant fail on a copy of the package with its mistake; which test did, or what pytest
    said; seconds.

    programs: where JAX keeps compiled programs, most of which mutants share.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("jsoftmax", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (*ROOT.glob("*.md"), ROOT / "pyproject.toml"):
            shutil.copy(file, copy)
        (copy / "jsoftmax" / mutant.file).write_text(mutant.text.replace(mutant.old, mutant.new))
        everything = ["-m", "full or not full"] if long else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-x",
            "-q",
            "--no-header",
            "--tb=no",
            "-p",
            "no:cacheprovider",
        ]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, *everything, *shlex.split(mutant.killed_by)],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"} | kept(programs),
            capture_output=True,
            text=True,
            check=False,
        )
        failed = [line[7:].split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        said = [*done.stderr.strip().splitlines(), *done.stdout.strip().splitlines(), "nothing"]
        killer = failed[0] if failed else said[-2]
        return done.returncode == 1 and bool(failed), killer, time.perf_counter() - started


def kept(programs: str) -> dict[str, str]:
    """The environment in which JAX keeps all compiled programs there."""
    return {
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def row(*cells: str) -> str:
    """A row of the table, or the beginning of one."""
    return "| " + " | ".join(cell.replace("|", r"\|").replace("tests/", "") for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutants of jsoftmax against the tests that must see them.")
    parser.add_argument("words", nargs="*", help="only mutants whose file or text has one of these")
    parser.add_argument("--long", action="store_true", help="with the cells that are marked full")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="write the table there, too")
    arguments = parser.parse_args()
    wanted = [m for m in MUTANTS if not arguments.words or any(w in m.file + m.old + m.new for w in arguments.words)]
    programs = tempfile.TemporaryDirectory()
    rows, survived = [HEADING], 0
    for number, mutant in enumerate(wanted, 1):
        if occurrences(mutant) != 1:
            killed, killer, seconds = False, f"the text occurs {occurrences(mutant)} times", 0.0
        else:
            killed, killer, seconds = run(mutant, arguments.long, programs.name)
        survived += not killed
        word = "killed" if killed else "SURVIVED"
        print(f"{number}/{len(wanted)} {word} {seconds:.0f} s {mutant.file}: {mutant.change}: {killer}", flush=True)
        cells = (mutant.file, mutant.change, mutant.killed_by, killer if killed else "**survived**")
        rows.append(row(*cells))
    print(f"{len(wanted)} mutants, {survived} survived")
    if arguments.table:
        arguments.table.write_text("\n".join(rows) + "\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
