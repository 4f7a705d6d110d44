"""Labels from the gradient: Observation -> labels [B].

With the cross-entropy, dL/du_k = p_k - [k = y] for the logits u of one image and p = softmax(u).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gi_lib.models.layers import dense_layers, logit_layer
from gi_lib.types import Labels, NotApplicableError, Observation, WithheldError

revision = 1
"""Raised when what a rule finds changes, so that cases with unknown labels run again."""

LabelRule = Callable[[Observation], Tensor]
"""Observation -> labels [B] int64, in ascending order."""


def last_layer(obs: Observation) -> tuple[Tensor, Tensor | None]:
    """Gradients of the dense layer that makes the logits: weight [K, N] and bias [K], or None without a bias.

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


def idlg(obs: Observation) -> Labels:
    """The label of one image, exactly (Zhao et al., arXiv:2001.02610).

    dL/db_k = p_k - [k = y] is negative at the label alone. Without a bias, row k of dL/dW is (p_k - [k = y]) a, so
    that the label's row points against every other row. With two classes and no bias the two rows are opposite and
    the signs cannot tell them apart; the features must then be non-negative (ReLU, sigmoid), and the row with the
    negative sum is the label's.

    Raises:
        NotApplicableError: the batch has more than one image, or no sign tells the label.
        WithheldError: the batch size is withheld.
    """
    _need_batch_size(obs, "idlg")
    if obs.batch_size != 1:
        raise NotApplicableError(
            f"idlg infers one label from one image, got batch_size={obs.batch_size}; use labels.column_min for a batch"
        )
    weight, bias = last_layer(obs)
    if bias is not None:
        score = bias
    elif obs.num_classes == 2:
        score = weight.sum(1)
    else:
        rows = nn.functional.normalize(weight, dim=1)
        score = (rows @ rows.T).sum(1)
    if score.min() >= 0:
        raise NotApplicableError(
            "no entry of the last layer's gradient is negative, so that it says nothing of the label: the network is"
            " sure of it, and the rest is rounding"
        )
    return score.argmin().reshape(1)


def column_min(obs: Observation) -> Labels:
    """The B labels of a batch without repeats, in ascending order (Yin et al., CVPR 2021, arXiv:2104.07586).

    Non-negative features make dL/dW_k negative in some column only where class k is present: the B rows with
    the smallest minimum are taken. Repeated labels are missed, and signed features break the rule.

    Raises:
        NotApplicableError: more images than classes, so that a label must repeat.
        WithheldError: the batch size is withheld.
    """
    _need_batch_size(obs, "column_min")
    assert obs.batch_size is not None
    if obs.batch_size > obs.num_classes:
        raise NotApplicableError(
            f"column_min finds no repeats, but {obs.batch_size} images of {obs.num_classes} classes must"
        )
    weight, _ = last_layer(obs)
    return torch.topk(weight.min(1).values, obs.batch_size, largest=False).indices.sort().values


def infer(obs: Observation) -> Labels:
    """The labels that are known; else those of `idlg` for one image, and of `column_min` for a batch."""
    if obs.labels is not None:
        return obs.labels
    return idlg(obs) if obs.batch_size == 1 else column_min(obs)


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


def _need_batch_size(obs: Observation, rule: str) -> None:
    if obs.batch_size is None:
        raise WithheldError(f"{rule} needs the batch size; observe with ThreatModel(knows_batch_size=True)")


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
