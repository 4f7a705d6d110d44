"""GradInversion (Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, CVPR 2021, arXiv:2104.07586).

From S seeds at once, each a whole batch x_s with the labels of column_min,

    min over x_s of  a_g sum_l |g_l(x_s) - g*_l|_2 + a_tv TV(x_s) + a_l2 |x_s|_2
                     + a_bn sum_l ( |mu_l(x_s) - mu_l|_2 + |var_l(x_s) - var_l|_2 ) + a_group |x_s - E|_2

by Adam with cosine decay and noise lr_k a_n N(0, 1) after each step. mu_l and var_l are the batch-norm statistics of
the private batch. E is the consensus: the mean over the seeds of their images, each first registered to the plain
mean. It is renewed every `renew` steps, and nothing of it depends on x_s in between.

Departs from the paper, whose code is not public; weights and schedule are second hand. An image is registered by the
shift within an eighth of its side that correlates best in brightness (phase correlation), not by RANSAC-flow. Where
labels repeat, the slots of a seed that share one are first matched to the first seed's by least squares. Noise is .01
of the rate, since .2 drowns short runs, as a public framework also found. The seed of least gradient distance is returned.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gi_lib import labels
from gi_lib.copies import batch_norms
from gi_lib.matching import layer_l2, norm
from gi_lib.optimise import adam, cosine_decay
from gi_lib.parametrisations import Pixels
from gi_lib.priors import statistics_distance, total_variation
from gi_lib.search import gaussian, generators, search
from gi_lib.types import Needs, Observation, Reconstruction, displayed, real, whole

Seeds = Float[Tensor, "S B C H W"]


def normalises_batches(obs: Observation) -> str | None:
    """Batch norm in the model."""
    return None if batch_norms(obs.model) else "the model has no batch norm, whose statistics this attack matches"


def registered_mean(x: Seeds, y: Tensor) -> Tensor:
    """E [B, C, H, W]: the mean over the seeds, each image shifted to where it fits the plain mean best."""
    x = _same_slots(x, y)
    coarse, (h, w) = x.mean(0), x.shape[-2:]
    grey, goal = (v.mean(-3) - v.mean((-3, -2, -1))[..., None, None] for v in (x, coarse))
    cross = torch.fft.rfft2(goal) * torch.fft.rfft2(grey).conj()
    match = torch.fft.irfft2(cross / cross.abs().clamp_min(1e-12), s=(h, w))
    down, across = (torch.fft.fftfreq(n, 1 / n, device=x.device).round().abs() <= n // 8 for n in (h, w))
    match = match.masked_fill(~(down[:, None] & across), -torch.inf).flatten(-2)
    shifts = match.argmax(-1)
    rows = (torch.arange(h, device=x.device) - (shifts // w)[..., None]) % h
    columns = (torch.arange(w, device=x.device) - (shifts % w)[..., None]) % w
    moved = x.gather(-2, rows[:, :, None, :, None].expand_as(x))
    return moved.gather(-1, columns[:, :, None, None, :].expand_as(x)).mean(0)


def _same_slots(x: Seeds, y: Tensor) -> Seeds:
    """Images of one label in the order in which they are nearest to the first seed's."""
    if len(y.unique()) == len(y):
        return x
    flat, other = x.flatten(2), (y[:, None] != y).to(x) * 1e9
    order = [linear_sum_assignment((torch.cdist(flat[0], one).square() + other).cpu().numpy())[1] for one in flat]
    return torch.stack([one[torch.as_tensor(slots, device=x.device)] for one, slots in zip(x, order, strict=True)])


@dataclass(frozen=True)
class GradInversion:
    needs: ClassVar[Needs] = Needs(("client", "batch_size", "bn_stats"), model=(normalises_batches, labels.readable))
    revision: ClassVar[int] = 1

    steps: int = 20_000
    lr: float = 0.1
    warm_up: int = 50
    gradient: float = 1e-3
    tv: float = 1e-4
    l2: float = 1e-6
    bn: float = 0.1
    group: float = 0.01
    group_start: float = 0.1  # share of the steps before the first consensus; 2,000 of 20,000
    renew: int = 100
    noise: float = 0.01  # the paper's is .2, second hand
    restarts: int = 8  # S
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "renew", "restarts")
        whole(self, "warm_up", "frames", least=0)
        real(self, "lr", above=0)
        real(self, "gradient", "tv", "l2", "bn", "group", "group_start", "noise")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        E, pull = gaussian(obs)(1, torch.Generator())[0], torch.zeros((), device=obs.device, dtype=obs.dtype)

        def match(z):
            return layer_l2(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z):
            x, prior = pixels.image(z), self.tv * total_variation(z) + self.l2 * norm(z)
            statistics = statistics_distance(obs.model, x, obs.bn_stats)
            return self.gradient * match(z) + prior + self.bn * statistics + pull * norm(z - E)

        def each(k, variables, memory):
            [z] = variables
            rate = self.lr * cosine_decay(k / self.steps)
            for row, own in zip(z, rngs, strict=True):
                row += rate * self.noise * torch.randn(row.shape, generator=own).to(row)
            if k >= self.group_start * self.steps and k % self.renew == 0 and len(z) > 1:
                E.copy_(registered_mean(z, y))
                pull.fill_(self.group)

        start = gaussian(obs)(self.restarts, rng)
        rngs = generators(rng, self.restarts)
        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=lambda rows, rng: start,
            loss=loss,
            match=match,
            image=pixels.image,
            labels=lambda z: y,
            optimiser=adam(self.lr, cosine=True, warm_up=self.warm_up),
            project=pixels.project,
            each=each,
            frames=self.frames,
        )
