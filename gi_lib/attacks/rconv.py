"""R-CONV (Eltaras, Malluhi, Savino, Di Carlo, Qayyum, Qadir, 2024, arXiv:2406.04227).

The network is solved from its end, layer by layer. A layer z = W * x + b with F filters
and stride s has the weight gradient

    gW[f, c, t] = sum_p k[f, p] x[c, s p + t],     k = dL/dz,

at each tap t: once the errors k are known, a linear system A x[c] = gW[:, c] with one
matrix A for all channels c, the gradient constraints. The layer before has the error
W^T k times the derivative of its activation, which its output tells: for a ReLU it is
[x > 0], of the x that was just solved. So no activation has to be inverted. At the head
k = dL/db and x = gW[f] / k[f].

Where A leaves x open, the weight constraints W * x + b = z close it, as far as they
can. z is known where the activation has an inverse: behind a ReLU, where its output is
> 0. An inner layer that stays open is an error, since all before it would be wrong. If
the image does, the solution nearest to grey is returned; `notes` say how many of its
entries were fixed by which constraints, and how many are open.

Needs a chain of dense layers and convolutions, behind each a ReLU or an activation that
has an inverse, with a dense layer at its end. Batches need labels that differ.

Departs from the paper's code, which takes the first layer from weight constraints
alone, behind a LeakyReLU, and every other from as many gradient constraints as
unknowns: here each layer takes all gradient constraints by least squares, then what
weight constraints must add. Also ours: a head without a bias, and batches. Their errors
k_i = (p_i - y_i)/B span the column space of the head's gradient; least squares find the
basis in which p_i = softmax(W x_i + b) holds. Then A = [A_1 ... A_B], for [x_1; ...;
x_B]. R-CONV++ (arXiv:2509.18871) has a mini-batch form of its own; of that we know the
abstract alone.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from gi_lib import labels
from gi_lib.copies import deep_copy
from gi_lib.models.chain import Link, chain, undo
from gi_lib.search import certified
from gi_lib.types import (
    Classifier,
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    function,
)

MOST = 8192
"""Entries of one channel of a batch, at most: A's null space is square in them."""

ZERO = 2e-12
"""What rounding leaves of a zero, relative to the largest, in an exact update."""


def links_of(
    model: Classifier, image_shape: tuple[int, int, int], most: int = MOST
) -> list[Link]:
    """The layers of a model, on the CPU; `most` bounds the positions of an input.

    Raises:
        NotApplicableError: they are no chain, or do not end in the logits.
    """
    cpu: Classifier = deep_copy(model).cpu()  # type: ignore[assignment]
    links = chain(cpu, image_shape, (nn.ReLU,))
    last = links[-1]
    dense = isinstance(last.layer, nn.Linear) and last.activation is None
    if not dense or last.output[0] != model.num_classes:
        raise NotApplicableError(
            f"the model does not end in a dense layer of {model.num_classes} logits;"
            " use an attack that matches gradients"
        )
    for link in links:
        if math.prod(link.input[1:]) > most:
            raise NotApplicableError(
                f"the input of {link.name} has {link.input[1]} x {link.input[2]}"
                f" positions, more than {most}; take smaller or fewer images"
            )
    return links


def solvable_chain(obs: Observation) -> str | None:
    """A chain of dense layers and convolutions with ReLU or invertible activations."""
    most = MOST // (obs.batch_size or 1)
    try:
        links = links_of(obs.model, obs.image_shape, most)
    except NotApplicableError as error:
        return str(error)
    gone = [link.name for link in links if f"{link.name}.weight" not in obs.gradient]
    return f"the weights of {', '.join(gone)} are not in the update" if gone else None


class Count(NamedTuple):
    """The equations of one layer, before anything is observed.

    Gradient and weight constraints are not independent. For any matrix m [F, F]

        sum_fp (m^T k)[f, p] (z - b)[f, p] = sum_fct (m W)[f, c, t] gW[f, c, t] ,

    a combination of weight constraints that says nothing new: a *tie*. Where z is known
    everywhere, P positions, there are F min(F, P) of them, the dimension of m^T k.
    Behind a ReLU m^T k must be zero where z is not known: as k is, F ties as a rule.

    Args:
        layer: its name.
        unknowns: entries of its input, of all images.
        gradient: how many of them the gradient constraints can fix at most.
        weight: number of weight constraints, if z is known everywhere.
        ties: how many of these say nothing new, of a ReLU's as a rule.
    """

    layer: str
    unknowns: int
    gradient: int
    weight: int
    ties: int

    @property
    def share(self) -> float:
        """The least share of z that must be known; above 1 there is no way."""
        lacking = self.unknowns - self.gradient
        if not lacking:
            return 0.0
        return (lacking + self.ties) / self.weight if self.weight else math.inf


