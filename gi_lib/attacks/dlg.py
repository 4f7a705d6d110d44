"""Deep Leakage from Gradients, DLG (Zhu, Liu, Han, NeurIPS 2019, arXiv:1906.08935).

    x*, y* = argmin over x, y of  | g(x, softmax(y)) - g* |^2

by L-BFGS with step length 1, from x and y drawn from N(0, 1). What is drawn and moved
is x in the units that the network sees: where the model normalises its input, L-BFGS
in pixels is another search, and a worse one.

The loss contains a gradient, so that its own gradient needs the model's second
derivatives. ReLU has none but at its corner, where the loss jumps: the authors ask for
a smooth model. On some networks with ReLU the search succeeds all the same.

With known labels only x is sought.
Departs from the paper: restarts are stacked and the one with the smallest loss is
returned; images are clipped to [0, 1] at the end. Settings are those of the authors'
public code.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from gi_lib.matching import squared_l2
from gi_lib.optimise import lbfgs
from gi_lib.parametrisations import Pixels
from gi_lib.search import gaussian, search
from gi_lib.types import Needs, Observation, Reconstruction, displayed, real, whole

_PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh)


@dataclass(frozen=True)
class DLG:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"))
    revision: ClassVar[int] = 3

    steps: int = 300  # public code; each of up to max_iter iterations
    lr: float = 1.0  # torch's default, as in the public code
    max_iter: int = 20  # torch's default, as in the public code
    history: int = 100  # torch's default, as in the public code
    restarts: int = 1
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "max_iter", "history", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        _warn_of_kinks(obs)
        pixels = Pixels(obs.model.mean, obs.model.std)
        known, start = obs.labels, [gaussian(obs)]
        if known is None:
            start.append(gaussian(obs, obs.batch_size or 1, obs.num_classes))

        def match(x, *y):
            labels = y[0].softmax(-1) if known is None else known
            return squared_l2(obs.simulate(x, labels), obs.gradient)

        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=start,
            loss=lambda z, *y: match(pixels.image(z), *y),
            match=lambda z, *y: match(pixels.image(z).clamp(0, 1), *y),
            image=lambda z, *y: pixels.image(z),
            labels=lambda z, *y: y[0].argmax(-1) if known is None else known,
            optimiser=lbfgs(self.lr, max_iter=self.max_iter, history=self.history),
            frames=self.frames,
        )


def _warn_of_kinks(obs: Observation) -> None:
    if any(isinstance(layer, _PIECEWISE_LINEAR) for layer in obs.model.modules()):
        warnings.warn(
            "DLG needs second derivatives of the model, and its ReLU-like layers have"
            " none almost everywhere: it may stall or blow up; compare with"
            " InvertingGradients, or a smooth activation",
            stacklevel=3,
        )
