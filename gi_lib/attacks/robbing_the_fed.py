"""Robbing the Fed (Fowl, Geiping, Czaja, Goldblum, Goldstein, ICLR 2022, 2110.13057).

A malicious server puts an imprint in front of its model, k neurons that all measure
the same h . x:

    a_j = relu(h . x - q_j),   j = 0, ..., k - 1,        x <- x + mean_j a_j

q_j is the j/k quantile of h . x on data of the server's own, and q_0 lies below
everything. Neuron j is lit by the images with h . x > q_j, and all neurons have the
same gradient dL/da_j, so that neighbours differ by the images of one bin alone:

    x = (dL/dW_j - dL/dW_(j+1)) / (dL/db_j - dL/db_(j+1))

for a bin q_j <= h . x < q_(j+1) with one image, and a mixture for a bin with more; the
last row has no neighbour and stays as it is. h is the mean of the pixels. Of B images
in bins of equal mass a share (1 - 1/k)^(B - 1) is alone in its bin, in expectation.

Departs from the paper: a bin counts as empty where the difference of the bias gradients
is within the rounding of their sum; the public readouts take row j - 1 from row j and
keep row 0, which is the sum of all images. Where all images come back, their labels are
read from the last layer, and the result is certified by simulating it.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gi_lib import labels
from gi_lib.models import with_front
from gi_lib.search import certified
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    Observation,
    Reconstruction,
    whole,
)

BELOW = 10.0
"""How far the first bias lies below the smallest measurement."""


class Imprint(nn.Module):
    """x + mean_j relu(h . x - q_j), for images [B, C, H, W]."""

    def __init__(self, quantiles: Tensor, pixels: int):
        super().__init__()
        self.measure = nn.Linear(pixels, len(quantiles))
        with torch.no_grad():
            self.measure.weight.fill_(1 / pixels)
            self.measure.bias.copy_(-quantiles)

    def forward(self, x: Tensor) -> Tensor:
        a = self.measure(x.flatten(1)).relu()
        return x + a.mean(1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class RobbingTheFed:
    needs: ClassVar[Needs] = Needs(("trapdoor",))
    revision: ClassVar[int] = 1

    bins: int = 128  # k, the public demo
    surrogates: int = 2000  # images from which the quantiles are read

    def __post_init__(self):
        whole(self, "bins", least=2)
        whole(self, "surrogates", least=2)

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, str]:
        """The model behind an imprint, and the name of the layer that measures."""
        if auxiliary is None:
            raise ValueError(
                "the imprint's bins are quantiles of images of the server's own;"
                " give it auxiliary data"
            )
        images, _ = auxiliary.draw(self.surrogates, rng)
        p = next(model.parameters())
        seen = (images.to(p.device, p.dtype) - model.mean) / model.std
        brightness = seen.flatten(1).mean(1).double().cpu()
        q = brightness.quantile(
            torch.arange(self.bins, dtype=torch.float64) / self.bins
        )
        q[0] = brightness.min() - BELOW
        imprint = Imprint(q.to(p.device, p.dtype), seen[0].numel()).to(
            p.device, p.dtype
        )
        return with_front(model, imprint), "net.front.measure"

    def at_most(self, obs: Observation) -> int:
        """A bin gives one image, and no more bins are lit than there are images."""
        return self.bins if obs.batch_size is None else min(self.bins, obs.batch_size)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        dW, db = (obs.gradient[f"{obs.trapdoor}.{kind}"] for kind in ("weight", "bias"))
        noise = 64 * torch.finfo(db.dtype).eps * db.abs().max()
        dW, db = (torch.cat([g[:-1] - g[1:], g[-1:]]) for g in (dW, db))
        lit = db.abs() > noise
        x = (dW[lit] / db[lit].unsqueeze(1)).reshape(-1, *obs.image_shape)
        most = db[lit].abs().argsort(descending=True)[: self.at_most(obs)]
        images = (obs.model.mean + obs.model.std * x[most]).clamp(0, 1)
        rec = certified(obs, images, labels.infer)
        return dataclasses.replace(rec, notes=rec.notes | {"lit_bins": int(lit.sum())})
