"""What a client can check of a model that it received, before it sends an update.

Each check is one number of the model and the client's own batch, the larger the more suspicious, and a threshold that
honest networks at several stages of training stay under by a factor of nearly two; experiments/malicious_checks.py
measures it, and the chapter on a malicious server has the table. `received` asks all of them. A plant that none of them
finds is not ruled out: who knows the checks plants around them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gi_lib.copies import batch_norms, deep_copy, functional_copy
from gi_lib.models.layers import logit_layer
from gi_lib.types import Batch, Classifier, NotApplicableError

PARALLEL = 0.99
"""Cosine from which two rows count as parallel."""
MIRROR = 1e-3
"""Relative spread of the ratio of a row's two halves, under which they count as mirrored."""
ROWS = 8
"""Fewer rows of a layer tell nothing."""

Value = tuple[float, str]
"""The number, and the layer where it is largest."""


class PlantedError(ValueError):
    """A client refuses a model; the sentence has the reasons."""


def d_snr(model: Classifier, batch: Batch) -> Value:
    """max over layers and images i of |g_i| / |sum_(j != i) g_j|, g_i the gradient of image i: whether one image alone
    makes the update (D-SNR; Garov et al., ICLR 2024). Infinite where the others have no gradient; 0 for one image.

    Of dense and convolution weights. Where batch norm has the batch's own statistics, g_i is that of loss i in it.
    """
    x, y = _on(model, batch)
    if len(x) < 2:
        return 0.0, ""
    model = functional_copy(model)
    names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1), strict=True)
    mixes = any(norm.own_statistics for norm in batch_norms(model).values())
    whole = F.cross_entropy(model(x), y, reduction="none") if mixes else None

    def gradient(i: int) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) if whole is None else whole[i]
        return torch.autograd.grad(loss, weights, retain_graph=mixes, allow_unused=True, materialize_grads=True)

    total = [torch.zeros_like(w) for w in weights]
    for i in range(len(x)):  # one image's gradient at a time: all of them may not fit into memory
        for sum_, g in zip(total, gradient(i), strict=True):
            sum_ += g
    found = (0.0, "")
    for i in range(len(x)):
        for name, sum_, g in zip(names, total, gradient(i), strict=True):
            own, rest = g.norm().item(), (sum_ - g).norm().item()
            found = max(found, (own / rest if rest > 1e-6 * own else math.inf if own else 0.0, name))
    return found


def rank_one_rows(model: Classifier, batch: Batch) -> Value:
    """Share of a dense layer's rows that are parallel to another one: an imprint measures the same in all of them."""

    def share(W: Tensor) -> float:
        rows = F.normalize(W[W.norm(dim=1) > 0], dim=1)
        cosines = rows @ rows.T - torch.eye(len(rows)).to(rows)
        return (cosines > PARALLEL).any(1).double().sum().item() / len(W)

    return _largest(model, lambda layer: share(layer.weight.detach()))


def mirrored_halves(model: Classifier, batch: Batch) -> Value:
    """Share of a dense layer's rows whose negative half is a multiple of the positive one: trap weights."""

    def share(W: Tensor) -> float:
        half = W.shape[1] // 2
        up, down = W.sort(dim=1, descending=True).values[:, :half], -W.sort(dim=1).values[:, :half]
        ratio = up / down
        mirrored = (up > 0).all(1) & (down > 0).all(1) & (ratio.std(1) < MIRROR * ratio.mean(1))
        return mirrored.double().mean().item()

    return _largest(model, lambda layer: share(layer.weight.detach().double()) if layer.in_features > 3 else 0.0)


def biases_at_quantiles(model: Classifier, batch: Batch) -> Value:
    """Share of the variance of a dense layer's biases that its rows explain, by their sums and norms.

    Whoever wants a neuron to light for one image in B gives it a bias of -mu sum(w) - sd |w| Phi^-1(1 - 1/B); in
    honest layers biases have little to do with the sums of rows.
    """

    def explained(layer: nn.Linear) -> float:
        if layer.bias is None:
            return 0.0
        W, b = layer.weight.detach().double(), layer.bias.detach().double()
        b = b - b.mean()
        if not b.norm() > 1e-6 * len(b):
            return 0.0
        known = torch.stack([W.sum(1), W.norm(dim=1)], 1)
        known = known - known.mean(0)
        known = torch.linalg.svd(known, full_matrices=False).U[:, known.norm(dim=0) > 1e-9]
        return ((known.T @ b).norm() / b.norm()).square().item()

    return _largest(model, explained, rows=4 * ROWS)


