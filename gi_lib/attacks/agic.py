"""Approximate Gradient Inversion, AGIC (Xu, Hong, Huang, Chen, Decouchant, SRDS 2022).

arXiv:2204.13784.

The update of T local steps is taken for one gradient of all N images at w_0,

    (w_0 - w_T) / (eta T)  ~  g(x; w_0),

and the losses of all rounds r on the same data that are known are added up:

    min over x of  sum_r sum_l w_l (1 - cos(g_l(x; w_0^r), g*_l^r)) + alpha TV(x)

with a cosine for each layer l, whose weight w_l rises along the network.

No code of the authors was found, and the text at hand was the abstract: that weights
rise is from memory. Departs from the paper, as far as it is known: the weights rise in
equal steps from 1 at the first layer to `last` at the last one, their law and all
settings are ours, and optimiser, box and prior are those of Inverting Gradients. Means
stand in place of sums. The factor 1 / (eta T) drops out of a cosine. Labels are known,
or counted with the client's real steps.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.matching import layer_cosine
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
class AGIC:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 1

    steps: int = 1000
    lr: float = 0.1  # in the model's units
    tv: float = 0.01  # alpha
    last: float = 2.0  # w_l of the last layer, ours
    restarts: int = 1
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        real(self, "last", above=0)
        real(self, "tv")
        function(self, "label_rule")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        rounds = [o.one_gradient() for o in (*obs.earlier, obs)]

        def match(z):
            x = pixels.image(z)
            each = [
                layer_cosine(o.simulate(x, y), o.gradient, self.last) for o in rounds
            ]
            return torch.stack(each).mean()

        def loss(z):
            return match(z) + self.tv * total_variation(z)

        return search(
            rounds[-1],
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=gaussian(obs),
            loss=loss,
            match=match,
            image=pixels.image,
            labels=lambda z: y,
            optimiser=adam(self.lr, signed=True, drops=(3 / 8, 5 / 8, 7 / 8)),
            project=pixels.project,
            frames=self.frames,
        )
