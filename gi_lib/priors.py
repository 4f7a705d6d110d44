"""What natural images look like: R(x), a scalar for one guess x [B, C, H, W]."""

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gi_lib.copies import bn_statistics, drawing, forward, input_of
from gi_lib.matching import norm
from gi_lib.types import Classifier, Images, Labels, Statistics

Scalar = Float[Tensor, ""]
Prior = Callable[[Tensor], Tensor]
"""(one guess [B, C, H, W]) -> a scalar."""


def total_variation(x: Images) -> Scalar:
    """TV(x) = mean |x[i+1, j] - x[i, j]| + mean |x[i, j+1] - x[i, j]| (anisotropic; Rudin, Osher, Fatemi, 1992).

    Each mean runs over images, channels and differences, so that the value does not grow with the image. TV is
    homogeneous: TV(x) = <x, s> for its subgradient s, which takes half the time by hand that it takes by autograd.
    """
    with torch.no_grad():
        s = torch.zeros_like(x)
        for axis in (-2, -1):
            step = x.diff(dim=axis).sign_()
            n, weight = x.shape[axis] - 1, 1 / max(1, step.numel())
            s.narrow(axis, 1, n).add_(step, alpha=weight)
            s.narrow(axis, 0, n).sub_(step, alpha=weight)
    return (x * s).sum()


def isotropic_total_variation(x: Images) -> Scalar:
    """Mean over pixels and channels of sqrt(dx^2 + dy^2), the length of the step to the right and down.

    Across the last column or row the step is 0. Where both are 0, so is the derivative.
    """
    right, down = x.diff(dim=-1, append=x[..., -1:]), x.diff(dim=-2, append=x[..., -1:, :])
    square = right.square() + down.square()
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0).mean()


def colour_total_variation(x: Images) -> Scalar:
    """The isotropic total variation of the channels and of their differences: R - G, R - B and G - B of colours.

    Where two channels have an edge together, it counts in them and not in their difference: edges of brightness are
    cheaper than edges of colour ("double opponents", public framework breaching). A single channel has no difference.
    """
    opponents = [a - b for a, b in itertools.combinations(x.split(1, dim=1), 2)]
    return isotropic_total_variation(torch.cat([x, *opponents], dim=1))


def feature_distance(model: Classifier, x: Images, weight: str, target: Float[Tensor, "B N"]) -> Scalar:
    """Mean of (h(x) - target)^2, where h(x) [B, N] is what the dense layer of this weight is given."""
    return (input_of(model, weight, x) - target).square().mean()


def l2(x: Images) -> Scalar:
    """Mean of x^2 over all pixels."""
    return x.square().mean()


def statistics_distance(model: Classifier, x: Images, target: Statistics | None, first: Sequence[float] = ()) -> Scalar:
    """sum_l |mu_l(x) - mu_l|_2 + |var_l(x) - var_l|_2 over the inputs of the batch norms (Yin et al., CVPR 2021).

    Args:
        first: weights of the first layers; those of all others are 1.
    """
    assert target is not None
    return statistics_gap(bn_statistics(model, x), target, first)


def statistics_gap(found: Statistics, goal: Statistics, first: Sequence[float] = ()) -> Scalar:
    """The same of statistics that were found, over the layers of the goal."""
    weights = itertools.chain(first, itertools.repeat(1.0))
    apart = [
        weight * norm(mine - theirs)
        for (name, pair), weight in zip(goal.items(), weights, strict=False)
        for mine, theirs in zip(found[name], pair, strict=True)
    ]
    return torch.stack(apart).sum()


def label_distance(model: Classifier, x: Images, y: Labels) -> Scalar:
    """Mean over the batch of |softmax(f(x)) - e_y|^2, in [0, 2]: whether the model believes in the labels y.

    The label term of Wei et al. (ESORICS 2020). The private image itself has it at 0 only if the model is sure of it.
    """
    with drawing(model, None):
        p = forward(model, x).softmax(1)
    return (p - nn.functional.one_hot(y, p.shape[1])).square().sum(1).mean()
