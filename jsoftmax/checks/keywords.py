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
    "num_samples": ("shape",),
    "p": ("top_p",),
    "k": ("top_k",),
    "input": ("z", "logits", "scores"),
    "x": ("z", "logits", "scores"),
    "logits": ("z", "scores"),
    "scores": ("z", "logits"),
    "z": ("logits", "scores"),
    "target": ("labels", "targets"),
    "targets": ("labels",),
    "labels": ("targets",),
    "src": ("z",),
    "index": ("segment_ids",),
    "dim_size": ("num_segments",),
}
"""Keywords of PyTorch, of other libraries and of other functions of this one, with the names of that argument here. A
function has one of these names, or none."""

_WRITTEN_ELSEWHERE = {
    "reduction": "Results have one number for each row: write jnp.mean(…) or jnp.sum(…) around the call",
    "base": "Results are in nats: divide by jnp.log(base)",
    "dtype": "Results have the scores' dtype, or float32 where classes are reduced: write .astype(…) around the call",
    "temperature": "Divide the scores: z / temperature",
}
"""Keywords that some or all functions do not have, with what to write instead."""

_OF_LABELS = {
    "class_weights": "Weights of classes are written jnp.asarray(w)[labels] * loss, or for a sum "
    "heads.linear_cross_entropy_sum(…, token_weights=jnp.asarray(w)[labels]), which is the same without label "
    "smoothing. With it, pass distributions as labels, times w, or the logits to losses.cross_entropy(class_weights=w)",
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
    return f"This function has no {'= and no '.join(names)}= either"


def reject_keywords(function: str, parameters: tuple[str, ...], keywords: Iterable[str], positional: int) -> NoReturn:
    """Raises for the first keyword that is not an argument, or that is given by its place, too."""
    given = parameters[:positional]
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
