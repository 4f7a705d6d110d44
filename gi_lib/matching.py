"""How far a simulated gradient is from the observed one.

A Distance maps (g', g) to [R]: every entry of g' has a leading axis R; those of g have one too, or none, when all
rows are compared to the same gradient.
"""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib.types import Gradient, Rows

Distance = Callable[[Gradient, Gradient], Rows]

TINY = 1e-37
"""A smaller squared norm counts as zero."""

JOINED_ENTRIES = 2**16
"""Tensors with fewer entries are joined to one, which saves calls; a copy of larger ones costs more than a call."""


def pieces(simulated: Gradient, observed: Gradient) -> list[tuple[Float[Tensor, "R n"], Float[Tensor, "Q n"]]]:
    """Both gradients as few matrices with one row a guess: g' cut in pieces, and the same of g, Q = R or 1."""
    rows = {name: g.reshape(len(g), -1) for name, g in simulated.items()}
    own = all(observed[name].ndim == g.ndim for name, g in simulated.items())
    targets = {name: observed[name].reshape(len(a) if own else 1, -1) for name, a in rows.items()}
    small = [name for name, a in rows.items() if a.shape[1] < JOINED_ENTRIES]
    parts = [(a, targets[name]) for name, a in rows.items() if a.shape[1] >= JOINED_ENTRIES]
    if small:
        parts.append((torch.cat([rows[name] for name in small], 1), torch.cat([targets[name] for name in small], 1)))
    return parts


def squared_l2(simulated: Gradient, observed: Gradient) -> Rows:
    """D = sum_i (g'_i - g_i)^2 over all parameters (Zhu et al., NeurIPS 2019)."""
    return torch.stack([(a - b).square().sum(1) for a, b in pieces(simulated, observed)]).sum(0)


def cosine(simulated: Gradient, observed: Gradient) -> Rows:
    """D = 1 - <g', g> / (|g'| |g|), over all parameters at once, in [0, 2] (Geiping et al., NeurIPS 2020).

    A gradient of norm zero has no direction; it counts as orthogonal, D = 1.
    """
    a, b = zip(*pieces(simulated, observed), strict=True)
    return _Cosine.apply(*a, *b)


class _Cosine(torch.autograd.Function):
    """D of pieces a_1, ..., a_n [R, .] and b_1, ..., b_n [Q, .], in as few passes over them as there can be.

    dD/da = a <a, b> / (|a|^3 |b|) - b / (|a| |b|). The sums are of products, since BLAS's dot in float32 loses four
    digits over some million entries; D near 0 is all cancellation.
    """

    @staticmethod
    def forward(ctx, *both):
        a, b = both[: len(both) // 2], both[len(both) // 2 :]
        ab = reduce(add, ((u * v).sum(1) for u, v in zip(a, b, strict=True)))
        aa, bb = (reduce(add, (u.square().sum(1) for u in vector)).clamp_min_(TINY) for vector in (a, b))
        scale = aa.rsqrt() * bb.rsqrt()
        ctx.save_for_backward(*both, scale, ab * scale / aa)
        return 1 - ab * scale

    @staticmethod
    def backward(ctx, grad):
        *both, scale, shrink = ctx.saved_tensors
        a, b = both[: len(both) // 2], both[len(both) // 2 :]
        towards, along = (-grad * scale).unsqueeze(1), (grad * shrink).unsqueeze(1)
        return *(torch.addcmul(u * along, v, towards) for u, v in zip(a, b, strict=True)), *(None for _ in b)
