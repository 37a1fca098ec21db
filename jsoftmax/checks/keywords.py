"""Keywords that a public function does not have, and what to write instead of each."""

from collections.abc import Iterable
from typing import NoReturn

_OTHER_NAMES = {
    "dim": ("axis",),
    "keepdim": ("keepdims",),
    "ignore_index": ("ignore_label",),
    "weight": ("class_weights",),
    "weights": ("class_weights",),
    "mask": ("where",),
    "tau": ("temperature",),
    "num_samples": ("shape", "samples"),
    "p": ("top_p", "z_p"),
    "q": ("z_q",),
    "k": ("top_k",),
    "input": ("z", "logits", "scores", "hidden", "z_p"),
    "x": ("z", "logits", "scores", "hidden", "z_p"),
    "logits": ("z", "scores", "z_p"),
    "scores": ("z", "logits", "z_p"),
    "z": ("logits", "scores", "z_p"),
    "target": ("labels", "targets"),
    "targets": ("labels", "target"),
    "labels": ("targets",),
    "src": ("z",),
    "index": ("segment_ids",),
    "dim_size": ("num_segments",),
}
"""Keywords of PyTorch, of other libraries and of other functions of this one, with the names of that argument here. A
function has one of these names, or none."""

_WRITTEN_ELSEWHERE = {
    "reduction": "Losses have one number for each row, unless the function's name ends in _sum: write jnp.mean(…) or "
    "jnp.sum(…) around the call",
    "base": "Results are in nats: divide by jnp.log(base)",
    "dtype": "Results have the scores' dtype, or float32 where classes are reduced: write .astype(…) around the call",
    "temperature": "Divide the scores by the temperature; in a linear layer, hidden and bias",
}
"""Keywords that some or all functions do not have, with what to write instead."""

_OF_LABELS = {
    "class_weights": "Multiply each loss by the weight of its label: jnp.asarray(w)[labels] * loss. "
    "heads.linear_cross_entropy_sum takes these as token_weights=jnp.asarray(w)[labels]. With label_smoothing=, "
    "PyTorch also weights the other classes: losses.cross_entropy(class_weights=w) does that",
    "token_weights": "Results have one number for each token or row: write w * loss, or for a sum "
    "heads.linear_cross_entropy_sum(…, token_weights=w)",
}
"""The same for functions of labels."""

FOREIGN = _OTHER_NAMES.keys() | _WRITTEN_ELSEWHERE.keys() | _OF_LABELS.keys()
"""All of these keywords. A function may have some of them as arguments of its own."""


def _way_out(name: str, parameters: tuple[str, ...]) -> str:
    names = _OTHER_NAMES.get(name, (name,))
    for ours in names:
        if ours in parameters:
            return f"Write {ours}=…"
        if ours in _WRITTEN_ELSEWHERE:
            return _WRITTEN_ELSEWHERE[ours]
        if ours in _OF_LABELS:
            return _OF_LABELS[ours] if "labels" in parameters else "Only losses of labels have such weights"
    return f"Functions that have this argument call it {'= or '.join(names)}=; this one does not have it"


def reject_keywords(
    function: str, parameters: tuple[str, ...], keywords: Iterable[str], given: tuple[str, ...]
) -> NoReturn:
    """Raises for the first keyword that is not an argument, or whose argument is also given by position."""
    name = next(name for name in keywords if name in given or (name in FOREIGN and name not in parameters))
    if name not in given:
        raise TypeError(
            f"{function}: got an unexpected keyword {name}=; its arguments are {', '.join(parameters)}. "
            f"{_way_out(name, parameters)}."
        )
    of_classes = f" {_OF_LABELS['class_weights']}." if name == "weight" and "labels" in parameters else ""
    place = parameters.index(name) + 1
    raise TypeError(
        f"{function}: {name} is given twice, as argument {place} and as {name}=. Leave one out.{of_classes}"
    )