def count(
    model: Classifier, image_shape: tuple[int, int, int], batch_size: int = 1
) -> list[Count]:
    """The equations of each layer, from the first on; the architecture alone decides.

    The gradient constraints are counted by the structural rank of A, which is the rank
    for almost all errors k.

    Raises:
        NotApplicableError: the model is no chain.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import structural_rank

    found = []
    for link in links_of(model, image_shape):
        k = torch.ones(batch_size, *link.output, dtype=torch.float64)
        C, outputs = link.input[0], batch_size * math.prod(link.output)
        filters = link.output[0]
        found.append(
            Count(
                link.name,
                batch_size * math.prod(link.input),
                C * int(structural_rank(csr_array(gradient_matrix(link, k).numpy()))),
                outputs if link.activation else 0,
                filters if one_sided(link) else min(filters**2, outputs),
            )
        )
    return found


def gradient_matrix(link: Link, k: Tensor) -> Tensor:
    """A [F kh kw, B H W], with gW[:, c] = A x[:, c], for errors k [B, F, H', W']."""
    return torch.cat([link.gradients(one) for one in k], dim=1)


def one_sided(link: Link) -> bool:
    """Whether its activation hides what is below zero."""
    return isinstance(link.activation, nn.ReLU)


def behind(link: Link, a: Tensor, zero: float) -> tuple[Tensor, Tensor, Tensor]:
    """From the layer's activated output a: z, where it is known, and act'(z).

    A ReLU has no negative output: the most negative entry of `a` tells by how much the
    solution is off. What is within four times that of zero, or within the share `zero`
    of the largest entry, counts as zero.
    """
    if one_sided(link):
        on = a > max(-4 * a.min().item(), zero * a.max().item())
        return a, on, on.to(a.dtype)
    z, slope = a, torch.ones_like(a)
    if link.activation is not None:
        z, slope = undo(link.activation, a)
    return z, torch.ones_like(a, dtype=torch.bool), slope


class Solved(NamedTuple):
    """A layer's input [B, C, H, W], and how many of its entries were fixed by which."""

    x: Tensor
    gradient: int
    weight: int

    @property
    def open(self) -> int:
        return self.x.numel() - self.gradient - self.weight


def solve(
    link: Link,
    k: Tensor,
    z: Tensor,
    known: Tensor,
    gW: Tensor,
    guess: Tensor,
    tol: float,
) -> Solved:
    """The layer's input, from its errors k and outputs z [B, F, H', W'].

    Args:
        known: where z is known.
        gW: the gradient of its weight.
        guess: [B, C, H, W]; of all solutions the nearest to it is taken.
        tol: singular values below this share of the largest count as zero.
    """
    from scipy.linalg import lstsq  # slow to import

    B, (C, h, w), W = len(k), link.input, link.weight
    A = gradient_matrix(link, k)
    U, S, Vh = torch.linalg.svd(A, full_matrices=len(A) < A.shape[1])
    r = int((tol * S[0] < S).sum())
    x = Vh[:r].T @ (U[:, :r].T @ link.of_weights(gW).T / S[:r, None])  # [B h w, C]
    N = Vh[r:]  # [d, B h w], what A does not see
    x = x + N.T @ (N @ guess.transpose(0, 1).reshape(C, -1).T)

    def images(x: Tensor) -> Tensor:
        return x.T.reshape(C, B, h, w).transpose(0, 1)

    found = 0
    if len(N) and known.any():
        # W * (N^T a) is linear in a [d, C], one channel of N^T a at a time
        channels = N.reshape(-1, 1, h, w)
        rows = F.conv2d(channels, W.flatten(0, 1)[:, None], **link.geometry)
        rows = rows.reshape(len(N), B, *W.shape[:2], *z.shape[2:])
        M = rows.permute(1, 2, 4, 5, 0, 3)[known].flatten(1)
        left = (z - link.bias - link.forward(images(x)))[known]
        a, _, found, _ = lstsq(M.numpy(), left.numpy(), cond=tol, lapack_driver="gelsy")
        x = x + N.T @ torch.from_numpy(a).reshape(len(N), C)
    return Solved(images(x), r * C, int(found))


