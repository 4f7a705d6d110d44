"""Inverting Gradients (Geiping, Bauermeister, Droege, Moeller, NeurIPS 2020, arXiv:2003.14053).

    x* = argmin over x in [0, 1]^n of  1 - <g(x), g*> / (|g(x)| |g*|) + alpha TV(x)

by Adam on the sign of the gradient, the step cut by ten after 3/8, 5/8 and 7/8 of the steps. The
optimiser moves z = (x - mean) / std, the image as the model sees it: there it starts from N(0, 1),
there TV is taken, and there the box is clamped after each step, all as in the public code.

Needs: the batch size; labels are known, or inferred (idlg for one image, column_min for a batch).
Departs from the paper: restarts are stacked instead of run one after another, and the default takes
4,800 steps; the authors run up to 24,000.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.matching import Distance, cosine
from gi_lib.optimise import adam, best_of, minimise
from gi_lib.parametrisations import Pixels
from gi_lib.priors import total_variation
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
        obs.need(self, *self.needs)
        y = obs.labels
        if y is None:
            y = labels.idlg(obs) if obs.batch_size == 1 else labels.column_min(obs)
        pixels = Pixels(obs.model.mean, obs.model.std)
        R, B = self.restarts, obs.batch_size
        z = torch.randn(R, B, *obs.image_shape, generator=rng).to(obs.device, obs.dtype)

        def match(x):
            return self.distance(obs.simulate_rows(x, y.expand(len(x), B)), obs.gradient)

        found = minimise(
            lambda z: match(pixels.image(z)) + self.tv * total_variation(z),
            [z],
            optimiser=adam(self.lr, signed=True, drops=(3 / 8, 5 / 8, 7 / 8)),
            steps=self.steps,
            project=pixels.project,
            frames=self.frames,
        )
        x = pixels.image(found.variables[0]).clamp(0, 1)
        with torch.no_grad():
            losses = match(x)
        best = best_of(losses)
        frames = [pixels.image(z[best].to(x)).clamp(0, 1) for (z,) in found.frames]
        return Reconstruction(
            images=x[best],
            labels=y,
            loss=losses[best].item(),
            trace=found.trace,
            frames=torch.stack(frames) if frames else None,
            frame_steps=found.frame_steps,
            gradient_evaluations=found.evaluations + R,
        )
