"""Rules that look at the space which dL/dW spans."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib.labels.layer import head, last_layer
from gi_lib.labels.signs import need_one
from gi_lib.types import NotApplicableError, Observation, PerClass, Presence

TINY = 1e-6
"""Singular values below this share of the largest are rounding, in float32."""


def rlg(obs: Observation) -> Presence:
    """Which classes are in a batch (Dang et al., NeurIPS 2021, arXiv:2111.00556); repeats don't show.

    dL/dW = (1/B) sum_i (p_i - y_i) h_i^T, so that its columns span the vectors p_i - y_i where its rank r is B. Class k
    is there iff some vector of the span is negative at k alone: `separable`. Threat A; fewer images than classes and
    than features. The batch size is not needed.

    Departures: every class has its linear programme; the public code first sorts classes out by a perceptron, and
    looks at 199 rows.

    Raises:
        NotApplicableError: the rank is K - 1, which all p_i - y_i have together, or the number of features.
    """
    U = span(last_layer(obs)[0])
    K, D = last_layer(obs)[0].shape
    if U.shape[1] >= min(K - 1, D):
        raise NotApplicableError(
            f"rlg needs fewer images than classes and features, and the gradient has rank {U.shape[1]} with {K} classes"
            f" and {D} features, where every class can be separated; use labels.infer, whose rules count"
        )
    return separable(U)


def span(weight: Float[Tensor, "K D"]) -> Float[Tensor, "K r"]:
    """An orthonormal basis of what the columns of dL/dW span, in float64."""
    U, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    return U[:, s > TINY * s[0]]


def separable(U: Float[Tensor, "K r"]) -> Presence:
    """For each class k whether there is a q with (U q)_k <= -1 and (U q)_j >= 0 for all others: a linear programme."""
    import numpy as np  # as scipy, only where it is used
    from scipy.optimize import linprog

    basis = U.cpu().numpy()
    found = []
    for k in range(len(basis)):
        A, b = -basis.copy(), np.zeros(len(basis))
        A[k], b[k] = basis[k], -1
        q = linprog(np.zeros(basis.shape[1]), A_ub=A, b_ub=b, bounds=(None, None), method="highs")
        found.append(q.status == 0)
    return torch.tensor(found, device=U.device)


class Soft(NamedTuple):
    """What one image's last layer gives away.

    Args:
        label: the target [K], a distribution.
        features: the input of the last layer [D].
    """

    label: PerClass
    features: Tensor


def soft_label(obs: Observation) -> Soft:
    """The target of one image, also a smoothed or a mixed one, and its last features (Wang, Liang, He, ICLR 2024).

    dL/dW = (p - y) h^T has rank one, and dL/db = p - y: so h = dL/dW_k / dL/db_k for every k, p = softmax(W h + b) and
    y = p - dL/db. The rows are averaged with the weight of (dL/db_k)^2. Threat A.

    Departures: the paper searches the scale of h from the weights alone [from memory of it]; here the bias gives it.

    Raises:
        NotApplicableError: the batch has more than one image, the last layer has no bias, or its gradient is 0.
        WithheldError: the batch size is withheld.
    """
    need_one(obs, "soft_label")
    gW, gb = last_layer(obs)
    if gb is None:
        raise NotApplicableError(
            "soft_label takes the scale of the features from the bias of the last layer, which has none; of a hard"
            " label use labels.idlg"
        )
    gW, gb = gW.double(), gb.double()
    if not gb.any():
        raise NotApplicableError("the gradient of the last layer is 0: the network's output is the target itself")
    h = gb @ gW / gb.square().sum()
    W, b = head(obs)
    return Soft((W @ h + b).softmax(0) - gb, h)
