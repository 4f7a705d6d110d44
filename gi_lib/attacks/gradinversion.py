"""GradInversion (Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, CVPR 2021).

arXiv:2104.07586.

From S seeds at once, each a whole batch x_s with labels read off the last layer,

    min over x_s of  a_g sum_l |g_l(x_s) - g*_l|_2 + a_tv TV(x_s) + a_l2 |x_s|_2
                     + a_bn sum_l ( |mu_l(x_s) - mu_l|_2 + |var_l(x_s) - var_l|_2 )
                     + a_group |x_s - E|_2

by Adam with cosine decay, and noise gamma_k a_n N(0, 1) after each step. mu_l and var_l
are the batch-norm statistics of the private batch, which the threat model must grant
unless `bn` is 0. E is the consensus: the mean over the seeds of their images, each
first registered to those before it. It is renewed every `renew` steps, and does not
depend on x_s in between. `consensus=plain_mean` is the paper's "lazy" one.

The labels are those that are known, or the paper's: the B classes whose row of the last
layer's weight gradient has the smallest minimum, which sees no repeats.
`label_rule=labels.infer` counts them.

Departs from the paper, whose code is not public, so that weights and schedule are
second hand. An image is registered by the shift of whole pixels at which it correlates
best in brightness (by scikit-image), and not by RANSAC-flow; to the mean of the seeds
before it, and not to the mean of all, which holds the image itself, and by its noise
holds it in place. One that would move by more than an eighth of its side is left where
it is. Where known labels repeat, the slots of a seed that share one first change places
with each other, so that they are nearest to the first seed's by least squares. A seed
that is no longer finite is left out of E. a_n is .01 and not .2, which drowns short
runs, as a public framework also found. The seed of least gradient distance is returned.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gi_lib import labels
from gi_lib.copies import batch_norms
from gi_lib.matching import layer_l2, norm
from gi_lib.optimise import adam, cosine_decay
from gi_lib.parametrisations import Pixels
from gi_lib.priors import statistics_distance, total_variation
from gi_lib.search import gaussian, generators, search
from gi_lib.types import (
    Images,
    Labels,
    Needs,
    Observation,
    Reconstruction,
    displayed,
    function,
    real,
    whole,
)

Seeds = Float[Tensor, "S B C H W"]
Consensus = Callable[[Tensor], Tensor]
"""Seeds -> E [B, C, H, W]."""


def normalises_batches(obs: Observation) -> str | None:
    """Batch norm in the model."""
    if batch_norms(obs.model):
        return None
    return "the model has no batch norm, whose statistics are matched; set bn=0"


def distinct(obs: Observation) -> Labels:
    """The labels that are known, or else those of the column minimum."""
    return labels.column_min(obs) if obs.labels is None else obs.labels


def plain_mean(x: Seeds) -> Images:
    """The mean over seeds, pixel by pixel: the paper's "lazy" consensus."""
    return x.mean(0)


def registered_mean(x: Seeds) -> Images:
    """The mean over seeds, each image shifted to fit the mean of those before it."""
    from skimage.registration import phase_cross_correlation  # slow to import

    moved, (S, B, _, H, W) = x.clone(), x.shape
    grey = x.mean(2).cpu().numpy()
    for s, i in itertools.product(range(1, S), range(B)):
        pair = grey[:s, i].mean(0), grey[s, i]
        shift, _, _ = phase_cross_correlation(*pair, normalization=None)
        down, right = (int(n) for n in shift)
        if abs(down) <= H // 8 and abs(right) <= W // 8:
            moved[s, i] = x[s, i].roll((down, right), (-2, -1))
            grey[s, i] = np.roll(grey[s, i], (down, right), (-2, -1))
    return moved.mean(0)


def like_the_first(x: Seeds, y: Labels) -> Int[Tensor, "S B"]:
    """Which slot of each seed has the image that is nearest to the first seed's.

    Only slots of one label may change places.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    flat, other = x.flatten(2), (y[:, None] != y).to(x) * 1e9
    costs = [torch.cdist(flat[0], one).square() + other for one in flat]
    slots = [linear_sum_assignment(cost.cpu().numpy())[1] for cost in costs]
    return torch.stack([torch.as_tensor(order, device=x.device) for order in slots])


def change_places(x: Seeds, y: Labels, memory: dict[str, list[Tensor]]) -> None:
    """Order the slots of all seeds alike, where labels repeat.

    In place, and in the optimiser's memory of them too.
    """
    if len(y.unique()) < len(y):
        rows = torch.arange(len(x), device=x.device)[:, None]
        order = like_the_first(x.nan_to_num(), y)
        for v in (x, *itertools.chain(*memory.values())):
            v.copy_(v[rows, order])


@dataclass(frozen=True)
class GradInversion:
    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size", "bn_stats"),
        model=(normalises_batches,),
        labels=True,
    )
    revision: ClassVar[int] = 3

    steps: int = 20_000
    lr: float = 0.1
    warm_up: int = 50
    gradient: float = 1e-3
    tv: float = 1e-4
    l2: float = 1e-6
    bn: float = 0.1
    group: float = 0.01
    consensus: Consensus = registered_mean
    group_start: float = 0.1  # share of the steps before the first consensus
    renew: int = 100
    noise: float = 0.01  # the paper's is .2, second hand
    restarts: int = 8  # S
    label_rule: labels.LabelRule = distinct
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "renew", "restarts")
        whole(self, "warm_up", "frames", least=0)
        real(self, "lr", above=0)
        function(self, "consensus", "label_rule")
        real(self, "gradient", "tv", "l2", "bn", "group", "group_start", "noise")
        if not self.bn:  # then no statistics are asked for
            less = Needs(("client", "batch_size"), labels=True)
            object.__setattr__(self, "needs", less)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        rngs = generators(rng, self.restarts)
        E = torch.zeros(len(y), *obs.image_shape, device=obs.device, dtype=obs.dtype)
        pull = torch.zeros((), device=obs.device, dtype=obs.dtype)

        def match(z):
            return layer_l2(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z):
            total = self.gradient * match(z) + self.tv * total_variation(z)
            total = total + self.l2 * norm(z) + pull * norm(z - E)
            if self.bn:
                x, known = pixels.image(z), obs.bn_stats
                total = total + self.bn * statistics_distance(obs.model, x, known)
            return total

        def each(k, variables, memory):
            [z] = variables
            size = self.noise * self.lr * cosine_decay(k / self.steps)
            for row, own in zip(z, rngs, strict=True):
                row.add_(torch.randn(row.shape, generator=own).to(row), alpha=size)
            since = k - math.ceil(self.group_start * self.steps)
            if self.group and since >= 0 and since % self.renew == 0:
                change_places(z, y, memory)
                sound = z[z.flatten(1).isfinite().all(1)]
                if len(sound) > 1:
                    E.copy_(self.consensus(sound))
                    pull.fill_(self.group)

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
            optimiser=adam(self.lr, cosine=True, warm_up=self.warm_up),
            project=pixels.project,
            each=each,
            frames=self.frames,
        )
