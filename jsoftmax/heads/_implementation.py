"""Which implementation computes the value of a head: XLA's loop over blocks, or the kernel for TPUs."""

from typing import Any

import jax

from jsoftmax.heads._head import Head, Plan
from jsoftmax.phi.base import Exponential


def check_implementation(function: str, implementation: Any, head: Head, plan: Plan, top: Any) -> Plan:
    """The plan with what the caller wants; an error where the kernel cannot run."""
    if implementation not in ("xla", "pallas"):
        raise ValueError(
            f"{function}: implementation must be 'xla' or 'pallas'; got {implementation!r}. Leave it out for 'xla', "
            "which runs everywhere."
        )
    if implementation == "xla":
        return plan
    unknown_to_the_kernel = {
        f"phi={head.phi!r}": not isinstance(head.phi, Exponential),
        "labels that are distributions": head.targets is not None,
        "TopTargets": top is not None,
        "banned": head.banned is not None,
        f"shards={plan.shards}": plan.axis_name is None and plan.shards > 1,
        f"the backend {jax.default_backend()!r}": jax.default_backend() not in ("cpu", "tpu"),
    }
    for what, given in unknown_to_the_kernel.items():
        if given:
            raise ValueError(
                f"{function}: implementation='pallas' is a kernel for TPUs, for phi=exp and integer labels, without "
                f"banned and shards; got {what}. Leave implementation out."
            )
    return plan._replace(kernel=True)
