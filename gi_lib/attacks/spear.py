"""SPEAR (Dimitrov, Baader, Mueller, Vechev, NeurIPS 2024, arXiv:2403.03945).

A dense layer Z = X W^T + b on a batch X [B, n] has the gradients

    gW = G^T X,    gb = G^T 1,    G = dL/dZ [B, m],

so that gW has rank B where B < min(m, n). Any factors gW = L R have L = G^T Q^-1 and
R = Q X for one unknown Q [B, B]. Behind a ReLU an entry of G is zero, exactly, where
Z <= 0: at about half of the neurons. If B - 1 rows of L belong to neurons that image i
leaves dark, then their null vector is column i of Q, up to a factor. So: draw B - 1
rows, take their null vector q, and keep it if L q has at least tau m zeros, where a
chance vector has B - 1. Of what was kept, B independent columns are chosen, the
sparsest first; Q diag(s) 1 = p for L p = gb gives the factors, and then
X = (Q diag(s))^-1 R.

    lambda = share of pairs (image, neuron) where [X W^T + b > 0] = [G != 0]

tells whether the choice is right: a column is exchanged for another while that grows,
and draws go on until it is 1. The probability that a draw shows a given image is about
2^-(B-1), for neurons that are lit half of the time.

Needs a dense layer on the pixels with a bias and a ReLU behind it, B < min(m, n), and
images that each leave more than tau m neurons dark. B is the rank; it need not be
known. Certified is what has lambda 1 and, in a simulated client, the observed gradient.

Departs from the paper, whose steps we know from its abstract and second hand, and whose
code we could not read: the factors are those of the SVD, rows of L have norm 1, dark
rows are dropped, a kept q becomes the null vector of all its zero rows, and the
tolerances follow from the gradient's precision, or from its singular value B + 1.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.models.layers import pixel_layer, zeros_follow
from gi_lib.search import certified
from gi_lib.types import (
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    function,
    real,
    whole,
)

SAME = 1e-6
"""1 - |cos| under which two candidates are one."""

MOST = 8
"""Candidates that are kept at most, times B: noise makes many."""

LOUD = 0.1
"""Noise, relative to the gradient, from which on no zero can be told."""

APART = 1e-3
"""How far a unit vector must lie from a span to count as independent of it."""


def dense_before_relu(obs: Observation) -> str | None:
    """A first layer that is dense on the pixels, has a bias and a ReLU behind it."""
    try:
        *names, _ = pixel_layer(obs.model, obs.image_shape)
    except NotApplicableError as error:
        return str(error)
    if frozen := [name for name in names if name not in obs.gradient]:
        return f"{', '.join(frozen)} of the first layer are frozen"
    if not zeros_follow(obs.model, names[0], obs.image_shape):
        return (
            "no ReLU follows the first layer, so that its errors have no zeros to tell"
            " the images apart by; use the cocktail party attack, or one that matches"
            " gradients"
        )
    return None


class Mixture(NamedTuple):
    """What the first layer shows: gW = L R, with all rows of L scaled to norm 1.

    Args:
        L: [m, B], of the neurons that have a gradient.
        R: [B, n], the pixels in the order of the image.
        p: [B], L p = gb.
        RW: R W^T [B, m].
        b: [m].
        dark: how many neurons have no gradient.
        eps: the precision of the gradient.
    """

    L: Tensor
    R: Tensor
    p: Tensor
    RW: Tensor
    b: Tensor
    dark: int
    eps: float

    @property
    def rank(self) -> int:
        return self.L.shape[1]


def mixture(obs: Observation) -> Mixture:
    """The factors of the first layer's gradient, in float64 on the CPU.

    Raises:
        NotApplicableError: the batch is as large as the layer is wide, or larger.
    """
    eps = torch.finfo(obs.dtype).eps
    weight, bias, pixels = pixel_layer(obs.model, obs.image_shape)
    named = dict(obs.model.named_parameters())
    W, gW = (t[weight].detach().double().cpu() for t in (named, obs.gradient))
    b, gb = (t[bias].detach().double().cpu() for t in (named, obs.gradient))
    W, gW = (t[:, pixels.cpu()] for t in (W, gW))
    U, S, Vh = torch.linalg.svd(gW, full_matrices=False)
    B = int((eps**0.75 * S[0] < S).sum())
    B = B if obs.batch_size is None else min(B, obs.batch_size)
    m, n = gW.shape
    if min(m, n) <= B:
        raise NotApplicableError(
            f"the gradient of the first layer, {m} x {n}, has rank {B}: the batch is as"
            " large as that or larger, or noise was added; take a wider layer or a"
            " smaller batch"
        )
    eps = max(eps, (S[B] / S[0]).item())  # noise, where B is known
    if eps > LOUD:
        raise NotApplicableError(
            f"singular value {B + 1} of the first layer's gradient is {eps:.2g} of the"
            " largest, where that of a batch is zero: noise hides the zeros that tell"
            " the images apart; use an attack that matches gradients"
        )
    if not B:
        raise NotApplicableError("the gradient of the first layer is zero")
    L, R = U[:, :B], S[:B, None] * Vh[:B]
    size = L.norm(dim=1)
    lit = size > eps**0.5 * size.max()
    L, b = L[lit] / size[lit, None], b[lit]
    p = torch.linalg.lstsq(L, (gb[lit] / size[lit])[:, None]).solution[:, 0]
    return Mixture(L, R, p, R @ W[lit].T, b, int((~lit).sum()), eps)


def null_vectors(A: Tensor) -> Tensor:
    """q [N, B], of norm 1, with A q = 0, for A [N, B - 1, B]."""
    return torch.linalg.qr(A.mT, mode="complete").Q[..., -1]


def alike(q: Tensor, others: Tensor, eps: float) -> Tensor:
    """Which of q [N, B] and of others [M, B] are the same, up to sign: [N, M]."""
    return (q @ others.T).abs() > 1 - max(SAME, eps)


def once(q: Tensor, eps: float) -> Tensor:
    """Those of q [N, B] that are not the same as one before them."""
    return q[~alike(q, q, eps).tril(-1).any(1)]


def sparsest(seen: Mixture, q: Tensor, tau: float) -> Tensor:
    """Those of q [N, B] with at least tau m zeros [K, B], the sparsest first, each one
    once, and each as the null vector of all its zero rows. Of too many, those stay that
    do not lie in the span of sparser ones.

    The square root of eps is zero for the null vector of B - 1 rows, which may be
    nearly dependent; that of many rows is known better.
    """
    zeros = (q @ seen.L.T).abs() < seen.eps**0.5  # [N, m]
    count = zeros.sum(1) + seen.dark
    order = count.argsort(descending=True)
    order = order[count[order] >= tau * (len(seen.L) + seen.dark)]
    q = once(q[order], seen.eps)
    if len(q) > MOST * seen.rank:  # mixtures of images that leave the same rows dark
        first = torch.zeros(len(q), dtype=torch.bool)
        first[independent(q)] = True
        q = q[first.int().argsort(descending=True, stable=True)[: MOST * seen.rank]]
    for power in 0.5, 0.6, 0.75:  # an entry that is small, but not zero, drops out
        zeros = (q @ seen.L.T).abs() < seen.eps**power
        null = [torch.linalg.svd(seen.L[z]).Vh[-1] for z in zeros]
        q = torch.stack(null) if null else q
    return once(q, seen.eps)


def independent(q: Tensor) -> Tensor:
    """The first rows of q [N, B] of which none lies in the span of those before it."""
    basis, chosen = q[:0], []
    for i, one in enumerate(q):
        left = one - (one @ basis.T) @ basis
        if left.norm() > APART and len(basis) < q.shape[1]:
            basis = torch.cat([basis, (left / left.norm())[None]])
            chosen.append(i)
    return torch.tensor(chosen, dtype=torch.long)


def agreement(seen: Mixture, Q: Tensor) -> tuple[Tensor, Tensor]:
    """(Q diag(s))^-1 and lambda, for columns Q [..., B, B]."""
    inverse = torch.linalg.inv_ex(Q).inverse
    inverse = inverse / (inverse @ seen.p)[..., None]
    lit = (seen.L @ Q).mT.abs() > seen.eps**0.75  # [..., B, m]
    above = inverse @ seen.RW + seen.b > 0
    return inverse, (lit == above).double().mean((-2, -1))


def chosen(seen: Mixture, q: Tensor) -> tuple[Tensor, float] | None:
    """Of candidates q [N, B] the best B: (Q diag(s))^-1 and lambda; None where there
    are not so many."""
    B, best = seen.rank, independent(q)
    if len(best) < B:
        return None
    Q, places = q[best].T, torch.arange(B)
    inverse, share = agreement(seen, Q)
    others = q[~torch.isin(torch.arange(len(q)), best)]
    while share < 1:
        better = None
        for other in others:
            swaps = Q.repeat(B, 1, 1)
            swaps[places, :, places] = other
            inverses, shares = agreement(seen, swaps)
            if shares.max() > share:
                i = shares.argmax()
                better, inverse, share = swaps[i], inverses[i], shares[i]
        if better is None:
            break
        Q = better
    return inverse, share.item()


def images_of(
    obs: Observation,
    seen: Mixture,
    found: tuple[Tensor, float],
    label_rule: labels.LabelRule,
) -> Reconstruction:
    """The images, with both certificates in the notes."""
    inverse, share = found
    x = (inverse @ seen.R).reshape(-1, *obs.image_shape).nan_to_num()
    mean, std = (t.double().cpu() for t in (obs.model.mean, obs.model.std))
    images = (mean + std * x).clamp(0, 1).to(obs.device, obs.dtype)
    if obs.batch_size is None:
        obs = dataclasses.replace(obs, batch_size=seen.rank)
    rec = certified(obs, images, label_rule)
    both = rec.notes["certified"] and share == 1
    return dataclasses.replace(
        rec, notes=rec.notes | {"certified": both, "lambda": share}
    )


def incomplete(found: int, rank: int, spent: str) -> ValueError:
    return ValueError(
        f"{found} of {rank} columns were found in {spent}, and an image needs them all;"
        " raise that number, or take a wider layer or a smaller batch"
    )


@dataclass(frozen=True)
class SPEAR:
    needs: ClassVar[Needs] = Needs(model=(dense_before_relu,))
    revision: ClassVar[int] = 2

    draws: int = 2_000_000  # at most
    chunk: int = 2000  # draws at once
    tau: float = 0.34  # above 1/4: where two columns vanish, so many zeros are chance
    label_rule: labels.LabelRule = labels.infer

    def __post_init__(self):
        whole(self, "draws", "chunk")
        real(self, "tau", above=0)
        function(self, "label_rule")

    def at_most(self, obs: Observation) -> int:
        """The rank of the gradient, which two equal images lower."""
        return mixture(obs).rank if obs.batch_size is None else obs.batch_size

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        seen = mixture(obs)
        B, q, drawn = seen.rank, seen.L[:0], 0
        found: tuple[Tensor, float] | None = None
        while drawn < self.draws and (found is None or found[1] < 1):
            drawn += self.chunk
            order = torch.rand(self.chunk, len(seen.L), generator=rng).argsort(1)
            new = sparsest(seen, null_vectors(seen.L[order[:, : B - 1]]), self.tau)
            more = sparsest(seen, torch.cat([q, new]), self.tau)
            if not alike(more, q, seen.eps).any(1).all():
                q, found = more, chosen(seen, more) or found
        if found is None:
            raise incomplete(len(independent(q)), B, f"{drawn} draws")
        rec = images_of(obs, seen, found, self.label_rule)
        return dataclasses.replace(rec, notes=rec.notes | {"draws": drawn})
