"""GradInversion (Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, CVPR 2021).

arXiv:2104.07586.

From S seeds at once, each a whole batch x_s with labels read off the last layer,

    min over x_s of  a_g sum_l |g_l(x_s) - g*_l|_2 + a_tv TV(x_s) + a_l2 |x_s|_2
                     + a_bn sum_l ( |mu_l(x_s) - mu_l|_2 + |var_l(x_s) - var_l|_2 )
                     + a_group |x_s - E|_2

by Adam with cosine decay, and noise gamma_k a_n N(0, 1) after each step. mu_l and var_l
are the batch-norm statistics of the private batch. E is the consensus: the mean over
the seeds of their images, each first registered to the plain mean. It is renewed every
`renew` steps, and does not depend on x_s in between.

Departs from the paper, whose code is not public, so that weights and schedule are
second hand. An image is registered by the shift within an eighth of its side that
correlates best in brightness (phase correlation), not by RANSAC-flow. Where labels
repeat, the slots of a seed that share one are first matched to the first seed's by
least squares. Labels are counted (labels.infer); the paper's own rule, which sees no
repeats, is labels.column_min. a_n is .01 and not .2, which drowns short runs, as a
public framework also found. The seed of least gradient distance is returned.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib import labels
from gi_lib.copies import batch_norms
from gi_lib.matching import layer_l2, norm
from gi_lib.optimise import adam, cosine_decay
from gi_lib.parametrisations import Pixels
from gi_lib.priors import statistics_distance, total_variation
from gi_lib.search import gaussian, generators, search
from gi_lib.types import (
    Needs,
    Observation,
    Reconstruction,
    displayed,
    function,
    real,
    whole,
)

Seeds = Float[Tensor, "S B C H W"]


def normalises_batches(obs: Observation) -> str | None:
    """Batch norm in the model."""
    if batch_norms(obs.model):
        return None
    return "the model has no batch norm, whose statistics this attack matches"


def registered_mean(x: Seeds, y: Tensor) -> Tensor:
    """E [B, C, H, W]: the mean over seeds, each image shifted to fit the plain mean."""
    x = _same_slots(x, y)
    (h, w), device = x.shape[-2:], x.device
    grey, goal = (v.mean(-3) for v in (x, x.mean(0)))
    grey, goal = (v - v.mean((-2, -1), keepdim=True) for v in (grey, goal))
    cross = torch.fft.rfft2(goal) * torch.fft.rfft2(grey).conj()
    match = torch.fft.irfft2(cross / cross.abs().clamp_min(1e-12), s=(h, w))
    down, right = (torch.fft.fftfreq(n, 1 / n, device=device).abs() for n in (h, w))
    far = (down.round() > h // 8)[:, None] | (right.round() > w // 8)
    shifts = match.masked_fill(far, -torch.inf).flatten(-2).argmax(-1)[..., None]
    rows = (torch.arange(h, device=device) - shifts // w) % h
    columns = (torch.arange(w, device=device) - shifts % w) % w
    moved = x.gather(-2, rows[:, :, None, :, None].expand_as(x))
    return moved.gather(-1, columns[:, :, None, None, :].expand_as(x)).mean(0)


def _same_slots(x: Seeds, y: Tensor) -> Seeds:
    """Images of one label, in the order in which they are nearest to the first seed."""
    if len(y.unique()) == len(y):
        return x
    from scipy.optimize import linear_sum_assignment  # slow to import

    flat, other = x.flatten(2), (y[:, None] != y).to(x) * 1e9
    found = []
    for images, one in zip(x, flat, strict=True):
        cost = torch.cdist(flat[0], one).square() + other
        slots = linear_sum_assignment(cost.cpu().numpy())[1]
        found.append(images[torch.as_tensor(slots, device=x.device)])
    return torch.stack(found)


@dataclass(frozen=True)
class GradInversion:
    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size", "bn_stats"),
        model=(normalises_batches,),
        labels=True,
    )
    revision: ClassVar[int] = 1

    steps: int = 20_000
    lr: float = 0.1
    warm_up: int = 50
    gradient: float = 1e-3
    tv: float = 1e-4
    l2: float = 1e-6
    bn: float = 0.1
    group: float = 0.01
    group_start: float = 0.1  # share of the steps before the first consensus
    renew: int = 100
    noise: float = 0.01  # the paper's is .2, second hand
    restarts: int = 8  # S
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "renew", "restarts")
        whole(self, "warm_up", "frames", least=0)
        real(self, "lr", above=0)
        function(self, "label_rule")
        real(self, "gradient", "tv", "l2", "bn", "group", "group_start", "noise")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        rngs = generators(rng, self.restarts)
        E = torch.zeros(len(y), *obs.image_shape, device=obs.device, dtype=obs.dtype)
        pull = torch.zeros((), device=obs.device, dtype=obs.dtype)

        def match(z):
            return layer_l2(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z):
            statistics = statistics_distance(obs.model, pixels.image(z), obs.bn_stats)
            natural = self.tv * total_variation(z) + self.l2 * norm(z)
            group = self.bn * statistics + pull * norm(z - E)
            return self.gradient * match(z) + natural + group

        def each(k, variables, memory):
            [z] = variables
            size = self.noise * self.lr * cosine_decay(k / self.steps)
            for row, own in zip(z, rngs, strict=True):
                row.add_(torch.randn(row.shape, generator=own).to(row), alpha=size)
            since = k - math.ceil(self.group_start * self.steps)
            if len(z) > 1 and since >= 0 and since % self.renew == 0:
                E.copy_(registered_mean(z, y))
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