def last_layer_range(model: Classifier, batch: Batch) -> Value:
    """Largest less smallest bias of the layer that makes the logits: fishing sets one class against all others."""
    try:
        layer = logit_layer(model, tuple(batch.images.shape[1:]))  # type: ignore[arg-type]
    except NotApplicableError:
        return 0.0, ""
    if layer.bias is None:
        return 0.0, ""
    b = dict(model.named_parameters())[layer.bias].detach()
    return (b.max() - b.min()).item(), layer.bias.rpartition(".")[0]


def lit_by_one(model: Classifier, batch: Batch) -> Value:
    """Share of a dense layer's neurons with a gradient that have it from one image of the batch alone: what lets a
    server divide. 0 for fewer than 8 images, of which chance lights neurons alone."""
    model = functional_copy(model).requires_grad_()  # a ReLU in place would overwrite the outputs that are kept
    x, y = _on(model, batch)
    if len(x) < ROWS:
        return 0.0, ""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def ran(layer, inputs, output):
            if output.ndim == 2:
                outputs[name] = output

        return ran

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in _dense(model)]
    try:
        loss = F.cross_entropy(model(x), y, reduction="sum")
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs:
        return 0.0, ""
    found = (0.0, "")
    gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True, materialize_grads=True)
    for name, g in zip(outputs, gradients, strict=True):
        lit = (g != 0).sum(0)
        if (some := int((lit > 0).sum())) >= ROWS:
            found = max(found, (int((lit == 1).sum()) / some, name))
    return found


@dataclass(frozen=True)
class Check:
    """A number, the threshold from which a client refuses, and what it says then."""

    value: Callable[[Classifier, Batch], Value]
    threshold: float
    says: str


CHECKS = {
    "D-SNR": Check(d_snr, 15.0, "one image alone makes the update"),
    "rank-one rows": Check(rank_one_rows, 0.25, "rows measure the same, as an imprint's do"),
    "mirrored halves": Check(mirrored_halves, 0.25, "rows have mirrored halves, as trap weights have"),
    "biases at quantiles": Check(biases_at_quantiles, 0.5, "biases follow from the rows, as set to light one in many"),
    "last layer's range": Check(last_layer_range, 10.0, "a class is set against all others"),
    "lit by one": Check(lit_by_one, 0.3, "neurons take their gradient from one image each"),
}
"""By name, in the order in which a client asks."""


@dataclass(frozen=True)
class Finding:
    """What a check came to: its number, where, the threshold, and what the number would say above it."""

    check: str
    value: float
    where: str
    threshold: float
    says: str

    @property
    def refused(self) -> bool:
        return self.value >= self.threshold

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where and self.refused else ""
        said = f"{self.check} {self.value:.3g}{at}, threshold {self.threshold:g}"
        return f"{self.says} ({said})" if self.refused else said


@dataclass(frozen=True)
class Verdict:
    """What all checks came to."""

    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        return any(finding.refused for finding in self.findings)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Of a refusal, one sentence a check."""
        return tuple(str(finding) for finding in self.findings if finding.refused)

    def __str__(self) -> str:
        if not self.refused:
            return f"no check refuses this model, which does not prove it honest: {'; '.join(map(str, self.findings))}"
        return f"refuse this model: {'; '.join(self.reasons)}"

    def insist(self) -> None:
        """Raises:
        PlantedError: a check refuses the model.
        """
        if self.refused:
            raise PlantedError(f"{self}; send no update, and ask for the model that was agreed on")


def received(model: Classifier, batch: Batch) -> Verdict:
    """Ask all checks of a model as it came, in the mode in which the client trains it, and the client's own batch.

    Raises:
        ValueError: a label is not one of the model's classes.
    """
    if int(batch.labels.max()) >= model.num_classes or int(batch.labels.min()) < 0:
        raise ValueError(
            f"the batch has labels from {int(batch.labels.min())} to {int(batch.labels.max())}, and the model"
            f" classes 0 to {model.num_classes - 1}; check a model with the batch that it is to be trained on"
        )
    own: Classifier = deep_copy(model)  # type: ignore[assignment] # whose running statistics may move
    with torch.random.fork_rng(devices=[]):
        found = [(name, check, check.value(own, batch)) for name, check in CHECKS.items()]
    return Verdict(tuple(Finding(name, value, at, c.threshold, c.says) for name, c, (value, at) in found))


def _on(model: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
    p = next(model.parameters())
    return batch.images.to(p.device, p.dtype), batch.labels.to(p.device)


def _dense(model: Classifier) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def _largest(model: Classifier, value: Callable[[nn.Linear], float], rows: int = ROWS) -> Value:
    """Over the dense layers that have so many rows."""
    layers = [(name, layer) for name, layer in _dense(model) if layer.out_features >= rows]
    return max(((value(layer), name) for name, layer in layers), default=(0.0, ""))
