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

Needs a chain of dense layers and plain convolutions, with ReLU, LeakyReLU, sigmoid,
tanh or nothing between them, that ends in a dense layer. Batches need labels that
differ.

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
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gi_lib import labels
from gi_lib.models.chain import Link, chain
from gi_lib.search import certified
from gi_lib.types import (
    Classifier,
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    function,
)

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)
MOST = 8192
"""Entries of one channel of a batch, at most: A's null space is square in them."""


def solvable_chain(obs: Observation) -> str | None:
    """A chain of dense layers and convolutions, none frozen, with ReLU or the like."""
    try:
        links = chain(obs.model, obs.image_shape, ACTIVATIONS)
    except NotApplicableError as error:
        return str(error)
    if links[-1].output[0] != obs.num_classes or links[-1].activation is not None:
        return f"the model does not end in a dense layer of {obs.num_classes} logits"
    if frozen := [link.weight for link in links if link.weight not in obs.gradient]:
        return f"{', '.join(frozen)} are frozen, and R-CONV needs each layer's gradient"
    B, (_, h, w) = obs.batch_size or 1, max(links, key=lambda link: link.shape[1]).shape
    if B * h * w > MOST:
        return f"{B} x {h} x {w} pixels are more than {MOST}; take smaller images"
    return None


class Count(NamedTuple):
    """The equations of one layer, before anything is observed.

    Args:
        layer: its name.
        unknowns: entries of the inputs of all images.
        gradient: how many of them the gradient constraints can fix at most.
        weight: weight constraints; behind a ReLU those with z > 0 alone hold.
        filters: F. A filter whose z is known wherever k is not zero ties its weight
            constraints to its gradient constraints by one equation.
    """

    layer: str
    unknowns: int
    gradient: int
    weight: int
    filters: int

    def needed(self) -> float:
        """What share of the weight constraints must hold; above 1 there is no way."""
        lacking = self.unknowns - self.gradient
        return (lacking + self.filters) / self.weight if lacking else 0.0


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
    for link in chain(model, image_shape, ACTIVATIONS):
        k = torch.ones(batch_size, *link.output)
        A = csr_array(gradient_matrix(link, k).numpy() != 0)
        C, outputs = link.shape[0], torch.Size(link.output).numel()
        found.append(
            Count(
                link.name,
                batch_size * torch.Size(link.shape).numel(),
                C * int(structural_rank(A.astype(float))),
                batch_size * outputs,
                link.output[0],
            )
        )
    return found


def gradient_matrix(link: Link, k: Tensor) -> Tensor:
    """A [F kh kw, B H W], with gW[:, c] = A x[:, c], for errors k [B, F, H', W']."""
    B, filters, (h, w) = len(k), k.shape[1], link.kernel.shape[2:]
    taps = torch.eye(h * w, dtype=k.dtype).view(1, h * w, h, w)
    rows = link.transposed(k.flatten(0, 1)[:, None], taps)  # one tap's at a time
    return rows.reshape(B, filters * h * w, -1).transpose(0, 1).flatten(1)


