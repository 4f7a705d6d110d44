"""How far the gradient of one guess is from the observed one. A Distance maps (g', g) to a scalar."""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib.types import Gradient

Scalar = Float[Tensor, ""]
Distance = Callable[[Gradient, Gradient], Scalar]

TINY = 1e-37
"""A smaller squared norm counts as zero."""

JOINED_ENTRIES = 2**16
"""Tensors with fewer entries are joined to one, which saves calls; a copy of larger ones costs more than a call."""


def pieces(simulated: Gradient, observed: Gradient) -> list[tuple[Float[Tensor, " n"], Float[Tensor, " n"]]]:
    """Both gradients as few vectors: g' cut in pieces, and the same of g."""
    parts, small = [], []
    for name, g in simulated.items():
        if g.numel() < JOINED_ENTRIES:
            small.append(name)
        else:
            parts.append((g.reshape(-1), observed[name].reshape(-1)))
    if small:
        mine, theirs = (torch.cat([gradient[n].reshape(-1) for n in small]) for gradient in (simulated, observed))
        parts.append((mine, theirs))
    return parts


def squared_l2(simulated: Gradient, observed: Gradient) -> Scalar:
    """D = sum_i (g'_i - g_i)^2 over all parameters (Zhu et al., NeurIPS 2019)."""
    return torch.stack([(a - b).square().sum() for a, b in pieces(simulated, observed)]).sum()


def layer_l2(simulated: Gradient, observed: Gradient) -> Scalar:
    """D = sum_l |g'_l - g_l|_2, the norms of the parameters' differences (Yin et al., CVPR 2021)."""
    return torch.stack([norm(simulated[name] - g) for name, g in observed.items()]).sum()


def norm(d: Tensor) -> Scalar:
    """|d|_2 over all entries, with the derivative 0 where d is 0."""
    square = d.square().sum()
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def cosine(simulated: Gradient, observed: Gradient) -> Scalar:
    """D = 1 - <g', g> / (|g'| |g|), over all parameters at once, in [0, 2] (Geiping et al., NeurIPS 2020).

    A gradient of norm zero has no direction; it counts as orthogonal, D = 1.
    """
    a, b = zip(*pieces(simulated, observed), strict=True)
    return _Cosine.apply(*a, *b)[0]


class _Cosine(torch.autograd.Function):
    """D of vectors a_1, ..., a_n [(R,) .] and b_1, ..., b_n [.], in as few passes over them as there can be.

    dD/da = a <a, b> / (|a|^3 |b|) - b / (|a| |b|). The sums are of products, since BLAS's dot in float32 loses four
    digits over some million entries; D near 0 is all cancellation. Under vmap the rows of a are computed as one.
    """

    @staticmethod
    def forward(*both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = both[: len(both) // 2], both[len(both) // 2 :]
        ab = reduce(add, ((u * v).sum(-1) for u, v in zip(a, b, strict=True)))
        aa, bb = (reduce(add, (u.square().sum(-1) for u in vector)).clamp_min_(TINY) for vector in (a, b))
        scale = aa.rsqrt() * bb.rsqrt()
        return 1 - ab * scale, scale, ab * scale / aa

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, scale, shrink = output
        ctx.save_for_backward(*inputs, scale, shrink)
        ctx.mark_non_differentiable(scale, shrink)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        *both, scale, shrink = ctx.saved_tensors
        a, b = both[: len(both) // 2], both[len(both) // 2 :]
        towards, along = (-grad * scale).unsqueeze(-1), (grad * shrink).unsqueeze(-1)
        return *(torch.addcmul(u * along, v, towards) for u, v in zip(a, b, strict=True)), *(None for _ in b)

    @staticmethod
    def vmap(info, in_dims, *both):
        rows = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(both, in_dims, strict=True)]
        return _Cosine.apply(*rows), (0, 0, 0)
