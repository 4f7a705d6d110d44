"""LOKI (Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi, IEEE S&P 2024,
2303.12233).

A malicious server sends each of Z clients a model of its own, which differ in a
convolution before an imprint of k bins. All but C of its C Z kernels are zero; client
z's are

    u_(C z + j) = S x_j        (the centre tap; x the pixels, S the conv scale),

and a dense layer on all C Z channels, the same for every client, measures brightness:

    a_i = clip((mean(x) - q_i) / w_i, 0, 1),   w_i = q_(i+1) - q_i,

with weights 1 / (S n w_i), n = C H W, and biases -q_i / w_i. Bin i has a gradient for
the images with q_i < mean(x) < q_(i+1) alone, and that of row i lies, for client z, in
its own channels only. So the mean over clients, which is all that secure aggregation
shows, does not mix them:

    dL/dW_i, channels of z  =  S x sum_t dL/da_i      where one image of z is in bin i.

dL/db_i is a sum over clients and is not used: the known brightness of the bin gives the
factor. After a local step with an image in bin i, a_i moves by lr dL/da_i S^2 <x, x'>
for any x' that follows: with a large S the bin closes, and only the first step to light
it counts. A kernel that was zero moves by lr dL/da_i / (S w_i) times an image, beside
S: with a small S clients mix. So of B images a client, in T steps of b = B/T, a share

    b (1 - 1/k)^(b - 1) / B  (1 - (1 - 1/k)^B) / (1 - (1 - 1/k)^b)

comes back, which is (1 - 1/k)^(B - 1) for one step: .875 of the 64 at k = 256 in eight
steps, .861 in four, .781 in one. Two images of one step in one bin come back mixed.

Departs from the paper: kernels also undo the model's normalisation, so that u >= 0; the
imprint adds the mean of a to the image, as in Robbing the Fed, where the paper goes
back through a dense layer of large weights; a reconstruction is scaled to the
brightness of its bin, where a public demo scales it to its own maximum. The share above
is derived here. Labels are not sought.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gi_lib.copies import deep_copy
from gi_lib.models import with_front
from gi_lib.models.planted import own_images
from gi_lib.search import no_more
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    Observation,
    Reconstruction,
    real,
    whole,
)

MEASURE = "net.front.measure"
"""The dense layer of the bins."""
LIT = 1e-6
"""A bin's gradient, over the largest, above which it counts as lit."""


class Kernels(nn.Module):
    """x + mean_i clip(W_i K x + b_i, 0, 1), for images [B, C, H, W]."""

    def __init__(self, image_shape: tuple[int, int, int], clients: int, bins: int):
        super().__init__()
        c, h, w = image_shape
        self.kernels = nn.Conv2d(c, c * clients, 3, padding=1)
        self.measure = nn.Linear(c * clients * h * w, bins)

    def forward(self, x: Tensor) -> Tensor:
        a = F.hardtanh(self.measure(self.kernels(x).flatten(1)), 0.0, 1.0)
        return x + a.mean(1).view(-1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class Bins:
    """What was planted: for how many clients, and the brightness of each bin [k]."""

    clients: int
    brightness: Tensor


def kernels_planted(obs: Observation) -> str | None:
    """A model that LOKI has planted."""
    there = (
        isinstance(obs.trapdoor, Bins) and "net.front.measure.weight" in obs.gradient
    )
    if obs.trapdoor is None or there:
        return None
    return (
        "the update is not of a model that LOKI has planted; observe with the models"
        " and the trapdoor that `plant` returned"
    )


@dataclass(frozen=True)
class LOKI:
    needs: ClassVar[Needs] = Needs(("trapdoor",), model=(kernels_planted,))
    revision: ClassVar[int] = 1

    clients: int = 10  # Z, the demo
    bins: int = 256  # k, the demo: 4 for each of a client's images
    scale: float = 500.0  # S, the demo
    surrogates: int = 10_000  # images from which the quantiles are read

    def __post_init__(self):
        whole(self, "clients")
        whole(self, "bins", "surrogates", least=2)
        real(self, "scale", above=0)

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[list[Classifier], Bins]:
        """A model for each client, and the brightness of the bins."""
        use = "LOKI's bins are quantiles of the brightness of"
        images, _ = own_images(auxiliary, self.surrogates, rng, use)
        mean = images.flatten(1).double().mean(1).cpu()
        q, middle = (
            mean.quantile((torch.arange(n, dtype=torch.float64) + s) / self.bins)
            for n, s in ((self.bins + 1, 0.0), (self.bins, 0.5))
        )
        q[0], q[-1] = min(0.0, q[0].item()), max(1.0, q[-1].item())
        width = q.diff()
        if not (width > 0).all():
            raise ValueError(
                f"{self.bins} bins have no width on {self.surrogates} images: some have"
                " the same brightness; take fewer bins, or more surrogates"
            )
        c, n = image_shape[0], torch.Size(image_shape).numel()
        front = Kernels(image_shape, self.clients, self.bins).to(model.mean)
        with torch.no_grad():
            rows = 1 / (self.scale * n * width)
            front.measure.weight.copy_(rows[:, None].expand_as(front.measure.weight))
            front.measure.bias.copy_(-q[:-1] / width)
            for v in front.kernels.parameters():
                v.zero_()
        planted = with_front(model, front)
        sent = [deep_copy(planted) for _ in range(self.clients)]
        own: Any
        for z, own in enumerate(sent):
            kernels = own.net.front.kernels
            with torch.no_grad():
                for j in range(c):  # the mean and std of one channel, or of all
                    std, mu = (v.flatten().expand(c)[j] for v in (own.std, own.mean))
                    kernels.weight[z * c + j, j, 1, 1] = self.scale * std
                    kernels.bias[z * c + j] = self.scale * mu
        return sent, Bins(self.clients, middle.to(model.mean))  # type: ignore[return-value]

    def at_most(self, obs: Observation) -> int:
        """A bin gives each client one image; no more are lit than there are images."""
        return no_more(obs, self.clients * self.bins)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        dW, trap = obs.gradient[f"{MEASURE}.weight"], obs.trapdoor
        dW = dW.reshape(len(dW), trap.clients, *obs.image_shape).transpose(0, 1)
        size = dW.flatten(2).norm(dim=2)  # [Z, k]
        lit = size > LIT * size.max()
        factor = trap.brightness.to(dW) / dW.flatten(2).mean(2)
        images = (factor[:, :, None, None, None] * dW)[lit]
        most = size[lit].argsort(descending=True)[: self.at_most(obs)]
        images = images[most.sort().values].nan_to_num().clamp(0, 1)
        notes = {"lit_bins": int(lit.sum()), "clients_seen": int(lit.any(1).sum())}
        return Reconstruction(images, None, torch.nan, notes=notes)
