"""Robbing the Fed (Fowl, Geiping, Czaja, Goldblum, Goldstein, ICLR 2022, 2110.13057).

A malicious server puts an imprint in front of its model, k neurons that all measure
the same h . x:

    a_j = relu(h . x - q_j),   j = 0, ..., k - 1,        x <- x + mean_j a_j

q_j is the j/k quantile of h . x on data of the server's own, and q_0 lies below
everything. Neuron j is lit by the images with h . x > q_j, and all neurons have the
same gradient dL/da_j, so that neighbours differ by the images of one bin alone:

    x = (dL/dW_j - dL/dW_(j+1)) / (dL/db_j - dL/db_(j+1))

for a bin q_j <= h . x < q_(j+1) with one image, and a mixture for a bin with more; the
last row has no neighbour and stays as it is. h is the mean of the pixels, a row of the
cosine transform, or random. Of B images in bins of equal mass a share
(1 - 1/k)^(B - 1) is alone in its bin, in expectation.

The sparse variant cuts the neurons off above,

    a_j = clip((h . x - q_j) / (q_(j+1) - q_j), 0, 1),

so that each is lit by its own bin alone, and its own ratio is the image. In local steps
the plain rows move apart and their differences mean nothing; a sparse row moves along
the images of its bin alone.

Departs from the paper: quantiles are those of data of the server's own for every h,
where the public code takes a normal or a Laplace law; a bin counts as empty where the
difference of the bias gradients is within the rounding of their sum; the public
readouts take row j - 1 from row j and keep row 0, which is the sum of all images.
Where all images come back, their labels are read from the last layer, and the result
is certified by simulating it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gi_lib import labels
from gi_lib.models import with_front
from gi_lib.models.planted import own_images
from gi_lib.search import certified, no_more
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    function,
    whole,
)

BELOW = 10.0
"""How far the first bias lies below the smallest measurement."""

Measurement = Callable[[int, torch.Generator], Tensor]
"""(number of pixels n, generator) -> h [n], float64."""


def brightness(pixels: int, rng: torch.Generator) -> Tensor:
    """1/n: the mean of the pixels."""
    return torch.full((pixels,), 1 / pixels, dtype=torch.float64)


@dataclass(frozen=True)
class CosineRow:
    """cos(pi (i + 1/2) mode / n) / n, a row of the discrete cosine transform."""

    mode: int = 32  # the public framework

    def __post_init__(self):
        whole(self, "mode", least=0)

    def __call__(self, pixels: int, rng: torch.Generator) -> Tensor:
        i = torch.arange(pixels, dtype=torch.float64)
        return torch.cos(torch.pi * (i + 0.5) * self.mode / pixels) / pixels


def random_row(pixels: int, rng: torch.Generator) -> Tensor:
    """N(0, 1 / n^2)."""
    return torch.randn(pixels, generator=rng, dtype=torch.float64) / pixels


class Imprint(nn.Module):
    """x + mean_j a_j for images [B, C, H, W], with bins [q_j, q_(j+1)), q [k + 1]."""

    def __init__(self, h: Tensor, q: Tensor, sparse: bool):
        super().__init__()
        self.sparse, self.measure = sparse, nn.Linear(len(h), len(q) - 1)
        width = q.diff() if sparse else torch.ones_like(q[1:])
        with torch.no_grad():
            self.measure.weight.copy_(h / width[:, None])
            self.measure.bias.copy_(-q[:-1] / width)

    def forward(self, x: Tensor) -> Tensor:
        a = self.measure(x.flatten(1))
        a = F.hardtanh(a, 0.0, 1.0) if self.sparse else a.relu()
        return x + a.mean(1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class RobbingTheFed:
    needs: ClassVar[Needs] = Needs(("trapdoor",))
    revision: ClassVar[int] = 1

    bins: int = 128  # k, the public demo
    surrogates: int = 2000  # images from which the quantiles are read
    measurement: Measurement = brightness  # h
    sparse: bool = False

    def __post_init__(self):
        whole(self, "bins", least=2)
        whole(self, "surrogates", least=2)
        function(self, "measurement")

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, str]:
        """The model behind an imprint, and the name of the layer that measures."""
        use = "the imprint's bins are quantiles of"
        images, _ = own_images(auxiliary, self.surrogates, rng, use)
        p = next(model.parameters())
        seen = (images.to(p.device, p.dtype) - model.mean) / model.std
        h = self.measurement(seen[0].numel(), rng)
        measured = seen.flatten(1).cpu().double() @ h
        q = edges(measured, self.bins)
        imprint = Imprint(h, q, self.sparse).to(p.device, p.dtype)
        return with_front(model, imprint), "net.front.measure"

    def at_most(self, obs: Observation) -> int:
        """A bin gives one image, and no more bins are lit than there are images."""
        return no_more(obs, self.bins)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        dW, db = measured_gradient(obs)
        noise = 64 * torch.finfo(db.dtype).eps * db.abs().max()
        if not self.sparse:
            dW, db = (torch.cat([g[:-1] - g[1:], g[-1:]]) for g in (dW, db))
        lit = db.abs() > noise
        x = (dW[lit] / db[lit].unsqueeze(1)).reshape(-1, *obs.image_shape)
        most = db[lit].abs().argsort(descending=True)[: self.at_most(obs)]
        images = (obs.model.mean + obs.model.std * x[most]).clamp(0, 1)
        rec = certified(obs, images, labels.infer)
        facts = {"lit_bins": int(lit.sum())}
        if obs.batch_size is not None and obs.batch_size > self.bins:
            facts["crowded"] = True  # more images than bins
        return dataclasses.replace(rec, notes=rec.notes | facts)


def edges(measured: Tensor, bins: int) -> Tensor:
    """q [bins + 1]: the quantiles of what was measured [N], the ends far outside."""
    q = measured.quantile(torch.arange(bins + 1).double() / bins)
    q[0], q[-1] = q[0] - BELOW, q[-1] + BELOW
    if (q.diff() <= 0).any():
        raise ValueError(
            f"{int((q.diff() <= 0).sum())} of {bins} bins are empty of width,"
            f" as many of {len(measured)} surrogates measure the same; take fewer"
            " bins, or another measurement"
        )
    return q


def measured_gradient(obs: Observation) -> tuple[Tensor, Tensor]:
    """The gradients of the imprint's rows [k, C H W] and biases [k]."""
    names = [f"{obs.trapdoor}.{kind}" for kind in ("weight", "bias")]
    if missing := [name for name in names if name not in obs.gradient]:
        raise NotApplicableError(
            f"the update has no {' and no '.join(missing)}: the model that was trained"
            " has no such imprint; let clients train the one that `plant` returned"
        )
    return obs.gradient[names[0]], obs.gradient[names[1]]
