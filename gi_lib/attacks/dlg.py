"""Deep Leakage from Gradients, DLG (Zhu, Liu, Han, NeurIPS 2019, arXiv:1906.08935).

    x*, y* = argmin over x, y of  | g(x, softmax(y)) - g* |^2

by L-BFGS with step length 1, from x and y drawn from N(0, 1). The loss contains a gradient, so that its
own gradient needs the model's second derivatives. ReLU has none but at its corner, where the loss jumps:
the authors ask for a smooth model. On some networks with ReLU the search succeeds all the same.

Needs: the batch size. With known labels only x is sought.
Departs from the paper: restarts are stacked and the one with the smallest loss is returned; images
are clipped to [0, 1] at the end. Settings are those of the authors' public code.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from gi_lib.matching import squared_l2
from gi_lib.optimise import lbfgs, minimise
from gi_lib.targets import Targets
from gi_lib.types import Observation, Reconstruction

_PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh)


@dataclass(frozen=True)
class DLG:
    needs: ClassVar[tuple[str, ...]] = ("update", "batch_size")

    steps: int = 300  # public code; each of up to max_iter iterations
    lr: float = 1.0  # torch's default, as in the public code
    max_iter: int = 20  # torch's default, as in the public code
    history: int = 100  # torch's default, as in the public code
    restarts: int = 1
    frames: int = 0  # snapshots kept for a slider

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        return self.many([obs], [rng])[0]

    def many(self, observations: Sequence[Observation], rngs: Sequence[torch.Generator]) -> list[Reconstruction]:
        """Attack several observations of the same model in one loop."""
        targets, obs = Targets(self, observations, rngs), observations[0]
        if any(isinstance(layer, _PIECEWISE_LINEAR) for layer in obs.model.modules()):
            warnings.warn(
                "DLG needs second derivatives of the model, and its ReLU-like layers have none almost"
                " everywhere: it may stall or blow up; compare with InvertingGradients, or a smooth activation",
                stacklevel=3,
            )
        known = [each.labels for each in observations if each.labels is not None]
        x = targets.normal(obs.batch_size, *obs.image_shape)
        y = targets.rows(known) if known else targets.normal(obs.batch_size, obs.num_classes)

        def loss(x, y, target):
            g = obs.simulate_rows(x, y if known else y.softmax(-1))
            return squared_l2(g, targets.gradient(target))

        found = minimise(
            loss,
            [x] if known else [x, y],
            constants=[y, targets.index] if known else [targets.index],
            optimiser=lbfgs(self.lr, max_iter=self.max_iter, history=self.history),
            steps=self.steps,
            rank=lambda x, *row: loss(x.clamp(0, 1), *row),
            frames=self.frames,
            at_once=obs.at_once,
        )
        return targets.reconstructions(
            found,
            lambda x: x.clamp(0, 1),
            lambda row, *variables: y[row] if known else variables[1].argmax(-1),
        )
