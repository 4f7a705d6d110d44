"""How far the gradient of one guess is from the observed one. A Distance maps (g', g) to a scalar."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib.execution import in_functorch
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


def l1(simulated: Gradient, observed: Gradient) -> Scalar:
    """D = sum_i |g'_i - g_i| over all parameters."""
    return torch.stack([(a - b).abs().sum() for a, b in pieces(simulated, observed)]).sum()


def layer_l2(simulated: Gradient, observed: Gradient) -> Scalar:
    """D = sum_l |g'_l - g_l|_2, the norms of the parameters' differences (Yin et al., CVPR 2021)."""
    return torch.stack([norm(simulated[name] - g) for name, g in observed.items()]).sum()


def layers(gradient: Gradient) -> list[list[str]]:
    """The names of each layer's parameters, the first layer first."""
    found: dict[str, list[str]] = {}
    for name in gradient:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return list(found.values())


def fading_l2(simulated: Gradient, observed: Gradient) -> Scalar:
    """D = sum_l e^(1 - l) |g'_l - g_l|^2 over the layers l = 1, 2, ... (code of Dimitrov et al., TMLR 2022)."""
    each = [
        math.exp(1 - l) * torch.stack([(simulated[name] - observed[name]).square().sum() for name in names]).sum()
        for l, names in enumerate(layers(observed), start=1)
    ]
    return torch.stack(each).sum()


def layer_cosine(simulated: Gradient, observed: Gradient, last: float = 1.0) -> Scalar:
    """D = sum_l w_l (1 - cos(g'_l, g_l)) / sum_l w_l, in [0, 2], of the layers l one by one (Xu et al., SRDS 2022).

    The weights rise in equal steps from 1 at the first layer to `last` at the last one.
    """
    names = layers(observed)
    weights = [1 + (last - 1) * l / max(1, len(names) - 1) for l in range(len(names))]
    each = [
        w * cosine({n: simulated[n] for n in own}, {n: observed[n] for n in own})
        for w, own in zip(weights, names, strict=True)
    ]
    return torch.stack(each).sum() / sum(weights)


def gaussian_kernel(simulated: Gradient, observed: Gradient, width: float | Scalar = 1.0) -> Scalar:
    """D = sum_l 1 - exp(-mean_i (g'_li - g_li)^2 / (width^2 Var(g_l))), in [0, L] (Wang et al., arXiv:2009.06228).

    Each of the L parameters is measured in units of the spread of its own observed gradient: layers whose gradients
    are a thousand times smaller count as much as others. Far from g the exponential is 0, and so is the derivative;
    a larger `width`, a number or a tensor on the device, reaches further. Where the spread is 0, as that of a single
    number is, the mean of g_l^2 takes its place.
    """
    near = []
    for name, g in observed.items():
        spread = g.var(unbiased=False)
        spread = torch.where(spread > 0, spread, g.square().mean()).clamp_min(TINY)
        near.append(((simulated[name] - g).square().mean() / (spread * width**2)).neg().exp())
    return len(near) - torch.stack(near).sum()


def norm(d: Tensor) -> Scalar:
    """|d|_2 over all entries, with the derivative 0 where d is 0."""
    square = d.square().sum()
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def cosine(simulated: Gradient, observed: Gradient) -> Scalar:
    """D = 1 - <g', g> / (|g'| |g|), over all parameters at once, in [0, 2] (Geiping et al., NeurIPS 2020).

    A gradient of norm zero has no direction; it counts as orthogonal, D = 1.
    """
    a, b = zip(*pieces(simulated, observed), strict=True)
    if not in_functorch():
        return _Cosine.apply(*a, *b)
    ab, scale, _ = _cosine(a, b)
    return 1 - ab * scale


def cosine_on_support(simulated: Gradient, observed: Gradient) -> Scalar:
    """`cosine` over the entries of which the observed gradient is not zero: of an update that was pruned, the others
    say nothing."""
    return cosine({name: torch.where(g != 0, simulated[name], 0) for name, g in observed.items()}, observed)


Vectors = Sequence[Float[Tensor, " _"]]


def _cosine(a: Vectors, b: Vectors) -> tuple[Scalar, Scalar, Scalar]:
    """<a, b>, 1 / (|a| |b|) and |a|^2. The sums are of products, since BLAS's dot in float32 loses four digits over
    some million entries, and D near 0 is all cancellation."""
    ab = reduce(add, ((u * v).sum() for u, v in zip(a, b, strict=True)))
    aa, bb = (reduce(add, (u.square().sum() for u in vector)).clamp_min(TINY) for vector in (a, b))
    return ab, aa.rsqrt() * bb.rsqrt(), aa


class _Cosine(torch.autograd.Function):
    """D with its gradient dD/da = a <a, b> / (|a|^3 |b|) - b / (|a| |b|) by hand, in fewer passes over long vectors.

    Stacked rows are short, and there the calls cost more than the passes: under vmap autograd is faster than this.
    """

    @staticmethod
    def forward(ctx: Any, *both: Tensor) -> Tensor:
        ab, scale, aa = _cosine(both[: len(both) // 2], both[len(both) // 2 :])
        ctx.save_for_backward(*both, scale, ab * scale / aa)
        return 1 - ab * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *both, scale, shrink = ctx.saved_tensors
        a, b = both[: len(both) // 2], both[len(both) // 2 :]
        towards, along = -grad * scale, grad * shrink
        return *(torch.addcmul(u * along, v, towards) for u, v in zip(a, b, strict=True)), *(None for _ in b)
