"""Client Privacy Leakage, CPL (Wei, Liu, Loper, Chow, Gursoy, Truex, Wu, ESORICS 2020).

arXiv:2004.10397.

    x* = argmin over x of  | g(x, y) - g* |^2 + alpha | p(x) - y |^2

by L-BFGS with step length 1, where y is the one-hot label, read off the last layer's
gradient, and p(x) the model's probabilities. The search begins with a pattern, a patch
of U(0, 1) tiled over the image, instead of noise, in the units that the network sees.

The authors' notebooks leave alpha at 0, and so does the default; `breaching`, a public
framework, has 1 with the cross-entropy. Wherever the model is not sure of the label
of the private image, a positive alpha moves the minimum away from that image.
Departs from the paper: the label is found by `label_rule` (the notebooks sum rows of
the weights); restarts are stacked. Images are clipped to [0, 1] at the end, as DLG's
are: L-BFGS compares gradients between its own points, which a box would move.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.matching import squared_l2
from gi_lib.optimise import lbfgs
from gi_lib.parametrisations import Pixels
from gi_lib.priors import label_distance
from gi_lib.search import patterned, search
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
class CPL:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 2

    pattern: int = 16  # side of the patch in pixels, the authors' notebooks
    label: float = 0.0  # alpha
    steps: int = 300  # notebooks; each of up to max_iter iterations
    lr: float = 1.0  # torch's default, as in the notebooks
    max_iter: int = 20  # torch's default, as in the notebooks
    history: int = 100  # torch's default, as in the notebooks
    restarts: int = 1
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "pattern", "steps", "max_iter", "history", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        real(self, "label")
        function(self, "label_rule")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)

        def match(x):
            return squared_l2(obs.simulate(x, y), obs.gradient)

        def loss(z):
            x = pixels.image(z)
            if not self.label:
                return match(x)
            return match(x) + self.label * label_distance(obs.model, x, y)

        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=patterned(obs, self.pattern),
            loss=loss,
            match=lambda z: match(pixels.image(z).clamp(0, 1)),
            image=pixels.image,
            labels=lambda z: y,
            optimiser=lbfgs(self.lr, max_iter=self.max_iter, history=self.history),
            frames=self.frames,
        )
