"""Labels from the gradient: Observation -> labels [B]."""

import torch
from torch import Tensor, nn

from gi_lib.types import Labels, NotApplicableError, Observation, WithheldError


def last_layer(obs: Observation) -> tuple[Tensor, Tensor | None]:
    """Gradients of the classifier's last dense layer: weight [K, N] and bias [K], or None without a bias.

    Raises:
        NotApplicableError: the model does not end in a dense layer of K outputs.
    """
    weights = [(name, g) for name, g in obs.gradient.items() if g.ndim == 2 and len(g) == obs.num_classes]
    if not weights:
        raise NotApplicableError(
            f"no dense layer with {obs.num_classes} outputs in the gradient; observe with"
            " ThreatModel(knows_labels=True)"
        )
    name, weight = weights[-1]
    bias = obs.gradient.get(name.removesuffix("weight") + "bias")
    return weight, bias


def idlg(obs: Observation) -> Labels:
    """The label of one image, exactly (Zhao et al., arXiv:2001.02610).

    With cross-entropy, dL/db_k = p_k - [k = y] is negative at the label alone. Without a bias, row k of dL/dW is
    (p_k - [k = y]) a, so that the label's row points against every other row. With two classes
    and no bias the two rows are opposite and the signs cannot tell them apart; the features must then be
    non-negative (ReLU, sigmoid), and the row with the negative sum is the label's.

    Raises:
        NotApplicableError: the batch has more than one image.
        WithheldError: the batch size is withheld.
    """
    if obs.batch_size is None:
        raise WithheldError("idlg needs the batch size; observe with ThreatModel(knows_batch_size=True)")
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
    return score.argmin().reshape(1)


def column_min(obs: Observation) -> Labels:
    """The B labels of a batch without repeats, in ascending order (Yin et al., CVPR 2021, arXiv:2104.07586).

    Non-negative features make dL/dW_k negative in some column only where class k is present: the B rows with
    the smallest minimum are taken. Repeated labels are missed, and signed features break the rule.

    Raises:
        NotApplicableError: more images than classes, so that a label must repeat.
        WithheldError: the batch size is withheld.
    """
    if obs.batch_size is None:
        raise WithheldError("column_min needs the batch size; observe with ThreatModel(knows_batch_size=True)")
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
