"""Labels from the gradient of the last layer.

One identity carries all of it. The last layer is u = W h + b with features h, p = softmax(u), and the loss is the mean
cross-entropy over B images of K classes. Then dL/db = mean_i (p_i - y_i) with y_i one-hot, and therefore the numbers
of images n [K] of the classes are

    n = B (mean_i p_i - dL/db),

exactly. All is known but the mean of the private images' probabilities: a rule that counts is an estimate of it, and a
rule that looks at signs uses that it is not negative. dL/dW = mean_i (p_i - y_i) h_i^T says the same of every feature.

A rule takes an Observation, and its return type says what it finds: `Labels` [B], a multiset in ascending order
(`counts` makes n of it), or `Presence` [K], which classes are there. What a rule needs beyond the update it takes from
the Observation, and says in one sentence where it can't work. Rules that draw have a seed among their settings.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gi_lib.labels.counts import ILRG, RLU, CountRule, ZeroShot, ZeroShotWeights, apportion, of_counts
from gi_lib.labels.greedy import LLBG, LLGPlus, LLGStar, bias_greedy, llg
from gi_lib.labels.layer import by_class, last_layer, loss_scale, noise, of_images, surrogate
from gi_lib.labels.signs import (
    column_min,
    idlg,
    negative_bias,
    negative_column,
    negative_row_sum,
    row_sum,
)
from gi_lib.labels.spaces import Soft, rlg, separable, soft_label, span
from gi_lib.types import Counts, Labels, NotApplicableError, Observation, Presence

__all__ = [
    "ILRG",
    "LLBG",
    "PRESENCE",
    "RLU",
    "RULES",
    "CountRule",
    "LLGPlus",
    "LLGStar",
    "LabelRule",
    "Soft",
    "ZeroShot",
    "ZeroShotWeights",
    "apportion",
    "bias_greedy",
    "chosen",
    "column_min",
    "counts",
    "idlg",
    "infer",
    "known",
    "last_layer",
    "llg",
    "loss_scale",
    "negative_bias",
    "negative_column",
    "negative_row_sum",
    "noise",
    "of_counts",
    "of_images",
    "rlg",
    "row_sum",
    "separable",
    "soft_label",
    "span",
    "surrogate",
]

revision = 1
"""Raised when what `infer` finds for one image changes, so that cases with unknown labels run again."""
batch_revision = 2
"""The same for a batch: from 2 on, repeats are counted."""

LabelRule = Callable[[Observation], Tensor]
"""Observation -> labels [B] int64, in ascending order."""


def known(obs: Observation) -> Labels:
    """The labels that the threat model grants.

    Raises:
        NotApplicableError: it grants none.
    """
    if obs.labels is None:
        raise NotApplicableError("the labels are not known; observe with ThreatModel(knows_labels=True)")
    return obs.labels


RULES: dict[str, LabelRule] = {
    "known": known,
    "iDLG": idlg,
    "iDLG, row sum": row_sum,
    "column minimum": column_min,
    "LLG": llg,
    "LLG*": LLGStar(),
    "LLG+": LLGPlus(),
    "bias greedy": bias_greedy,
    "LLBG": LLBG(),
    "zero-shot": ZeroShot(),
    "zero-shot, weights": ZeroShotWeights(),
    "zero-shot, own images": ZeroShot(inputs=surrogate),
    "zero-shot, weights, own images": ZeroShotWeights(inputs=surrogate),
    "iLRG": ILRG(),
    "RLU": RLU(),
}
"""By name, the rules that find labels, with the settings of their papers."""

PRESENCE: dict[str, Callable[[Observation], Presence]] = {
    "iDLG, row sums": negative_row_sum,
    "negative bias": negative_bias,
    "negative column": negative_column,
    "RLG": rlg,
}
"""By name, the rules that find which classes are there."""


def counts(labels: Labels, num_classes: int) -> Counts:
    """n [K], how often each class is among the labels."""
    return torch.bincount(labels, minlength=num_classes)


def chosen(obs: Observation) -> str:
    """The name in RULES of the rule that `infer` takes: of those that the Observation grants the best, as measured.

    Labels that are known; for one image the sign rule, which is exact. For a batch, repeats included: RLU with
    auxiliary data of all classes. Without, and with fewer images than classes, a greedy rule, which reads signs and so
    holds of a trained network too; with more the signs fail, and zero-shot counts are taken, which lead on untrained
    networks. Each by the bias, or without one by the weights. Where the client's steps are withheld nothing can be
    counted, and the column minimum is left.
    """
    if obs.labels is not None:
        return "known"
    if obs.batch_size == 1:
        return "iDLG"
    if obs.batch_size is None or obs.client is None:
        return "column minimum"
    few, own = obs.batch_size < obs.num_classes, obs.auxiliary is not None and _serves(obs)
    if last_layer(obs)[1] is not None:
        return "RLU" if own else "bias greedy" if few else "zero-shot"
    return "LLG" if few else "zero-shot, weights, own images" if own else "zero-shot, weights"


def _serves(obs: Observation) -> bool:
    """Whether the auxiliary data have images of every class of the model, and of no other."""
    rule = RLU()
    try:
        by_class(obs, "RLU", rule.images, torch.Generator().manual_seed(rule.seed))
    except NotApplicableError:
        return False
    return True


def infer(obs: Observation) -> Labels:
    """The labels that are known, or those that the best rule finds that the Observation grants: see `chosen`.

    Raises:
        NotApplicableError: no rule applies; the sentence says why, and what to do.
        WithheldError: the threat model withholds the batch size.
    """
    return RULES[chosen(obs)](obs)
