"""Inverting Gradients (Geiping, Bauermeister, Droege, Moeller, NeurIPS 2020).

arXiv:2003.14053.

    x* = argmin over x in [0, 1]^n of  1 - <g(x), g*> / (|g(x)| |g*|) + alpha TV(x)

by Adam on the sign of the gradient, the step cut by ten after 3/8, 5/8 and 7/8 of the
steps. The optimiser moves z = (x - mean) / std, the image as the model sees it: there
it starts from N(0, 1), there TV is taken, and there the box is clamped after each step,
all as in the public code.

Labels are known, or inferred: by the sign rule for one image, counted for more.
With `label_rule=None` those that are unknown are sought: softmax(u) of a u [B, K] from
N(0, 1) that moves along with z, as the public code has it for batches.
Departs from the paper: restarts are stacked instead of run one after another. The
public code seeks one soft label that all images of the batch share, and takes no sign
of its gradient; here each image has its own, and the sign is taken of all. The default
of 4,800 steps is that of the public script for the baselines; up to 24,000 are quoted
second hand.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.matching import Distance, cosine
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
class InvertingGradients:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 1

    steps: int = 4800
    lr: float = 0.1  # public code, in the model's units
    tv: float = 1e-4  # alpha, public code
    restarts: int = 1
    distance: Distance = cosine
    label_rule: labels.LabelRule | None = labels.infer  # None: labels are sought
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        function(self, "distance")
        if self.label_rule is not None:
            function(self, "label_rule")
        real(self, "tv")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        pixels, start = Pixels(obs.model.mean, obs.model.std), [gaussian(obs)]
        known = obs.labels if self.label_rule is None else self.label_rule(obs)
        if known is None:
            start.append(gaussian(obs, obs.batch_size or 1, obs.num_classes))

        def match(z, *u):
            y = u[0].softmax(-1) if known is None else known
            return self.distance(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z, *u):
            return match(z, *u) + self.tv * total_variation(z)

        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=start,
            loss=loss,
            match=match,
            image=lambda z, *u: pixels.image(z),
            labels=lambda z, *u: u[0].argmax(-1) if known is None else known,
            optimiser=adam(self.lr, signed=True, drops=(3 / 8, 5 / 8, 7 / 8)),
            project=lambda z, *u: pixels.project(z),
            frames=self.frames,
        )
