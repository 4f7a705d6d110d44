"""Self-Adaptive Privacy Attack from Gradients, SAPAG (Wang, Deng, Guo, Wang, Meng, Liu,
Ding, Rajasekaran, 2020).

arXiv:2009.06228.

    x* = argmin over x of  sum_l 1 - exp(-mean (g_l(x) - g*_l)^2 / (w^2 Var(g*_l)))

by AdamW, over the parameters l of the model: a Gaussian kernel whose width adapts to
each of them. The label is read off the last layer's gradient. The search begins with
N(0, 1), in the units that the network sees.

No code of the authors was found, and the text at hand was the abstract: the formula is
from memory, and the settings are ours. The paper may weigh the layers, which are all
equal here, and sum over the entries of a layer: with a sum over some thousand entries
the exponential is 0 and so is its derivative, and we take the mean.
Departs from the paper: w falls from `wide` to 1, geometrically over the steps, since
a start beyond the kernel's width feels no pull (wide=1 keeps it fixed); pixels are
clamped to [0, 1] after each step; restarts are stacked, and the one with the smallest
loss at w = 1 is returned. `tv` adds a prior, which the survey's tuned setting chooses.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.matching import gaussian_kernel
from gi_lib.optimise import adam
from gi_lib.parametrisations import Pixels
from gi_lib.priors import total_variation
from gi_lib.search import gaussian, search
from gi_lib.types import (
    Needs,
    Observation,
    Reconstruction,
    displayed,
    function,
    real,
    whole,
)


@dataclass(frozen=True)
class SAPAG:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 2

    steps: int = 3000
    lr: float = 0.1
    decay: float = 0.01  # of the weights, torch's default for AdamW
    wide: float = 10.0  # w at the start: a hundred times the variance
    tv: float = 0.0  # the paper has no prior
    restarts: int = 1
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        real(self, "decay", "tv")
        real(self, "wide", least=1)
        function(self, "label_rule")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)

        def match(z, w=1.0):
            return gaussian_kernel(obs.simulate(pixels.image(z), y), obs.gradient, w)

        def loss(z, now):
            return match(z, self.wide ** (1 - now)) + self.tv * total_variation(z)

        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=gaussian(obs),
            loss=loss,
            match=match,
            image=pixels.image,
            labels=lambda z: y,
            optimiser=adam(self.lr, decay=self.decay),
            project=pixels.project,
            frames=self.frames,
        )
