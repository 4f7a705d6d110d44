"""HF-GradInv (Ye, Luo, Zhou, Tang, AAAI 2024).

High-Fidelity Gradient Inversion; settings of the authors' code for a ResNet-34.

    min over x of  1 - <m g(x), m g*> / (|m g(x)| |m g*|) + a_tv TV(x)
                   + a_bn sum_l w_l ( |mu_l(x) - mu_l|_2 + |var_l(x) - var_l|_2 )

The mask m is drawn anew in each step: it keeps 70 % of the entries of the parameters of
index >= n, at first the deepest few, and more as n falls. TV and the batch statistics
enter later in the run; w is 1.3 at the first layer, 3 at the second, else 1. Adam sees
in place of the gradient v

    .8 clamp(round(s v) / 2, -1, 1) + .2 sign(v),   s = 2 / median |v|,

twice that in the first steps. The statistics are those of the private batch where the
threat model grants them, as the survey of Carletti et al. lists this attack; else the
running ones of the model, which is what the authors' configuration takes.

Departs from the code: all steps and indices are shares, so that other networks and
shorter runs keep the schedule (of ResNet-34's 110 parameters and 15,000 steps). The
step drops by ten after 3/8, 5/8 and 7/8 of the steps, as in the framework that the code
rests on. The last iterate is returned, by the unmasked distance; the code keeps the
best since the last 500 steps. Labels are known, or counted by labels.infer; the code
seeks repeated ones by a genetic search that needs data of the attacker's own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.attacks.gradinversion import normalises_batches
from gi_lib.copies import running_statistics
from gi_lib.matching import TINY, cosine
from gi_lib.optimise import adam, squashed
from gi_lib.parametrisations import Pixels
from gi_lib.priors import statistics_distance, total_variation
from gi_lib.search import gaussian, search
from gi_lib.types import (
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    displayed,
    real,
    whole,
)

FIRST_LAYERS = (1.3, 3.0)
"""Weights of the statistics of the first batch norms."""
DOUBLED = 100 / 15_000
"""Share of the steps in which the gradient counts twice."""


def quantised(v: Tensor, now: Tensor) -> Tensor:
    """What Adam sees of the gradient v [S, ...]; the median is that of a row.

    Where the median is 0, as with half of the gradient gone, only the sign is left.
    """
    median = v.abs().flatten(1).median(1).values.view(-1, *[1] * (v.ndim - 1))
    steps = (v * (2 / median.clamp_min(TINY))).round() / 2
    seen = 0.8 * steps.clamp(-1, 1) + 0.2 * v.sign()
    return seen * torch.where(now < DOUBLED, 2.0, 1.0)


@dataclass(frozen=True)
class HFGradInv:
    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size"), model=(normalises_batches,), labels=True
    )
    revision: ClassVar[int] = 1

    steps: int = 15_000
    lr: float = 0.1
    keep: float = 0.7  # of the entries, in each step
    shallow: float = 100 / 110  # share of the parameters that are left out at first
    deep: float = 25 / 110  # and at last
    growths: int = 8  # how often more of them enter, 500 steps apart
    grown: float = 4000 / 15_000  # share of the steps after which all have
    tv: float = 5e-3
    tv_start: float = 3000 / 15_000
    bn: float = 1e-4
    bn_start: float = 5000 / 15_000
    restarts: int = 1
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "growths", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", "keep", "grown", above=0)
        real(self, "shallow", "deep", "tv", "tv_start", "bn", "bn_start")
        if not (self.keep <= 1 and self.deep <= self.shallow < 1):
            raise ValueError(
                "HFGradInv needs keep <= 1 and deep <= shallow < 1, all shares, got"
                f" {self.keep}, {self.deep} and {self.shallow}"
            )
        if not self.bn:  # then no statistics are asked for
            less = Needs(("client", "batch_size"), labels=True)
            object.__setattr__(self, "needs", less)

    def left_out(self, k: int, count: int) -> int:
        """n: of so many parameters, the first index that is matched in step k."""
        grown = min(1.0, k / self.steps / self.grown)
        done = int(grown * self.growths) / self.growths
        return int((self.shallow - (self.shallow - self.deep) * done) * count)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        statistics = obs.bn_stats or running_statistics(obs.model)
        if self.bn and not statistics:
            raise NotApplicableError(
                "HFGradInv matches batch-norm statistics: the threat model withholds"
                " those of the batch, and the model keeps no running ones; set bn=0"
            )
        m = {name: torch.zeros_like(g) for name, g in obs.gradient.items()}

        def draw(k):
            n = self.left_out(k, len(m))
            for index, mask in enumerate(m.values()):
                if index >= n:
                    mask.copy_(torch.rand(mask.shape, generator=rng) < self.keep)

        def masked(gradient):
            return {name: mask * gradient[name] for name, mask in m.items()}

        def match(z):
            return cosine(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z, now):
            x = pixels.image(z)
            total = cosine(masked(obs.simulate(x, y)), masked(obs.gradient))
            smooth = torch.where(now >= self.tv_start, self.tv, 0.0)
            total = total + smooth * total_variation(z)
            if self.bn:
                near = torch.where(now >= self.bn_start, self.bn, 0.0)
                apart = statistics_distance(obs.model, x, statistics, FIRST_LAYERS)
                total = total + near * apart
            return total

        draw(0)
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
            optimiser=squashed(adam(self.lr, drops=(3 / 8, 5 / 8, 7 / 8)), quantised),
            project=pixels.project,
            each=lambda k, variables, memory: draw(k + 1),
            frames=self.frames,
        )
