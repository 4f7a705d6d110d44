"""Trap weights (Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot, EuroS&P
2023, 2112.02918): "When the curious abandon honesty".

A malicious server writes the rows of a first dense ReLU layer so that each is lit by
few images. Of a row w half of the pixels, drawn at random, get -|N(0, sigma)|, and the
other half the same magnitudes, positive and a little smaller:

    w_(plus) = s |w_(minus)|,   s < 1,   bias 0.

For x >= 0 the sum w . x is then negative for most images, the more so the smaller s is.
A row that one image of the batch lights alone has the image for its bias ratio:

    x = (dL/dW_k) / (dL/db_k).

The server cannot see which rows these are. It drops ratios outside [0, 1], which no
image is; takes those for certain on which two rows agree, since two rows mix several
images in different ways; drops the rows that a certain image lights too; and fills up
with what is left, the strongest first.

The rows take the place of the layer's own where a model begins with a dense layer, a
bias and a ReLU (the first `rows` of them, or all that it has). Any other model gets a
dense front, which is a layer of its own and not parameters alone (models.planted).

Departs from the paper: the rows see normalised pixels (x - mean) / std, and take the
normalisation back, as the asymmetry relies on x >= 0; where the paper sets convolutions
to pass the image on, here is a front; how mixtures are told from images is ours.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.models.planted import plant_rows, planted_gradient, planted_rows
from gi_lib.search import certified, no_more
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    Observation,
    Reconstruction,
    real,
    whole,
)


def unnormalised(
    model: Classifier, weight: Tensor, bias: Tensor, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Rows on normalised pixels that do what these do on pixels in [0, 1]."""
    mean, std = (
        v.cpu().to(weight).expand(image_shape).flatten()
        for v in (model.mean, model.std)
    )
    return weight * std, bias + weight @ mean


def alone(obs: Observation, rows: int, most: int) -> Reconstruction:
    """The images of rows that one image lights alone, as far as a server can tell."""
    dW, db = (g[:rows] for g in planted_gradient(obs))
    W, b = (p[:rows] for p in planted_rows(obs))
    same = torch.finfo(db.dtype).eps ** 0.75  # of ratios that differ by rounding
    lit = db.nonzero().flatten()
    z = dW[lit] / db[lit, None]
    x = obs.model.mean + obs.model.std * z.reshape(-1, *obs.image_shape)
    fits = ((x > -same) & (x < 1 + same)).flatten(1).all(1)
    lit, z, x = lit[fits], z[fits], x[fits]

    flat = x.flatten(1)
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    near = apart < same * flat.shape[1] ** 0.5
    first = ~near.tril(-1).any(1)  # of the rows that agree
    sure = near.sum(1) > 1
    lights = z[sure & first] @ W[lit].T
    mixed = (lights + b[lit] > 0).any(0) & ~sure  # lit by a certain image too

    chosen = (first & ~mixed).nonzero().flatten()
    chosen = chosen[db[lit[chosen]].abs().argsort(descending=True)]
    votes = near.sum(1)[chosen]
    chosen = chosen[votes.argsort(descending=True, stable=True)][:most]
    rec = certified(obs, x[chosen].clamp(0, 1), labels.infer)
    facts = {"lit_rows": int(db.count_nonzero()), "agreed": int((votes > 1).sum())}
    return dataclasses.replace(rec, notes=rec.notes | facts)


@dataclass(frozen=True)
class TrapWeights:
    needs: ClassVar[Needs] = Needs(("trapdoor",))
    revision: ClassVar[int] = 1

    rows: int = 1000  # the paper's networks, from memory
    scale: float = 0.95  # s, the public code
    sigma: float = 0.5  # the public code

    def __post_init__(self):
        whole(self, "rows")
        real(self, "scale", "sigma", above=0)
        if self.scale >= 1:
            raise ValueError(
                f"TrapWeights needs scale < 1, got {self.scale!r}: from 1 on half of"
                " all images light a row"
            )

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, str]:
        """The model with trap weights, and the name of the layer that has them."""
        n = torch.Size(image_shape).numel()
        order = torch.rand(self.rows, n, generator=rng).argsort(1)
        minus, plus = order[:, : n // 2], order[:, n // 2 : n // 2 * 2]
        size = self.sigma * torch.randn(self.rows, n // 2, generator=rng).abs()
        W = torch.zeros(self.rows, n).scatter(1, minus, -size)
        W = W.scatter(1, plus, self.scale * size).double()
        W, b = unnormalised(model, W, W.new_zeros(self.rows), image_shape)
        return plant_rows(model, image_shape, W, b, rng)

    def at_most(self, obs: Observation) -> int:
        """No more images than there are, and than there are rows."""
        return no_more(obs, self.rows)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        return alone(obs, self.rows, self.at_most(obs))
