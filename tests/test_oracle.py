"""The oracle checks every function × φ; and these tests show that it can fail."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, named, some
from interpreter import evaluated

import jsoftmax
from jsoftmax import cli, verify
from jsoftmax.phi.polynomials import Spherical
from jsoftmax.verify import ERRATA, EVERY, FUNCTIONS, OTHERS, PHIS, SPARSE_MAPS, Function


def grouped(rows):
    """Several φ, compared in one program: (function, dtype, φ) as a table of φ."""
    table = collections.defaultdict(list)
    for function, dtype, phi in rows:
        table[function, dtype].append(phi)
    return [pytest.param(*key, phis, id=f"{key[0]}-{key[1].__name__}") for key, phis in table.items()]


def missed(function, phis, dtype):
    """The cells whose error is too large, with their errors."""
    allowed = verify.tolerances(function, dtype)
    errors = verify.against_digits(function, phis, dtype, evaluated)
    found = [(f"{function} {phi}", of_phi) for phi, of_phi in zip(phis, errors, strict=True)]
    return [cell for cell in found if not all(e <= t for e, t in zip(cell[1], allowed, strict=True))]


DTYPES = (np.float64, np.float32)
ROWS = [(f, dtype, phi) for f, phi, dtype in covering(EVERY, PHIS, DTYPES, met=[(0, 1), (0, 2)])]
ROWS += [(f, dtype, jsoftmax.exp) for f, dtype in covering(SPARSE_MAPS + OTHERS, DTYPES, met=[(0, 1)])]


@pytest.mark.parametrize(("function", "dtype", "phis"), grouped(ROWS))
def test_digits(function, dtype, phis):
    """Each function in a dtype, and each φ in both dtypes, up to second derivatives; `verify` has all pairs in both."""
    assert not missed(verify.up_to(3, function), phis, dtype)


THIRD = [f for f in EVERY if f.orders == 4 and f.third_by_autodiff]
FEW_THIRD = named(THIRD, ("entropy", "kl_divergence", "softmax", "log_softmax", "log_normalizer"))
"""The third derivatives of the others are autodiff's of the sums and rules of these."""
OF_THIRD = and_full(covering(FEW_THIRD, PHIS, met=[(0, 1)]), covering(THIRD, PHIS, met=[(0, 1)]))
OF_AUTODIFF = [*covering(EVERY, PHIS, met=[(0, 1)]), *((f, jsoftmax.exp) for f in SPARSE_MAPS + OTHERS)]


@pytest.mark.parametrize(("function", "phi"), OF_THIRD, ids=str)
def test_third_derivatives(function, phi):
    """Of each φ; in the gate of each function."""
    assert not missed(function, [phi], np.float64)


@pytest.mark.full  # Against many digits above.
@pytest.mark.parametrize(("function", "phi"), OF_AUTODIFF, ids=str)
def test_autodiff(function, phi):
    """Jacobian and Hessian, and a third derivative where there is one, against `jax.jacrev` and `jax.hessian` of the
    plain definition: each function and each φ."""
    errors = verify.against_autodiff(function, phi, evaluated)
    assert all(e <= t for e, t in zip(errors, verify.tolerances(function, np.float64), strict=False)), errors


# Every pair of function and φ in both dtypes: `python -m jsoftmax verify`, which the gate runs. All orders, and
# autodiff of every pair: `verify --all`, which the forge runs beside it.


OF_SURE = (
    *("entropy", "varentropy", "tsallis_entropy", "kl_divergence", "softmax", "log_softmax"),
    *("cross_entropy", "log_prob", "kl_to_target", "entmax(alpha=1.7)", "sink_softmax", "mixture_log_softmax"),
)
"""With a rule of their own. `python -m jsoftmax verify` has all of them."""


@pytest.mark.parametrize("function", some(verify.SURE, named(verify.SURE, OF_SURE)), ids=str)
def test_gradient_of_a_confident_row(function):
    assert verify.Sure(function, verify.sure_gradient(function)).ok


def test_the_gradient_of_textbooks_is_seen():
    """The oracle sees the loss of digits in the textbook's gradient, p − 1 at the label."""
    plain = jax.custom_jvp(lambda z: -jsoftmax.log_softmax(z)[1])
    plain.defjvps(lambda z_dot, _, z: jnp.sum((jsoftmax.softmax(z) - jnp.eye(4)[1]) * z_dot))
    of_class_1 = Function("loss", lambda z, phi: plain(z), lambda phi, xp, z: -verify.plain_log_softmax(phi, xp, z)[1])
    assert not verify.Sure(of_class_1, verify.sure_gradient(of_class_1)).ok


