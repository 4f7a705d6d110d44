"""Deep Leakage from Gradients, DLG (Zhu, Liu, Han, NeurIPS 2019, arXiv:1906.08935).

    x*, y* = argmin over x, y of  | g(x, softmax(y)) - g* |^2

by L-BFGS with step length 1, from x and y drawn from N(0, 1). It is second order twice over: the
loss contains a gradient, so that its own gradient needs the model's second derivatives, which a
piecewise linear network (ReLU) has almost nowhere.

Needs: the batch size. With known labels only x is sought.
Departs from the paper: restarts are stacked and the one with the smallest loss is returned; images
are clipped to [0, 1] at the end. Settings are those of the authors' public code.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from gi_lib.matching import squared_l2
from gi_lib.optimise import best_of, lbfgs, minimise
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
        obs.need(self, *self.needs)
        if any(isinstance(layer, _PIECEWISE_LINEAR) for layer in obs.model.modules()):
            warnings.warn(
                "DLG needs second derivatives of the model, and its ReLU-like layers have none almost"
                " everywhere: it may stall or blow up; use InvertingGradients, or a smooth activation",
                stacklevel=2,
            )
        R, B, K = self.restarts, obs.batch_size, obs.num_classes
        x = torch.randn(R, B, *obs.image_shape, generator=rng).to(obs.device, obs.dtype)
        y = torch.randn(R, B, K, generator=rng).to(obs.device, obs.dtype)
        known = obs.labels

        def loss(x, y=None):
            target = y.softmax(-1) if known is None else known.expand(len(x), B)
            return squared_l2(obs.simulate_rows(x, target), obs.gradient)

        found = minimise(
            loss,
            [x, y] if known is None else [x],
            optimiser=lbfgs(self.lr, max_iter=self.max_iter, history=self.history),
            steps=self.steps,
            frames=self.frames,
        )
        x, *y = found.variables
        x = x.clamp(0, 1)
        with torch.no_grad():
            losses = loss(x, *y)
        best = best_of(losses)
        frames = [frame[0][best].clamp(0, 1) for frame in found.frames]
        return Reconstruction(
            images=x[best],
            labels=y[0][best].argmax(-1) if y else known,
            loss=losses[best].item(),
            trace=found.trace,
            frames=torch.stack(frames) if frames else None,
            frame_steps=found.frame_steps,
            gradient_evaluations=found.evaluations + R,
        )
