"""Names that a module does not have, and where to find what they mean."""

import difflib
import importlib
import importlib.util
import inspect
from typing import NoReturn

_CROSS_ENTROPY = "jsoftmax.losses.cross_entropy"
_CUT = "jsoftmax.truncate(z, top_{}=…), which cuts scores"
_DRAW = "jsoftmax.gumbel.categorical"

OTHER_NAMES = {
    # functions of scores
    "logsumexp": "jsoftmax.log_normalizer",
    "log_sum_exp": "jsoftmax.log_normalizer",
    "kl_div": "jsoftmax.kl_divergence, of scores, or jsoftmax.losses.kl_to_target, of scores and probabilities",
    "kl": "jsoftmax.kl_divergence",
    "js_divergence": "jsoftmax.jensen_shannon_divergence",
    "jsd": "jsoftmax.jensen_shannon_divergence",
    "projection_simplex": "jsoftmax.sparsemax",
    "top_k": f"{_CUT.format('k')}; of a linear layer jsoftmax.heads.linear_top_k",
    "topk": f"{_CUT.format('k')}; of a linear layer jsoftmax.heads.linear_top_k",
    "top_p": _CUT.format("p"),
    # losses
    "loss": _CROSS_ENTROPY,
    "cross_entropy_loss": _CROSS_ENTROPY,
    "CrossEntropyLoss": _CROSS_ENTROPY,
    "nll_loss": f"{_CROSS_ENTROPY}, which takes scores or log-probabilities",
    "softmax_cross_entropy": _CROSS_ENTROPY,
    "softmax_cross_entropy_with_integer_labels": _CROSS_ENTROPY,
    "binary_cross_entropy": f"{_CROSS_ENTROPY} of the scores 0 and z (docs/guides/recipes.md, Two classes)",
    "sigmoid_binary_cross_entropy": f"{_CROSS_ENTROPY} of the scores 0 and z (docs/guides/recipes.md, Two classes)",
    "focal_loss": "jsoftmax.losses.focal_cross_entropy",
    "poly_loss": "jsoftmax.losses.poly_cross_entropy",
    "label_smoothing": f"{_CROSS_ENTROPY}(…, label_smoothing=…)",
    # draws
    "sample": _DRAW,
    "multinomial": _DRAW,
    "Categorical": f"{_DRAW}, jsoftmax.losses.log_prob, jsoftmax.entropy and jsoftmax.kl_divergence",
    "sample_without_replacement": f"{_DRAW}(…, replace=False)",
    # linear layers, attention, ragged rows
    "AdaptiveLogSoftmaxWithLoss": "jsoftmax.heads.adaptive",
    "fused_linear_cross_entropy": "jsoftmax.heads.linear_cross_entropy",
    "sampled_softmax": "jsoftmax.heads.sampled_cross_entropy",
    "sampled_softmax_loss": "jsoftmax.heads.sampled_cross_entropy",
    "scaled_dot_product_attention": "jsoftmax.attention.dot_product_attention",
    "flash_attention": "jsoftmax.attention.dot_product_attention",
    "scatter_softmax": "jsoftmax.segments.segment_softmax",
    # of JAX itself
    "one_hot": "jax.nn.one_hot",
    "argmax": "jax.numpy.argmax",
    "sigmoid": "jax.nn.sigmoid",
}
"""Names of PyTorch, optax and other libraries, with what the same thing is called here. docs/coming-from.md has a table
for readers; a test compares the two."""


def no_attribute(module: str, name: str) -> NoReturn:
    """Raises for a name that a module does not have, and says where the name is."""
    raise AttributeError(f"module {module!r} has no attribute {name!r}. {_way_out(module, name)}.")


def _way_out(module: str, name: str) -> str:
    if name.startswith("_") or not name.isidentifier():  # Python and tools ask for such names
        return f"dir({module}) lists the public names"
    if hasattr(importlib.import_module(module), "__path__") and importlib.util.find_spec(f"{module}.{name}"):
        return f"It is a module: import {module}.{name}"
    places, known = " or ".join(_places(name, "jsoftmax")), OTHER_NAMES.get(name)
    if known:
        return f"Here it is {known}{f'. This name is in {places}' if places else ''}"
    if places:
        return f"It is {places}"
    near = difflib.get_close_matches(name, importlib.import_module(module).__all__, 1, 0.8)
    return f"It has {near[0]}" if near else f"dir({module}) lists the public names"


def _places(name: str, within: str) -> list[str]:
    """The places of a public name in a module and its rooms. It imports the rooms, also where a tool only asks whether
    there is such a name."""
    module = importlib.import_module(within)
    rooms = [room for room in module.__all__ if inspect.ismodule(getattr(module, room))]
    here = [f"{within}.{name}"] if name in module.__all__ else []
    return here + [place for room in rooms for place in _places(name, f"{within}.{room}")]
