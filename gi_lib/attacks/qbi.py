"""QBI and PAIRS (Nowak, Bott, Khachaturov, Puppe, Krenzer, Hekalo, 2024,
arXiv:2406.18745).

As trap weights, a malicious server writes the rows of a first dense ReLU layer so that
each is lit by one image of a batch of B, and reads the bias ratio of rows lit by one
alone. Rows are random, w ~ N(0, 1), and the bias is solved for

    P(w . x + b > 0) = 1 / B.

With pixels that are independent, of mean mu and standard deviation sd, w . x is normal:

    b = - w . mu - |w sd| Phi^-1(1 - 1/B).

With k rows that light up independently an image is alone in one of them with
probability 1 - (1 - (1/B) (1 - 1/B)^(B-1))^k, about 1 - exp(-k / (e B)).

`rule` says how rows and biases are chosen. `qbi` solves this equation: the server knows
mu and sd, by default those by which the model normalises. `quantiles` takes for b minus
the 1 - 1/B quantile of w . x over data of the server's own. `pairs`, PAIRS, keeps of
several draws of a row, each with that bias, the one that most batches of the server's
own light by exactly one image.

Where rows are planted and how they are read is as in trap_weights. Departs from the
paper, of which the abstract was read: the equation's form is derived; the loop of PAIRS
is from memory, and its score is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib.attacks.trap_weights import alone
from gi_lib.models.planted import plant_rows
from gi_lib.search import no_more
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    Observation,
    Reconstruction,
    function,
    real,
    whole,
)

TRIES = 8
"""Draws of a row, of which PAIRS keeps one."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """What a server knows of normalised pixels: mean [n], standard deviation [n], and
    data of its own [N, n], or None."""

    mean: Tensor
    std: Tensor
    own: Tensor | None

    @property
    def data(self) -> Tensor:
        if self.own is None:
            raise ValueError(
                "this rule of QBI fits biases to images of the server's own; give it"
                " auxiliary data, or take rule=qbi"
            )
        return self.own


Rows = tuple[Tensor, Tensor]
Rule = Callable[[int, int, Pixels, torch.Generator], Rows]
"""(k, B, pixels, generator) -> W [k, n] and b [k]."""


def gaussian(k: int, n: int, rng: torch.Generator) -> Tensor:
    return torch.randn(k, n, generator=rng)


def fitted(W: Tensor, B: int, x: Tensor) -> Tensor:
    """- the 1 - 1/B quantile of W x over x [N, n], one for each row."""
    return -(x @ W.T).quantile(1 - 1 / B, dim=0)


def qbi(k: int, B: int, seen: Pixels, rng: torch.Generator) -> Rows:
    W = gaussian(k, len(seen.mean), rng)
    z = torch.special.ndtri(torch.tensor(1 - 1 / B))
    return W, -W @ seen.mean - z * (W * seen.std).norm(dim=1)


def quantiles(k: int, B: int, seen: Pixels, rng: torch.Generator) -> Rows:
    W = gaussian(k, seen.data.shape[1], rng)
    return W, fitted(W, B, seen.data)


def pairs(k: int, B: int, seen: Pixels, rng: torch.Generator) -> Rows:
    x = seen.data[: len(seen.data) // B * B]
    if not len(x):
        raise ValueError(
            f"PAIRS needs a batch of {B} images of the server's own, got"
            f" {len(seen.data)}; give more surrogates"
        )
    best = torch.full((k,), -1.0)
    W, b = torch.zeros(k, x.shape[1]), torch.zeros(k)
    for _ in range(TRIES):
        drawn = gaussian(k, x.shape[1], rng)
        bias = fitted(drawn, B, seen.data)
        lit = (x @ drawn.T + bias > 0).reshape(-1, B, k).sum(1)  # [batches, k]
        share = (lit == 1).float().mean(0)
        better = share > best
        best, b = torch.where(better, share, best), torch.where(better, bias, b)
        W = torch.where(better[:, None], drawn, W)
    return W, b


@dataclass(frozen=True)
class QBI:
    needs: ClassVar[Needs] = Needs(("trapdoor",))
    revision: ClassVar[int] = 1

    rows: int = 1000  # k
    batch: int = 100  # B, the batch that the server expects
    rule: Rule = qbi
    mean: float | None = None  # of a pixel in [0, 1]; None: as the model normalises
    std: float | None = None
    surrogates: int = 2000  # images of the server's own, for the other rules

    def __post_init__(self):
        whole(self, "rows")
        whole(self, "batch", "surrogates", least=2)
        function(self, "rule")
        if (self.mean is None) != (self.std is None):
            raise ValueError("QBI needs mean and std of a pixel, both or neither")
        if self.mean is not None:
            real(self, "mean")
            real(self, "std", above=0)

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, str]:
        """The model with these rows, and the name of the layer that has them."""
        shift, scale = (
            v.cpu().float().expand(image_shape).flatten()
            for v in (model.mean, model.std)
        )
        own = None
        if auxiliary is not None and self.rule is not qbi:
            images = auxiliary.draw(self.surrogates, rng)[0]
            own = (images.float().flatten(1) - shift) / scale
        if self.mean is not None and self.std is not None:
            seen = Pixels((self.mean - shift) / scale, self.std / scale, own)
        elif self.rule is qbi and (shift == 0).all() and (scale == 1).all():
            raise ValueError(
                "QBI solves for the bias by a pixel's mean and standard deviation, and"
                " this model does not normalise by them; give mean and std"
            )
        else:
            seen = Pixels(torch.zeros_like(shift), torch.ones_like(scale), own)
        W, b = self.rule(self.rows, self.batch, seen, rng)
        return plant_rows(model, image_shape, W, b, rng)

    def at_most(self, obs: Observation) -> int:
        """No more images than there are, and than there are rows."""
        return no_more(obs, self.rows)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        return alone(obs, self.rows, self.at_most(obs))
