"""What natural images look like: R(x), one value a row for x [R, B, C, H, W]."""

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib.types import Rows

Stack = Float[Tensor, "R B C H W"]


def total_variation(x: Stack) -> Rows:
    """TV(x) = mean |x[i+1, j] - x[i, j]| + mean |x[i, j+1] - x[i, j]| (anisotropic; Rudin, Osher, Fatemi, 1992).

    Each mean runs over images, channels and differences, so that the value does not grow with the image. TV is
    homogeneous: TV(x) = <x, s> for its subgradient s, which takes half the time by hand that it takes by autograd.
    """
    with torch.no_grad():
        s = torch.zeros_like(x)
        for axis in (-2, -1):
            step = x.diff(dim=axis).sign_()
            n, weight = x.shape[axis] - 1, len(x) / step.numel()
            s.narrow(axis, 1, n).add_(step, alpha=weight)
            s.narrow(axis, 0, n).sub_(step, alpha=weight)
    return (x * s).flatten(1).sum(1)


def l2(x: Stack) -> Rows:
    """Mean of x^2 over all pixels."""
    return x.square().flatten(1).mean(1)
