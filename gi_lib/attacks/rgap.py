"""R-GAP (Zhu, Blaschko, ICLR 2021, 2010.07733).

From the last layer back, each layer's input x solves two kinds of linear equations:

    W x = z         what the layer put out: z = act^-1(the next layer's input)
    K x = dL/dW     its gradient, linear in x: K has the entries of k = dL/dz

and then k <- (W^T k) act'(z) one layer further. The first k: with a bias it is that
layer's gradient. Without one, k x = dL/dw of a logistic head, loss log(1 + e^-v) of
the margin v, gives

    -v / (1 + e^v) = <dL/dw, w>,         k = -+ 1 / (1 + e^v)

which has two roots v > 0 where the sample is classified right. With K > 2 classes the
rows of dL/dW = k x^T have the proportions of k = softmax(W x) - y, so that
log k_i - log k_j = (w_i - w_j) x for the absent classes: one root.

Needs one image, and a chain of dense layers and convolutions with invertible
activations. Where a layer has fewer equations than unknowns (models.rank), its solution
is that of least norm.

Departs from the paper: float64 throughout; the borders that a convolution pads are no
unknowns; both kinds of equations are scaled to the same size and solved by Cholesky's
factor of the normal equations with refinement, in place of one dense least squares;
bisection in place of Adam; K classes; biases are allowed. Both roots solve every layer
of a homogeneous network, and nothing but the range of pixels tells them apart: of the
images that fit into it the one with the most contrast is taken. The public code avoids
the choice by a label that is wrong. Where a label is unknown to a logistic head, both
are tried.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from scipy.optimize import bisect, newton
from torch import Tensor

from gi_lib import labels
from gi_lib.models.chain import Link, chain, homogeneous, undo
from gi_lib.search import certified
from gi_lib.types import Needs, NotApplicableError, Observation, Reconstruction

TURN = 1.2784645427610738
"""The margin at which v / (1 + e^v) is largest: (v - 1) e^v = 1."""
OUTSIDE = 0.1
"""How far errors may take a pixel out of [0, 1] before a root counts as too bright."""


class Head(NamedTuple):
    """What the last layer tells: the label, k [K, 1, 1] and x [*input]."""

    label: int
    k: Tensor
    x: Tensor


def a_chain_to_go_back(obs: Observation) -> str | None:
    """Dense layers and convolutions in a chain, with invertible activations."""
    try:
        links = chain(obs.model, obs.image_shape)
    except NotApplicableError as error:
        return str(error)
    gone = [link.name for link in links if f"{link.name}.weight" not in obs.gradient]
    return f"the weights of {', '.join(gone)} are not in the update" if gone else None


def margins(c: float) -> list[float]:
    """Every v with -v / (1 + e^v) = c, from the smallest on."""

    def f(v: float) -> float:
        return -v * math.exp(-max(v, 0)) / (1 + math.exp(-abs(v))) - c

    if c >= 0:
        return [bisect(f, -2 * c - 1, 0, xtol=1e-300, rtol=1e-15)]
    if f(TURN) > 0:
        return []
    ends = ((0.0, TURN), (TURN, 745.0))
    return [bisect(f, *between, xtol=1e-300, rtol=1e-15) for between in ends]


def logistic(obs: Observation, w: Tensor, g: Tensor) -> list[tuple[int, float]]:
    """Every label and k = dL/du of the logit u = <w, x> that <g, w> = k u allows."""
    known = [0, 1] if obs.labels is None else obs.labels.tolist()
    return [
        (y, (1 - 2 * y) / (1 + math.exp(v)))
        for y in known
        for v in margins((g @ w).item())
    ]


def proportions(obs: Observation, W: Tensor, g: Tensor) -> tuple[int, Tensor]:
    """The label and k = softmax(W x) - y of K > 2 classes, from g = k x^T."""
    y = int(labels.infer(obs))
    _, (s, *_), vectors = torch.linalg.svd(g, full_matrices=False)
    v = vectors[0] * -(g[y] @ vectors[0]).sign()
    u, z = g @ v / s, W @ v
    absent = u > 0
    absent[y] = False
    if absent.sum() < 2:
        raise ValueError(
            "the last layer's gradient is not that of one image: its rows should all"
            f" point against that of class {y}; the update is defended, or the client"
            " did something else than one step on one image"
        )
    rows, logs = z[absent] - z[absent].mean(), u[absent].log()
    t = ((rows @ logs) / (rows @ rows)).item()  # x = t v

    def excess(t: float) -> float:
        return (t * (1 - (t * z).softmax(0)[y]) + s * u[y]).item()

    t = newton(excess, t, disp=False)
    return y, u * (s / t)


def heads(obs: Observation, last: Link) -> list[Head]:
    """Every k and x that the last layer allows."""
    W, g = last.weight[:, :, 0, 0], obs.gradient[f"{last.name}.weight"].double()
    gb = obs.gradient.get(f"{last.name}.bias")
    if not g.any():
        raise ValueError(
            "the gradient of the last layer is zero: the network is sure of the label,"
            " and nothing can be read from this update"
        )
    found: list[tuple[int, Tensor]]
    if gb is not None:
        found = [(int(labels.infer(obs)), gb.double())]
    elif len(W) > 2:
        found = [proportions(obs, W, g)]
    else:
        one = len(W) == 1
        signs = torch.ones_like(W[:, 0]) if one else torch.tensor([-1.0, 1.0]).to(W)
        pairs = logistic(obs, W[0] if one else W[1] - W[0], g[-1])
        found = [(y, k * signs) for y, k in pairs]
    if not found:
        raise ValueError(
            "no margin solves the last layer's equation, so that its gradient is not"
            " that of one image; the update is defended, or the client did something"
            " else than one step on one image"
        )
    solved = ((y, k, (k @ g) / (k @ k)) for y, k in found)
    return [Head(y, k[:, None, None], x[:, None, None]) for y, k, x in solved]


Refine = Callable[[Observation, list[Link], Tensor, Tensor, Tensor], Tensor]
"""(obs, links, z, k, x) -> a better x, the input of the last of these links."""


def back(
    obs: Observation, links: list[Link], head: Head, refine: Refine | None = None
) -> tuple[Tensor, float]:
    """The first layer's input [C, H, W], and the largest |W x - z| / |z| on the way."""
    x, k, worst = head.x, head.k, 0.0
    for i in reversed(range(len(links) - 1)):
        link, after = links[i], links[i + 1]
        assert link.activation is not None
        z, slope = undo(link.activation, x.reshape(link.output))
        z = z - link.bias
        k = after.transposed(k[None])[0].reshape(link.output) * slope
        x = link.solve(z, k, obs.gradient[f"{link.name}.weight"])
        if refine is not None:
            x = refine(obs, links[: i + 1], z, k, x)
        off = (link.forward(x[None])[0] - z).norm() / z.norm()
        worst = max(worst, off.item())
    return x, worst


