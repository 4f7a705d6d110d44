"""What natural images look like: R(x), a scalar for one guess x [B, C, H, W]."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gi_lib.copies import bn_statistics, drawing, forward
from gi_lib.matching import norm
from gi_lib.types import Classifier, Images, Labels, Statistics

Scalar = Float[Tensor, ""]


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


def l2(x: Images) -> Scalar:
    """Mean of x^2 over all pixels."""
    return x.square().mean()


def statistics_distance(model: Classifier, x: Images, target: Statistics | None) -> Scalar:
    """sum_l |mu_l(x) - mu_l|_2 + |var_l(x) - var_l|_2 over the inputs of the batch norms (Yin et al., CVPR 2021)."""
    assert target is not None
    found = bn_statistics(model, x)
    apart = [a - b for name, goal in target.items() for a, b in zip(found[name], goal, strict=True)]
    return torch.stack([norm(d) for d in apart]).sum()


def label_distance(model: Classifier, x: Images, y: Labels) -> Scalar:
    """Mean over the batch of |softmax(f(x)) - e_y|^2, in [0, 2]: whether the model believes in the labels y.

    The label term of Wei et al. (ESORICS 2020). The private image itself has it at 0 only if the model is sure of it.
    """
    with drawing(model, None):
        p = forward(model, x).softmax(1)
    return (p - nn.functional.one_hot(y, p.shape[1])).square().sum(1).mean()