@pytest.mark.parametrize("erratum", ERRATA, ids=lambda erratum: erratum.where)
def test_article_errs(erratum):
    assert erratum.ok(*erratum.errors())


@jax.custom_jvp
def articles_entropy(z):
    return jsoftmax.entropy(z)


@articles_entropy.defjvp
def _articles_gradient(primals, tangents):
    (z,), (z_dot,) = primals, tangents
    return articles_entropy(z), jnp.sum((-1 + jsoftmax.softmax(z)) * z_dot)  # MATH 2.1: wrong


WRONG_ENTROPY = Function("entropy", lambda z, phi: articles_entropy(z), verify.plain_entropy, orders=3)


def test_oracle_sees_a_wrong_function():
    cell = verify.cell(WRONG_ENTROPY, jsoftmax.exp)
    assert cell.error64[0] <= cell.tolerance64[0]
    assert all(e > 0.01 for e in cell.error64[1:] + cell.error32[1:])
    assert not cell.ok


@dataclasses.dataclass(frozen=True, repr=False)
class WrongCurvature(Spherical):
    def curvature(self, z):
        return -super().curvature(z)


jax.tree_util.register_dataclass(WrongCurvature, data_fields=["epsilon"], meta_fields=[])


def test_oracle_sees_a_wrong_phi():
    cell = verify.cell(FUNCTIONS[0], WrongCurvature(0.5))
    assert all(e <= t for e, t in zip(cell.error64[:2], cell.tolerance64[:2], strict=True))
    assert min(cell.error64[2], cell.error32[2]) > 0.01


GOOD = verify.Cell("entropy", "exp", (0.0,) * 3, (1e-12,) * 3, (0.0,) * 3, (1e-5,) * 3)


def test_nan_is_a_miss():
    assert verify.error(jnp.nan, 1.0) == float("inf")
    assert GOOD.ok
    assert not dataclasses.replace(GOOD, error64=(float("nan"),) * 3).ok


def test_command_fails_on_a_miss(monkeypatch, tmp_path, capsys):
    good, bad = GOOD, dataclasses.replace(GOOD, error64=(0.0, 0.5, 0.5))
    monkeypatch.setattr(verify, "ERRATA", ERRATA[:1])  # each is above
    sure, not_sure = verify.Sure(FUNCTIONS[0], 1e-7), verify.Sure(FUNCTIONS[0], float("nan"))
    monkeypatch.setattr(verify, "checks", lambda *_, **__: iter([good, sure]))
    assert cli.main(["verify", "--json", str(tmp_path / "good.json")]) == 0
    assert (tmp_path / "good.json").read_text().count('"ok": true') == 3
    for wrong in ([good, bad, sure], [good, not_sure]):
        monkeypatch.setattr(verify, "checks", lambda *_, wrong=wrong, **__: iter(wrong))
        assert cli.main(["verify"]) == 1
        assert "MISS" in capsys.readouterr().out


def test_fewer_orders_are_said(monkeypatch, capsys):
    expansions = [f for f in FUNCTIONS if not f.third_by_autodiff][:1]
    monkeypatch.setattr(verify, "GROUPS", [(f, (jsoftmax.exp,)) for f in (FUNCTIONS[0], *expansions)])
    monkeypatch.setattr(verify, "SURE", ())
    monkeypatch.setattr(verify, "ERRATA", ())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # in this process
    found = list(verify.checks(everything=False))
    assert [len(cell.error64) for cell in found] == [3, 2]
    monkeypatch.setattr(verify, "checks", lambda *_, **__: iter(found))
    for options, said in (([], True), (["--all"], False)):
        assert cli.main(["verify", *options]) == 0
        assert ("Left out: third derivatives" in capsys.readouterr().out) == said


def test_both_processes_cover_every_cell(monkeypatch):
    monkeypatch.setattr(verify, "_task", lambda index, everything: ([index], None, 0.0))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert list(verify.checks()) == list(range(len(verify.GROUPS) + len(verify.SURE)))
    assert [(f, phi) for f, phis in verify.GROUPS for phi in phis] == verify.PAIRS