def merit(pixels: Tensor) -> tuple[bool, float]:
    """The higher, the likelier: in [0, 1] up to errors, and then of more contrast."""
    outside = (pixels - pixels.clamp(0, 1)).abs().max().item()
    fits = outside < OUTSIDE
    return fits, pixels.std().item() if fits else -outside


def invert(obs: Observation, refine: Refine | None = None) -> Reconstruction:
    """The way back from every head, and of the images the likeliest."""
    links = chain(obs.model, obs.image_shape)
    ways: list[tuple[Head, Tensor, float]] = []
    for head in heads(obs, links[-1]):
        if ways and ways[-1][0].label == head.label and homogeneous(links):
            before, x, off = ways[-1]
            x = x * (before.k.norm() / head.k.norm())
        else:
            x, off = back(obs, links, head, refine)
        ways.append((head, x, off))
    best, _, off = min(ways, key=lambda way: way[-1])
    mean, std = obs.model.mean.double(), obs.model.std.double()
    roots = [
        mean + std * x.reshape(obs.image_shape)
        for head, x, _ in ways
        if head.label == best.label
    ]
    image = max(roots, key=merit).clamp(0, 1)[None].to(obs.dtype)
    label = torch.tensor([best.label], device=obs.device)
    rec = certified(obs, image, lambda obs: label)
    notes = {"residual": off, "roots": len(roots)}
    return dataclasses.replace(rec, notes=rec.notes | notes)


@dataclass(frozen=True)
class RGAP:
    needs: ClassVar[Needs] = Needs(
        ("batch_size",), model=(a_chain_to_go_back,), batch=1
    )
    revision: ClassVar[int] = 1

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        return invert(obs)