def too_few(link: Link, found: Solved, miss: float) -> str:
    return (
        f"the input of {link.name} has {found.x.numel()} unknowns, of which the"
        f" gradient constraints fix {found.gradient} and the weight constraints"
        f" {found.weight}; without the rest all before it would be wrong. More filters"
        " or a smaller stride would leave more equations; or use an attack that matches"
        f" gradients. (The last layer's equations are off by {miss:.1g}: where that is"
        " no rounding error, a label is wrong or repeats, or the update is not one"
        " step's gradient)"
    )


def head_errors(
    obs: Observation, head: Link, rule: labels.LabelRule
) -> tuple[Tensor, float]:
    """The last layer's errors [B, K, 1, 1] of the mean loss, and how far they miss."""
    from scipy.optimize import least_squares  # slow to import

    B, gW = obs.batch_size or 1, obs.gradient[f"{head.name}.weight"].double().cpu()
    gb = obs.gradient.get(f"{head.name}.bias")
    gb = None if gb is None else gb.double().cpu()
    if gb is not None and B == 1:
        return gb.reshape(1, -1, 1, 1), 0.0
    y = rule(obs).cpu()
    if len(y.unique()) < B or obs.num_classes <= B:
        raise NotApplicableError(
            "R-CONV tells the images of a batch apart by their labels, got"
            f" {y.tolist()} of {obs.num_classes} classes; give it a batch of different"
            " labels, fewer than there are classes"
        )
    W, b = head.weight[:, :, 0, 0], head.bias.flatten()
    Y = F.one_hot(y, obs.num_classes).double().T  # [K, B]
    U, S, Vh = torch.linalg.svd(gW, full_matrices=False)
    U, features = U[:, :B], S[:B, None] * Vh[:B]

    def miss(m: Tensor) -> Tensor:
        """softmax(W x + b) - y - B k, where k = U m and x = m^-1 U^T gW."""
        m = m.reshape(B, B)
        p = torch.softmax((torch.linalg.solve(m, features) @ W.T + b).T, 0)
        apart = (p - Y - B * U @ m).flatten()
        return apart if gb is None else torch.cat([apart, B * ((U @ m).sum(1) - gb)])

    p = torch.softmax(b.expand(len(Y)), 0) if gb is None else Y.mean(1) + gb
    best = least_squares(
        lambda m: miss(torch.from_numpy(m)).numpy(),
        (U.T @ (p[:, None] - Y) / B).flatten().numpy(),
        jac=lambda m: jacobian(miss, torch.from_numpy(m)).numpy(),
        method="lm",
        **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
    )
    k = U @ torch.from_numpy(best.x).reshape(B, B)
    return k.T.reshape(B, -1, 1, 1), (2 * best.cost) ** 0.5


@dataclass(frozen=True)
class RConv:
    needs: ClassVar[Needs] = Needs(("batch_size",), model=(solvable_chain,))
    revision: ClassVar[int] = 1

    label_rule: labels.LabelRule = labels.infer

    def __post_init__(self):
        function(self, "label_rule")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        links = links_of(obs.model, obs.image_shape)
        eps = torch.finfo(obs.dtype).eps
        tol, zero = eps**0.75, max(4 * eps, ZERO)
        mean, std = (t.double().cpu() for t in (obs.model.mean, obs.model.std))
        grey = ((0.5 - mean) / std).expand(obs.image_shape)
        k, miss = head_errors(obs, links[-1], self.label_rule)
        z, known = torch.zeros_like(k), torch.zeros_like(k, dtype=torch.bool)
        for i, link in reversed(list(enumerate(links))):
            gW = obs.gradient[f"{link.name}.weight"].cpu()
            guess = torch.zeros(len(k), *link.input, dtype=torch.float64)
            if i == 0:
                guess += grey.reshape(link.input)
            found = solve(link, k, z, known, gW, guess, tol)
            if i == 0:
                break
            if found.open:
                raise ValueError(too_few(link, found, miss))
            before = links[i - 1]
            k = link.transposed(k).reshape(-1, *before.output)
            z, known, slope = behind(before, found.x.reshape(k.shape), zero)
            k = k * slope
        x = mean + std * found.x.reshape(-1, *obs.image_shape)
        images = x.clamp(0, 1).to(obs.device, obs.dtype)
        rec = certified(obs, images, self.label_rule)
        facts = {"gradient": found.gradient, "weight": found.weight, "open": found.open}
        return dataclasses.replace(rec, notes=rec.notes | facts)