def behind(
    act: nn.Module | None, a: Tensor, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From a = act(z): z, where it is known, and act'(z).

    A ReLU has no negative output: the most negative entry of `a` tells by how much the
    solution is off. What is within four times that of zero, or within the share `tol`
    of the largest entry, counts as zero.
    """
    everywhere, one = torch.ones_like(a, dtype=torch.bool), torch.ones_like(a)
    if act is None:
        return a, everywhere, one
    if isinstance(act, nn.Sigmoid):
        return a.logit(eps=torch.finfo(a.dtype).eps), everywhere, a * (1 - a)
    if isinstance(act, nn.Tanh):
        inside = 1 - torch.finfo(a.dtype).eps
        return a.clamp(-inside, inside).atanh(), everywhere, 1 - a.square()
    slope = getattr(act, "negative_slope", 0.0)
    if slope == 0:
        on = a > max(-4 * a.min().item(), tol * a.max().item())
        return a, on, on.to(a.dtype)
    slopes = torch.where(a > 0, one, slope)
    return a / slopes, everywhere, slopes


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
        gW: [F, C, kh, kw].
        guess: [B, C, H, W]; of all solutions the nearest to it is taken.
        tol: singular values below this share of the largest count as zero.
    """
    from scipy.linalg import lstsq  # slow to import

    B, (C, h, w), W = len(k), link.shape, link.kernel.double()
    A = gradient_matrix(link, k)
    U, S, Vh = torch.linalg.svd(A, full_matrices=len(A) < A.shape[1])
    r = int((tol * S[0] < S).sum())
    columns = gW.transpose(0, 1).reshape(C, -1).T  # gW[:, c], one below the other
    x = Vh[:r].T @ (U[:, :r].T @ columns / S[:r, None])  # [B h w, C]
    N = Vh[r:]  # [d, B h w], what A does not see
    x = x + N.T @ (N @ guess.transpose(0, 1).reshape(C, -1).T)

    def images(x: Tensor) -> Tensor:
        return x.T.reshape(C, B, h, w).transpose(0, 1)

    found = 0
    if len(N) and known.any():
        # W * (N^T a) is linear in a [d, C], one channel of N^T a at a time
        rows = link.convolve(N.reshape(-1, 1, h, w), W.flatten(0, 1)[:, None])
        rows = rows.reshape(len(N), B, *W.shape[:2], *z.shape[2:])
        M = rows.permute(1, 2, 4, 5, 0, 3)[known].flatten(1)
        bias = link.layer.bias
        b = 0 if bias is None else bias.detach().double().cpu().view(-1, 1, 1)
        left = (z - b - link.convolve(images(x), W))[known]
        a, _, found, _ = lstsq(M.numpy(), left.numpy(), cond=tol, lapack_driver="gelsy")
        x = x + N.T @ torch.from_numpy(a).reshape(len(N), C)
    return Solved(images(x), r * C, int(found))


def too_few(link: Link, found: Solved) -> str:
    return (
        f"the input of layer {link.name!r} has {found.x.numel()} unknowns, of which the"
        f" gradient constraints fix {found.gradient} and the weight constraints"
        f" {found.weight}; without the rest all before it would be wrong. More filters"
        " or a smaller stride would leave more equations; or use an attack that matches"
        " gradients"
    )


def head_errors(obs: Observation, head: Link, rule: labels.LabelRule) -> Tensor:
    """The errors [B, K, 1, 1] of the last layer, of the mean loss."""
    from scipy.optimize import least_squares  # slow to import

    B, gW = obs.batch_size or 1, obs.gradient[head.weight].double().cpu()
    gb = None if head.bias is None else obs.gradient[head.bias].double().cpu()
    if gb is not None and B == 1:
        return gb.reshape(1, -1, 1, 1)
    y = rule(obs).cpu()
    if len(y.unique()) < B or obs.num_classes <= B:
        raise NotApplicableError(
            "R-CONV tells the images of a batch apart by their labels, got"
            f" {y.tolist()} of {obs.num_classes} classes; give it a batch of different"
            " labels, fewer than there are classes"
        )
    W, bias = head.layer.weight.detach().double().cpu(), head.layer.bias
    b = torch.zeros(1) if bias is None else bias.detach().double().cpu()
    Y = F.one_hot(y, obs.num_classes).double().T  # [K, B]
    U, S, Vh = torch.linalg.svd(gW, full_matrices=False)
    U, features = U[:, :B], S[:B, None] * Vh[:B]

    def miss(m: Tensor) -> Tensor:
        """softmax(W x + b) - y - B k, where k = U m and x = m^-1 U^T gW."""
        m = m.reshape(B, B)
        p = torch.softmax((torch.linalg.solve(m, features) @ W.T + b).T, 0)
        apart = (p - Y - B * U @ m).flatten()
        return apart if gb is None else torch.cat([apart, B * ((U @ m).sum(1) - gb)])

    p = torch.softmax(b.expand(len(Y)).double(), 0) if gb is None else Y.mean(1) + gb
    best = least_squares(
        lambda m: miss(torch.from_numpy(m)).numpy(),
        (U.T @ (p[:, None] - Y) / B).flatten().numpy(),
        jac=lambda m: torch.func.jacfwd(miss)(torch.from_numpy(m)).numpy(),
        method="lm",
        **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
    )
    if not best.cost < torch.finfo(obs.dtype).eps:
        raise ValueError(
            f"no errors of the last layer fit its gradient and the labels {y.tolist()}:"
            " the labels are wrong, the update is defended, or it is not the gradient"
            " of one step; grant the labels, or use an attack that matches gradients"
        )
    return (U @ torch.from_numpy(best.x).reshape(B, B)).T.reshape(B, -1, 1, 1)


@dataclass(frozen=True)
class RConv:
    needs: ClassVar[Needs] = Needs(("batch_size",), model=(solvable_chain,))
    revision: ClassVar[int] = 1

    label_rule: labels.LabelRule = labels.infer

    def __post_init__(self):
        function(self, "label_rule")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        links = chain(obs.model, obs.image_shape, ACTIVATIONS)
        tol = torch.finfo(obs.dtype).eps ** 0.75
        mean, std = (t.double().cpu() for t in (obs.model.mean, obs.model.std))
        grey = ((0.5 - mean) / std).expand(obs.image_shape)
        k = head_errors(obs, links[-1], self.label_rule)
        z, known = torch.zeros_like(k), torch.zeros_like(k, dtype=torch.bool)
        for i, link in reversed(list(enumerate(links))):
            gW = obs.gradient[link.weight].double().cpu().reshape(link.kernel.shape)
            guess = torch.zeros(len(k), *link.shape).double()
            if i == 0:
                guess += grey.reshape(link.shape)
            found = solve(link, k, z, known, gW, guess, tol)
            if i == 0:
                break
            if found.open:
                raise ValueError(too_few(link, found))
            before = links[i - 1]
            k = link.transposed(k, link.kernel.double())
            k, x = (t.reshape(-1, *before.output) for t in (k, found.x))
            z, known, slope = behind(before.activation, x, tol)
            k = k * slope
        x = mean + std * found.x.reshape(-1, *obs.image_shape)
        images = x.clamp(0, 1).to(obs.device, obs.dtype)
        rec = certified(obs, images, self.label_rule)
        facts = {"gradient": found.gradient, "weight": found.weight, "open": found.open}
        return dataclasses.replace(rec, notes=rec.notes | facts)
