"""Results of PyTorch and of the package entmax: `python tests/peers.py` writes them to tests/peers.json (extra
`peers`)."""

import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".json")
Z = np.random.default_rng(0).normal(0, 2, (4, 6)).astype(np.float32)
G = np.random.default_rng(1).normal(0, 1, (4, 6)).astype(np.float32)
LABELS = np.array([2, 0, 5, 3])
WEIGHTS = np.linspace(0.5, 2.0, 6).astype(np.float32)
Q = np.exp(G) / np.exp(G).sum(-1, keepdims=True)
CROSS_ENTROPY = {  # options of ours, by name
    "plain": {},
    "weights": {"class_weights": WEIGHTS},
    "smoothing": {"label_smoothing": 0.1},
    "ignored": {"ignore_label": 5},
    "together": {"class_weights": WEIGHTS, "label_smoothing": 0.1, "ignore_label": 5},
}
TEMPERATURES = (0.3, 0.7, 2.0)
ALPHAS = (1.1, 1.3, 1.5, 1.7, 2.0)
CUTOFFS, DIV_VALUE, CLASSES = (3, 8), 2.0, 15  # of an adaptive softmax of d = 6, with the names of its weights
ADAPTIVE = {
    name: np.random.default_rng(i).normal(0, 1, shape).astype(np.float32)
    for i, (name, shape) in enumerate(
        {
            "head.weight": (5, 6),
            "head.bias": (5,),
            "tail.0.0.weight": (3, 6),
            "tail.0.1.weight": (5, 3),
            "tail.1.0.weight": (1, 6),
            "tail.1.1.weight": (7, 1),
        }.items()
    )
}
CLASS_OF = np.array([4, 0, 14, 9])


def measure():
    """Every number, by peer and name."""
    import entmax  # noqa: PLC0415  (the extra)
    import torch  # noqa: PLC0415

    z, g, labels, q = (torch.tensor(a) for a in (Z, G, LABELS, Q))

    def cross_entropy(options, targets=labels):
        names = {"class_weights": "weight", "ignore_label": "ignore_index", "label_smoothing": "label_smoothing"}
        given = {names[k]: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        return torch.nn.functional.cross_entropy(z, targets, reduction="none", **given)

    def with_product(f):
        x = z.clone().requires_grad_()
        y = f(x)
        (product,) = torch.autograd.grad(y, x, g if y.shape == g.shape else torch.ones_like(y))
        return {"value": y.tolist(), "product": product.tolist()}

    def adaptive():
        module = torch.nn.AdaptiveLogSoftmaxWithLoss(6, CLASSES, list(CUTOFFS), DIV_VALUE, head_bias=True)
        module.load_state_dict({name: torch.tensor(value) for name, value in ADAPTIVE.items()})
        h = z.clone().requires_grad_()
        log_prob = module(h, torch.tensor(CLASS_OF)).output
        by_h, *by_weights = torch.autograd.grad(log_prob.sum(), [h, *module.parameters()])
        names = [name for name, _ in module.named_parameters()]
        return {
            "log_prob": log_prob.tolist(),
            "log_probs": module.log_prob(z).tolist(),
            "predict": module.predict(z).tolist(),
            "by_hidden": by_h.tolist(),
            "by_weights": {name: a.tolist() for name, a in zip(names, by_weights, strict=True)},
        }

    exp_concrete = torch.distributions.relaxed_categorical.ExpRelaxedCategorical
    log_x = torch.log_softmax(torch.tensor(2 * G), -1)
    losses = {1.5: entmax.entmax15_loss, 2.0: entmax.sparsemax_loss}
    return {
        "torch": {
            "version": torch.__version__,
            "cross_entropy": {name: cross_entropy(options).tolist() for name, options in CROSS_ENTROPY.items()},
            "distributions": cross_entropy({}, q).tolist(),
            "concrete": {
                str(round(float(t), 1)): {
                    "log_x": log_x.tolist(),
                    "exp_concrete": exp_concrete(t, logits=z).log_prob(log_x).tolist(),
                    "concrete": torch.distributions.RelaxedOneHotCategorical(t, logits=z)
                    .log_prob(log_x.exp())
                    .tolist(),
                    "binary": torch.distributions.RelaxedBernoulli(t, logits=z).log_prob(log_x.exp()).tolist(),
                }
                for t in map(torch.tensor, TEMPERATURES)
            },
            "adaptive": adaptive(),
            "smoothed distributions": cross_entropy({"label_smoothing": 0.1}, q).tolist(),
        },
        "entmax": {
            "version": entmax.__version__,
            "sparsemax": with_product(lambda x: entmax.sparsemax(x, -1)),
            "entmax15": with_product(lambda x: entmax.entmax15(x, -1)),
            "bisect": {str(a): with_product(lambda x, a=a: entmax.entmax_bisect(x, a, -1)) for a in ALPHAS},
            "losses": {str(a): with_product(lambda x, f=f: f(x, labels)) for a, f in losses.items()},
        },
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure(), indent=1) + "\n")
