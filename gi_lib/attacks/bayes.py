"""The Bayes-optimal attack (Balunovic, Dimitrov, Staab, Vechev, ICLR 2022).

arXiv:2111.04706.

    x* = argmax over x of  log p(g | x) + log p(x)

The law of the defense gives the first term: with noise N(0, sigma^2) it is
-|g(x) - g|^2 / (2 sigma^2), with Laplace noise of scale b it is -|g(x) - g|_1 / b. The
second is the prior: -tv TV(x) in the box [0, 1], which stands for the density of
images. Adam minimises fac(k) D + tv TV, where D is minus the first term and fac grows
from min(sigma^2 / 10, 1) to 1 by a constant factor a step over the first half of the
steps, and stays.

The threat model must grant the defense, and the defense must state its law. An update
without noise has no density; GaussianNoise(0) states a narrow normal law for it.

Departs from the paper: the public code takes the sum of squared differences for TV,
where this is the mean of absolute ones; it keeps x near the box by no term, or by a
penalty, where this clamps it; its step falls by 6 % each time, where this falls by a
cosine. Its noise is of each image alone, so that the variance of a batch's mean is
sigma^2 / B; noise here is of the whole update, whatever B. Restarts are stacked, and
the most probable one is returned.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.matching import Distance
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


def _law_of_the_noise(obs: Observation) -> str | None:
    """a defense that states the law of its noise"""
    law = getattr(obs.defense, "law", None)
    if law is None or law(obs.gradient) is None:
        return (
            f"{type(obs.defense).__name__} states no law of its noise, so that the"
            " likelihood of a guess is unknown; give the defense a method `law` (see"
            " defenses.Defense), or use InvertingGradients"
        )
    return None


@dataclass(frozen=True)
class BayesOptimal:
    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size", "defense"), (_law_of_the_noise,), labels=True
    )
    revision: ClassVar[int] = 1

    steps: int = 200  # public script: twice att_epochs
    lr: float = 0.5  # public script, in the model's units
    tv: float = 1000.0  # ours, by experiments/bayes.py; the script's 1 is of another TV
    start: float = 0.1  # public code: fac begins at start sigma^2, or at 1
    restarts: int = 1
    distance: Distance | None = None  # None: the law's; another is a mistaken law
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", "start", above=0)
        real(self, "tv")
        function(self, "label_rule")
        if self.distance is not None:
            function(self, "distance")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        surprise, sigma = obs.defense.law(obs.gradient)
        D = self.distance or surprise
        fac_0 = min(self.start * sigma**2, 1.0)

        def surprise_of(z):
            return D(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z, now):
            fac = torch.where(now < 0.5, fac_0 ** (1 - 2 * now), 1.0)
            return fac * surprise_of(z) + self.tv * total_variation(z)

        def posterior(z):
            return surprise_of(z) + self.tv * total_variation(z)

        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=gaussian(obs),
            loss=loss,
            match=posterior,
            image=pixels.image,
            labels=lambda z: y,
            optimiser=adam(self.lr, cosine=True),
            project=pixels.project,
            frames=self.frames,
        )
