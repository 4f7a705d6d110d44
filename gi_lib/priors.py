"""What natural images look like: R(x), one value a row for x [R, B, C, H, W]."""

from jaxtyping import Float
from torch import Tensor

from gi_lib.types import Rows

Stack = Float[Tensor, "R B C H W"]


def total_variation(x: Stack) -> Rows:
    """TV(x) = mean |x[i+1, j] - x[i, j]| + mean |x[i, j+1] - x[i, j]| (anisotropic; Rudin, Osher, Fatemi, 1992).

    Each mean runs over images, channels and differences, so that the value does not grow with the image.
    """
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1).mean(1)
    across = (x[..., :, 1:] - x[..., :, :-1]).abs().flatten(1).mean(1)
    return down + across


def l2(x: Stack) -> Rows:
    """Mean of x^2 over all pixels."""
    return x.square().flatten(1).mean(1)
