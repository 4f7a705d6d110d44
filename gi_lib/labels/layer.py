"""The last layer, of which all rules read: its gradient, its weights, and what images make of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gi_lib.copies import deep_copy
from gi_lib.models.layers import dense_layers, logit_layer
from gi_lib.types import Classifier, Labels, NotApplicableError, Observation, WithheldError, differing

AT_ONCE = 256
"""Images that go through the model at once."""
TELL = "or tell the attacker the labels: observe with ThreatModel(knows_labels=True)"


def last_layer(obs: Observation) -> tuple[Tensor, Tensor | None]:
    """Gradients of the dense layer that makes the logits: weight [K, D] and bias [K], or None without a bias.

    The layer is found by a forward pass. One logit u is taken for two classes, (0, u), whose rows are opposite.

    Raises:
        NotApplicableError: the model does not end in a dense layer of K outputs, or it is frozen.
    """
    layer = logit_layer(obs.model, obs.image_shape)
    if layer.weight not in obs.gradient:
        raise NotApplicableError(
            "the layer that makes the logits is frozen or computed from other parameters, and its gradient is not in"
            " the update; observe with ThreatModel(knows_labels=True)"
        )
    weight = obs.gradient[layer.weight]
    bias = obs.gradient.get(layer.bias) if layer.bias is not None else None
    if len(weight) == 1:
        weight = torch.cat([-weight, weight])
        bias = None if bias is None else torch.cat([-bias, bias])
    return weight, bias


def need_batch_size(obs: Observation, rule: str) -> int:
    """B.

    Raises:
        WithheldError: the threat model withholds it.
    """
    if obs.batch_size is None:
        raise WithheldError(f"{rule} needs the batch size; observe with ThreatModel(knows_batch_size=True)")
    return obs.batch_size


def need_bias(obs: Observation, rule: str, instead: str) -> tuple[Tensor, Tensor]:
    """`last_layer`, of which the bias is there.

    Raises:
        NotApplicableError: it is not; the sentence names the rule `instead`.
    """
    weight, bias = last_layer(obs)
    if bias is None:
        raise NotApplicableError(f"{rule} reads the bias of the last layer, which has none; use {instead}")
    return weight, bias


@dataclass(frozen=True)
class Descent:
    """T steps of plain gradient descent at a rate: what was sent is the sum of their gradients."""

    steps: int
    lr: float


def descent(obs: Observation, rule: str) -> Descent:
    """How many gradients the update is the sum of.

    Raises:
        WithheldError: the threat model withholds it.
        NotApplicableError: the client's optimiser sends no sum of gradients.
    """
    client = obs.each_client
    if client is None:
        raise WithheldError(
            f"{rule} must know how many steps the update sums; observe with ThreatModel(knows_training_details=True),"
            " or say receive(client=...)"
        )
    optimiser = getattr(client, "optimiser", None)
    if optimiser is not None and (type(optimiser).__name__ != "SGD" or differing(optimiser)):
        raise NotApplicableError(
            f"{rule} reads a sum of gradients, and the client's optimiser {optimiser} sends none; undo it before"
            f" receive(...), {TELL}"
        )
    return Descent(getattr(client, "steps", 1), getattr(client, "lr", 1.0))


def head(obs: Observation) -> tuple[Tensor, Tensor]:
    """The last layer itself, in float64: W [K, D] and b [K], zeros without a bias."""
    layer, own = logit_layer(obs.model, obs.image_shape), dict(obs.model.named_parameters())
    assert layer.weight is not None
    W = own[layer.weight].detach().double()
    b = W.new_zeros(len(W)) if layer.bias is None else own[layer.bias].detach().double()
    if len(W) == 1:
        W, b = torch.cat([0 * W, W]), torch.cat([0 * b, b])
    return W, b


def features(obs: Observation, images: Tensor, *, after: float | None = None) -> tuple[Tensor, Tensor]:
    """What the last layer makes of images [N, C, H, W]: its inputs h [N, D] and the probabilities p [N, K], in float64.

    Args:
        after: the client's rate, to compute them with the weights after the round; None takes those before.
    """
    model = obs.model if after is None else _moved(obs, after)
    name = logit_layer(model, obs.image_shape).weight
    h, p = [], []
    for part in images.to(obs.device, obs.dtype).split(AT_ONCE):
        layers, logits = dense_layers(model, part)
        h.append(next(layer.input for layer in layers if layer.weight == name).double())
        p.append(logits.double().softmax(1))
    return torch.cat(h), torch.cat(p)


def _moved(obs: Observation, lr: float) -> Classifier:
    model: Any = deep_copy(obs.model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in obs.gradient:
                p -= lr * obs.gradient[name]
    return model


Inputs = Callable[[Observation, int, torch.Generator], Tensor]
"""(Observation, N, generator) -> N images [N, C, H, W] of the attacker's own, on which the model is looked at."""


