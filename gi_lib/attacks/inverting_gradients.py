"""Inverting Gradients (Geiping, Bauermeister, Droege, Moeller, NeurIPS 2020, arXiv:2003.14053).

    x* = argmin over x in [0, 1]^n of  1 - <g(x), g*> / (|g(x)| |g*|) + alpha TV(x)

by Adam on the sign of the gradient, the step cut by ten after 3/8, 5/8 and 7/8 of the steps. The
optimiser moves z = (x - mean) / std, the image as the model sees it: there it starts from N(0, 1),
there TV is taken, and there the box is clamped after each step, all as in the public code.

Needs: the batch size; labels are known, or inferred (idlg for one image, column_min for a batch).
Departs from the paper: restarts are stacked instead of run one after another. The default of 4,800 steps is
that of the public script for the baselines; up to 24,000 are quoted second hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.matching import Distance, cosine
from gi_lib.optimise import adam, minimise
from gi_lib.parametrisations import Pixels
from gi_lib.priors import total_variation
from gi_lib.targets import Targets
from gi_lib.types import Observation, Reconstruction


@dataclass(frozen=True)
class InvertingGradients:
    needs: ClassVar[tuple[str, ...]] = ("update", "batch_size")

    steps: int = 4800
    lr: float = 0.1  # public code, in the model's units
    tv: float = 1e-4  # alpha, public code
    restarts: int = 1
    distance: Distance = cosine
    frames: int = 0  # snapshots kept for a slider

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        return self.many([obs], [rng])[0]

    def many(self, observations: Sequence[Observation], rngs: Sequence[torch.Generator]) -> list[Reconstruction]:
        """Attack several observations of the same model in one loop."""
        targets, obs = Targets(self, observations, rngs), observations[0]
        y = targets.rows([labels.infer(each) for each in observations])
        z = targets.normal(obs.batch_size, *obs.image_shape)
        pixels = Pixels(obs.model.mean, obs.model.std)

        def match(x, y, target):
            return self.distance(obs.simulate_rows(x, y), targets.gradient(target))

        found = minimise(
            lambda z, *row: match(pixels.image(z), *row) + self.tv * total_variation(z),
            [z],
            constants=[y, targets.index],
            optimiser=adam(self.lr, signed=True, drops=(3 / 8, 5 / 8, 7 / 8)),
            steps=self.steps,
            project=pixels.project,
            rank=lambda z, *row: match(pixels.image(z).clamp(0, 1), *row),
            frames=self.frames,
            at_once=obs.at_once,
        )
        return targets.reconstructions(found, lambda z: pixels.image(z).clamp(0, 1), lambda row, z: y[row])
