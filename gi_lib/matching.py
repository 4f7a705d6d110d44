"""How far a simulated gradient is from the observed one.

A Distance maps (g', g) to [R]: every entry of g' has a leading axis R, no entry of g has one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gi_lib.types import Gradient, Rows

Distance = Callable[[Gradient, Gradient], Rows]

TINY = 1e-30
"""A smaller norm counts as zero; no gradient in float32 comes near it."""


def flatten(gradient: Gradient) -> Float[Tensor, "R P"]:
    """All entries of a stacked gradient in one vector a row."""
    return torch.cat([g.flatten(1) for g in gradient.values()], dim=1)


def squared_l2(simulated: Gradient, observed: Gradient) -> Rows:
    """D = sum_i (g'_i - g_i)^2 over all parameters (Zhu et al., NeurIPS 2019)."""
    return (flatten(simulated) - _vector(simulated, observed)).square().sum(1)


def cosine(simulated: Gradient, observed: Gradient) -> Rows:
    """D = 1 - <g', g> / (|g'| |g|), over all parameters at once, in [0, 2] (Geiping et al., NeurIPS 2020).

    A gradient of norm zero has no direction; it counts as orthogonal, D = 1.
    """
    a, b = (F.normalize(v, dim=1, eps=TINY) for v in (flatten(simulated), _vector(simulated, observed)))
    return 1 - (a * b).sum(1)


def _vector(simulated: Gradient, observed: Gradient) -> Float[Tensor, "1 P"]:
    return flatten({name: observed[name].unsqueeze(0) for name in simulated})