def noise(obs: Observation, n: int, rng: torch.Generator) -> Tensor:
    """Images whose pixels are drawn from N(0, 1) as the model normalises them; they may leave [0, 1]."""
    z = torch.randn(n, *obs.image_shape, generator=rng, dtype=torch.float64).to(obs.device, obs.dtype)
    return obs.model.mean + obs.model.std * z


def surrogate(obs: Observation, n: int, rng: torch.Generator) -> Tensor:
    """Images of the attacker's own data.

    Raises:
        WithheldError: there are none.
    """
    return need_auxiliary(obs, "this rule").draw(n, rng)[0]


def need_auxiliary(obs: Observation, rule: str) -> Any:
    """The attacker's own data.

    Raises:
        WithheldError: there are none.
    """
    if obs.auxiliary is None:
        raise WithheldError(
            f"{rule} needs auxiliary data; observe with ThreatModel(has_auxiliary_data=True), or use a rule that"
            " draws noise, such as labels.ZeroShot()"
        )
    return obs.auxiliary


def by_class(obs: Observation, rule: str, each: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """About `each` auxiliary images of every class: the images [N, C, H, W] and of whom they are, [K, N], rows of
    which sum to 1, so that a product with it is a mean over a class.

    Raises:
        WithheldError: there are no auxiliary data.
        NotApplicableError: a class is missing in them, or they have others than the model.
    """
    images, y = need_auxiliary(obs, rule).draw(each * obs.num_classes, rng)
    if (most := int(y.max())) >= obs.num_classes:
        raise NotApplicableError(
            f"{rule} needs auxiliary images of the model's {obs.num_classes} classes, and there is one of class {most};"
            " give others, or use labels.ZeroShot()"
        )
    of = nn.functional.one_hot(y.to(obs.device), obs.num_classes).T.double()
    if missing := (of.sum(1) == 0).nonzero().flatten().tolist():
        raise NotApplicableError(
            f"{rule} needs auxiliary images of every class, and of {len(y)} there are none of class"
            f" {', '.join(map(str, missing[:5]))}; draw more, or use labels.ZeroShot()"
        )
    return images, of / of.sum(1, keepdim=True)


def of_images(obs: Observation, images: Tensor) -> Labels:
    """Which label each image of a batch has that is known [B, C, H, W]; labels that are known are put in order.

    The last layer's gradient of one step is 1/B sum_i (p_i - y_i) h_i^T, of which all but the labels y_i is known: it
    is solved for them by least squares.

    Raises:
        NotApplicableError: the model does not end in a dense layer.
    """
    gW, gb = last_layer(obs)
    layers, logits = dense_layers(obs.model, images)
    name = logit_layer(obs.model, obs.image_shape).weight
    h = next(layer.input for layer in layers if layer.weight == name)
    if gb is not None:
        gW, h = torch.cat([gW, gb[:, None]], 1), torch.cat([h, torch.ones_like(h[:, :1])], 1)
    p, h, gW = logits.softmax(1).double(), h.double(), gW.double()
    ys = torch.linalg.lstsq(h.T, (p.T @ h - len(images) * gW).T).solution
    if obs.labels is None or len(obs.labels) != len(images):
        return ys.argmax(1)
    from scipy.optimize import linear_sum_assignment  # slow to import

    return obs.labels[linear_sum_assignment(-ys[:, obs.labels].detach().cpu().numpy())[1]]


def loss_scale(obs: Observation) -> float | None:
    """By what number the client multiplies the mean cross-entropy; None where the last layer does not tell.

    Row k of dL/dW over entry k of dL/db is a mean of the features h, weighted to class k, whatever the scale, so
    that p_k = softmax(W h_k + b) is known without the images. Then dL/db = sum_j m_j (p_j - e_j), where m_j is
    scale x n_j / B for the n_j images of class j and zero for a class that is absent: a least-squares problem whose
    solution sums to the scale. It is exact for one image. It can't be solved where no class is absent.
    """
    try:
        gW, gb = last_layer(obs)
        layer = logit_layer(obs.model, obs.image_shape)
    except NotApplicableError:
        return None
    own = dict(obs.model.named_parameters())
    if gb is None or layer.weight is None or layer.bias is None or len(own[layer.weight]) != len(gb):
        return None
    present = (gb < 0).nonzero().squeeze(1)
    if not 0 < len(present) < len(gb):
        return None
    W, b, rows, sums = (t.detach().double() for t in (own[layer.weight], own[layer.bias], gW, gb))
    h = rows[present] / sums[present, None]
    p = (h @ W.T + b).softmax(1)
    one_hot = nn.functional.one_hot(present, len(sums)).double()
    found = torch.linalg.lstsq((p - one_hot).T, sums[:, None])
    return found.solution.sum().item()
