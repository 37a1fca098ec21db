"""Pictures, by matplotlib (the extra `plot`)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def _way(result: Any) -> str:
    """The name of a line: φ for cross-entropy; otherwise the loss, with its φ if that is not exp."""
    if result.loss == "cross-entropy":
        return result.phi
    return result.loss if result.phi in ("", "exp") else f"{result.loss}, {result.phi}"


def learning_curves(results: Sequence[Any], path: pathlib.Path) -> None:
    """Mean test loss over the epochs: one panel for each model, one line for each φ or loss, with a band of ± one
    standard error."""
    models = list(dict.fromkeys(result.model for result in results))
    ways = list(dict.fromkeys(_way(result) for result in results))
    colours = mpl.colormaps["tab20"](np.linspace(0, 1, 20))
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(axes, models, strict=True):
        for result in (r for r in results if r.model == model):
            epochs = np.arange(1, result.curve.shape[1] + 1)
            mean, error = result.curve.mean(0), result.curve.std(0, ddof=1) / len(result.curve) ** 0.5
            colour = colours[ways.index(_way(result)) % 20]
            style = "--" if ways.index(_way(result)) % 2 else "-"
            panel.plot(epochs, mean, style, color=colour, label=_way(result), linewidth=1.6)
            panel.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        panel.set_title(model)
        panel.set_xlabel("epoch")
        panel.set_yscale("log")
        panel.grid(visible=True, which="both", alpha=0.3)
    axes[0].set_ylabel("test loss, each its own, nats")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", title="φ, or the loss", frameon=False
    )
    figure.savefig(path, dpi=130)
