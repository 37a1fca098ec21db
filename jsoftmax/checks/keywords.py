"""Keywords that a public function does not have, and what to write instead of each."""

import difflib
from collections.abc import Iterable
from typing import NoReturn

_OTHER_NAMES = {
    "dim": ("axis",),
    "keepdim": ("keepdims",),
    "ignore_index": ("ignore_label",),
    "weight": ("class_weights",),
    "weights": ("class_weights",),
    "mask": ("where",),
    "attn_mask": ("mask", "where"),
    "where": ("where", "mask"),
    "causal": ("is_causal",),
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
    "logits_soft_cap": ("soft_cap",),
    "softcap": ("soft_cap",),
    "chunk_size": ("block_size",),
    "dropout_p": ("dropout",),
    "dropout_rate": ("dropout",),
    "probabilities": ("probs",),
}
"""Keywords of PyTorch, of other libraries and of other functions of this one, with the names of that argument here. A
function has one of these names, or none."""

_WRITTEN_ELSEWHERE = {
    "reduction": "Losses have one number for each row, unless the function's name ends in _sum: write jnp.mean(…) or "
    "jnp.sum(…) around the call",
    "base": "Results are in nats: divide by jnp.log(base)",
    "dtype": "Results have the scores' dtype, or float32 where classes are reduced: write .astype(…) around the call",
    "temperature": "Divide the scores by the temperature; in a linear layer, hidden and bias",
    "probs": "Scores are wanted, not probabilities: pass jnp.log(probs)",
    "p": "Scores are wanted, not probabilities: pass jnp.log(p). If a cut is meant, it is truncate(scores, top_p=p)",
    "top_k": "Cut the scores first, and pass the result: truncate(scores, top_k=…)",
    "top_p": "Cut the scores first, and pass the result: truncate(scores, top_p=…)",
    "min_p": "Cut the scores first, and pass the result: truncate(scores, min_p=…)",
    "dropout": "There is no dropout: apply it to the result",
    "implementation": "Leave it out: this function has only one",
}
"""Keywords that some or all functions do not have, with what to write instead."""

_OF_LABELS = {
    "class_weights": "Multiply each loss by the weight of its label: jnp.asarray(w)[labels] * loss. "
    "heads.linear_cross_entropy_sum takes these as token_weights=jnp.asarray(w)[labels]. With label_smoothing=, "
    "PyTorch also weights the other classes: losses.cross_entropy(class_weights=w) does that",
    "token_weights": "Results have one number for each token or row: write w * loss, or for a sum "
    "heads.linear_cross_entropy_sum(…, token_weights=w)",
}
_OF_DRAWS = {
    "top_p": "Take the candidates by found = heads.linear_top_k(…), or by adaptive.top_k, and cut them: "
    "gumbel.categorical(key, truncate(found.log_prob, top_p=…)) draws places in found.indices",
}
_OF_ATTENTION = {
    "temperature": "Write scale=1/(temperature * sqrt(H)) with H features, since scale replaces 1/sqrt(H); divide the "
    "bias by the temperature, too",
    "implementation": "Leave it out: there is one for all platforms. For the kernels of cuDNN use "
    "jax.nn.dot_product_attention(…, implementation='cudnn')",
}
_WHERE_THERE_IS = {"labels": _OF_LABELS, "hidden": _OF_DRAWS, "query": _OF_ATTENTION}
"""The same for functions that have a certain argument."""


def _way_out(name: str, parameters: tuple[str, ...]) -> str:
    names = _OTHER_NAMES.get(name, (name,))
    advice = dict(_WRITTEN_ELSEWHERE)
    for argument, of_these in _WHERE_THERE_IS.items():
        advice |= of_these if argument in parameters else {}
    for ours in names:
        if ours in parameters:
            return f"Write {ours}=…"
    for ours in (name, *names):
        if ours in advice:
            return advice[ours]
        if ours in _OF_LABELS:
            return "Only losses of labels have such weights"
    if name in _OTHER_NAMES:
        return f"Functions that have this argument call it {'= or '.join(names)}=; this one does not have it"
    near = difflib.get_close_matches(name, parameters, 1)
    return f"Write {near[0]}=…" if near else "Leave it out"


def reject_keywords(
    function: str, parameters: tuple[str, ...], keywords: Iterable[str], given: tuple[str, ...]
) -> NoReturn:
    """Raises for the first keyword that is not an argument, or whose argument is also given by position."""
    name = next(name for name in keywords if name in given or name not in parameters)
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
