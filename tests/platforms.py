"""Programs that are traced as the test says: for GPUs or TPUs and run on CPU, or with other numbers of the package."""

import contextlib

import jax
import pytest

_ANEW = jax.make_user_context()


def traced_anew():
    """A context. Within it JAX uses no trace that was made outside, and outside none that was made within. So what a
    test changes in the package counts, and other tests keep their programs, which `jax.clear_caches` would drop."""
    return _ANEW(object())


@contextlib.contextmanager
def as_on_accelerators(platform="cuda"):
    """A context. Within it, every choice by platform takes the branch for that platform, if there is one, and else the
    default."""

    def elsewhere(*arrays, default, **branches):
        return branches.get(platform, default)(*arrays)

    with pytest.MonkeyPatch.context() as patch, traced_anew():
        patch.setattr(jax.lax, "platform_dependent", elsewhere)
        yield
