"""Rules that look at signs: which class the gradient pushes up."""

import torch
from torch import nn

from gi_lib.labels.layer import last_layer, need_batch_size, need_bias
from gi_lib.types import Labels, NotApplicableError, Observation, Presence


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
    need_one(obs, "idlg")
    weight, bias = last_layer(obs)
    if bias is not None:
        score = bias
    elif obs.num_classes == 2:
        score = weight.sum(1)
    else:
        rows = nn.functional.normalize(weight, dim=1)
        score = (rows @ rows.T).sum(1)
    if score.min() >= 0:
        raise NotApplicableError(SURE)
    return score.argmin().reshape(1)


def row_sum(obs: Observation) -> Labels:
    """The label of one image as the public code of iDLG finds it: the row of dL/dW with the smallest sum.

    The sum of row k is (p_k - [k = y]) sum_d h_d, so that the features' sum must be positive (ReLU, sigmoid).

    Raises:
        NotApplicableError: the batch has more than one image, or no sum is negative.
        WithheldError: the batch size is withheld.
    """
    need_one(obs, "row_sum")
    score = last_layer(obs)[0].sum(1)
    if score.min() >= 0:
        raise NotApplicableError(SURE)
    return score.argmin().reshape(1)


def column_min(obs: Observation) -> Labels:
    """The B labels of a batch without repeats, in ascending order (Yin et al., CVPR 2021, arXiv:2104.07586).

    Non-negative features make dL/dW_k negative in some column only where class k is present: the B rows with
    the smallest minimum are taken. Repeated labels are missed, and signed features break the rule.

    Raises:
        NotApplicableError: more images than classes, so that a label must repeat.
        WithheldError: the batch size is withheld.
    """
    size = need_batch_size(obs, "column_min")
    if size > obs.num_classes:
        raise NotApplicableError(
            f"column_min finds no repeats, but {size} images of {obs.num_classes} classes must; use labels.infer,"
            " whose rules count them"
        )
    weight, _ = last_layer(obs)
    return torch.topk(weight.min(1).values, size, largest=False).indices.sort().values


def negative_bias(obs: Observation) -> Presence:
    """Classes whose dL/db_k is negative: each of them is in the batch for certain, and others may be.

    dL/db_k = mean_i p_ik - n_k / B, and a mean of probabilities is not negative.

    Raises:
        NotApplicableError: the last layer has no bias.
    """
    _, gb = need_bias(obs, "negative_bias", "labels.negative_column, where the features are not negative")
    return gb < 0


def negative_row_sum(obs: Observation) -> Presence:
    """Classes whose row of dL/dW has a negative sum: iDLG's public code, read for a batch (as iLRG's does)."""
    return last_layer(obs)[0].sum(1) < 0


def negative_column(obs: Observation) -> Presence:
    """Classes whose row of dL/dW has a negative entry: the column minimum without the batch size (as iLRG's code).

    With features that are not negative it can't name a class that is absent; with signed ones it names all.
    """
    return last_layer(obs)[0].min(1).values < 0


SURE = (
    "no entry of the last layer's gradient is negative, so that it says nothing of the label: the network is sure of"
    " it, and the rest is rounding"
)


def need_one(obs: Observation, rule: str) -> None:
    """Raise unless the batch is one image."""
    if need_batch_size(obs, rule) != 1:
        raise NotApplicableError(
            f"{rule} infers one label from one image, got batch_size={obs.batch_size}; use labels.infer for a batch"
        )
