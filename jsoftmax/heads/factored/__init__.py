"""Plain SGD on a linear head whose time does not grow with its number of classes (MATH 12.2 to 12.4)."""

from jsoftmax.heads.factored._losses import SphericalLoss, log_loss, z_loss
from jsoftmax.heads.factored._sgd import Step, loss, loss_and_update
from jsoftmax.heads.factored._state import State, init, refresh, rows, to_weight

__all__ = [
    "SphericalLoss",
    "State",
    "Step",
    "init",
    "log_loss",
    "loss",
    "loss_and_update",
    "refresh",
    "rows",
    "to_weight",
    "z_loss",
]


def __dir__() -> list[str]:
    return __all__
