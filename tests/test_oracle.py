"""The oracle, asked for every function × φ; and proof that it can fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jsoftmax
from jsoftmax import cli, verify
from jsoftmax.phi.polynomials import Spherical
from jsoftmax.verify import ERRATA, FUNCTIONS, PHIS, Function


@pytest.mark.parametrize(("function", "phi"), verify.PAIRS, ids=str)
def test_closed_form(function, phi):
    cell = verify.cell(function, phi)
    assert cell.ok, cell


@pytest.mark.parametrize("function", verify.SURE, ids=str)
def test_gradient_of_a_confident_row(function):
    assert verify.sure_ok(function, verify.sure_gradient(function))


def test_the_gradient_of_textbooks_is_seen():
    """p − 1 at the label as it stands."""
    plain = jax.custom_jvp(lambda z: -jsoftmax.log_softmax(z)[1])
    plain.defjvps(lambda z_dot, _, z: jnp.sum((jsoftmax.softmax(z) - jnp.eye(4)[1]) * z_dot))
    of_class_1 = Function("loss", lambda z, phi: plain(z), lambda phi, xp, z: -verify.plain_log_softmax(phi, xp, z)[1])
    assert not verify.sure_ok(of_class_1, verify.sure_gradient(of_class_1))


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


WRONG_ENTROPY = Function("entropy", lambda z, phi: articles_entropy(z), verify.plain_entropy)


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


def test_nan_is_a_miss():
    assert verify.error(jnp.nan, 1.0) == float("inf")
    assert not dataclasses.replace(verify.cell(FUNCTIONS[0], PHIS[0]), error64=(float("nan"),) * 4).ok


def test_command_fails_on_a_miss(monkeypatch, tmp_path, capsys):
    good, bad = (verify.cell(f, jsoftmax.exp) for f in (FUNCTIONS[0], WRONG_ENTROPY))
    monkeypatch.setattr(verify, "cells", lambda _: iter([good]))
    assert cli.main(["verify", "--json", str(tmp_path / "good.json")]) == 0
    assert (tmp_path / "good.json").read_text().count('"ok": true') == 4 + len(verify.SURE)
    monkeypatch.setattr(verify, "cells", lambda _: iter([good, bad]))
    assert cli.main(["verify"]) == 1
    assert "MISS" in capsys.readouterr().out


def test_fewer_orders_are_said(monkeypatch, capsys):
    expansions = [f for f in FUNCTIONS if not f.third_by_autodiff][:1]
    monkeypatch.setattr(verify, "PAIRS", [(f, jsoftmax.exp) for f in (FUNCTIONS[0], *expansions)])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # in this process
    assert [len(cell.error64) for cell in verify.cells(3)] == [3, 3]
    monkeypatch.setattr(verify, "SURE", ())
    for options, said in (([], True), (["--all"], False)):
        assert cli.main(["verify", *options]) == 0
        assert ("third derivatives (pairs of function and φ: 2)" in capsys.readouterr().out) == said


def test_both_processes_cover_every_cell(monkeypatch):
    monkeypatch.setattr(verify, "_cell_at", lambda index, orders: index)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert list(verify.cells()) == list(range(len(verify.PAIRS)))
