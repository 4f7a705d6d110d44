"""E2EGI (Li, Wang, Chen, Zhang, Shafiq, Gu, IEEE JBHI 2023).

End-to-End Gradient Inversion; settings of the authors' code.

From S seeds, each a whole batch x_s, with D the gradient distance (cosine),

    min over x_s of  D(g(x_s), g*) + a_tv TV(x_s) + a_group mean (x_s - X)^2
                     + a_bn sum_l ( |mu_l(x_s) - mu_l|_2 + |var_l(x_s) - var_l|_2 )

by Adam on the sign of the gradient, with noise gamma_k a_n N(0, 1) after each step. X
is the minimum-loss combination: the best seed's batch, in which for each slot i and
each seed s the image x_s[i] is put in slot i, and stays if D of the whole batch falls.
So D(X) is never above the best seed's. Three phases: each seed alone (30 % of the
steps); with the pull to X, which is combined anew at the beginning and after each of
some blocks (30 %); one run from the last X, without pull and noise (40 %). The step
decays by a cosine over all of them. Labels are known, or counted.

`combine=best_seed` leaves the combination out: X is then the best seed's batch. The
`losses` are D of each seed when the last X was made of them, and the `notes` hold
D of X then, "combined", and the least of the seeds', "best_seed".

Departs from the code: the last phase starts from the last combination, which the code
computes and throws away. There the iterate of the least objective is kept, not that of
the least D. Blocks are shares of the steps, not 1,000 of them. Where labels repeat, the
slots of a seed that share one first change places, as in GradInversion. Nothing is
distributed: that form gives the gradients of one large batch. The last phase starts
with an empty memory of Adam. Batch statistics are asked for unless `bn` is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.attacks.gradinversion import Seeds, change_places, normalises_batches
from gi_lib.execution import OneGuess, at_once
from gi_lib.matching import Distance, cosine
from gi_lib.optimise import adam, cosine_decay, minimise
from gi_lib.parametrisations import Pixels
from gi_lib.priors import statistics_distance, total_variation
from gi_lib.search import best_of, gaussian, generators, search
from gi_lib.types import (
    Images,
    Needs,
    Observation,
    Reconstruction,
    Rows,
    displayed,
    function,
    real,
    whole,
)


class Combined(NamedTuple):
    """A batch made of those of the seeds.

    `losses` are the seeds' own [S], `loss` is that of the batch, and `evaluations` is
    how many losses it took.
    """

    x: Images
    loss: float
    losses: Rows
    evaluations: int


Combine = Callable[[Tensor, OneGuess], Combined]
"""(seeds [S, B, C, H, W], the loss of one batch) -> what they give together."""


def best_seed(x: Seeds, match: OneGuess) -> Combined:
    """The batch of the seed whose loss is the least."""
    losses = torch.stack([match(batch) for batch in x])
    best = best_of(losses)
    return Combined(x[best].clone(), losses[best].item(), losses, len(x))


def minimum_loss(x: Seeds, match: OneGuess) -> Combined:
    """The best seed's batch, with each image of another seed that lowers its loss.

    Slots in their order, and for each the seeds in theirs.
    """
    chosen, least, losses, tried = best_seed(x, match)
    for i in range(x.shape[1]):
        for other in x[:, i]:
            if torch.equal(other, chosen[i]):
                continue
            trial = chosen.clone()
            trial[i] = other
            found, tried = match(trial).item(), tried + 1
            if found < least:
                chosen, least = trial, found
    return Combined(chosen, least, losses, tried)


@dataclass(frozen=True)
class E2EGI:
    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size", "bn_stats"),
        model=(normalises_batches,),
        labels=True,
    )
    revision: ClassVar[int] = 1

    steps: int = 24_000
    lr: float = 0.1046
    tv: float = 0.0114
    bn: float = 0.0357
    group: float = 0.01
    noise: float = 0.2
    alone: float = 0.3  # share of the steps, as is the next
    together: float = 0.3
    blocks: int = 7  # 1,000 steps each, of 24,000
    combine: Combine = minimum_loss
    restarts: int = 8  # S
    distance: Distance = cosine
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "blocks", "restarts")
        whole(self, "frames", least=0)
        whole(self, "steps", least=2)
        real(self, "lr", "alone", "together", above=0)
        real(self, "tv", "bn", "group", "noise")
        function(self, "combine", "distance", "label_rule")
        if self.alone + self.together >= 1:
            raise ValueError(
                "E2EGI needs alone + together < 1, since the last phase takes the rest"
                f" of the steps, got {self.alone} + {self.together}"
            )
        if not self.bn:  # then no statistics are asked for
            less = Needs(("client", "batch_size"), labels=True)
            object.__setattr__(self, "needs", less)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        first = max(1, round(self.alone * self.steps))
        seeded = max(first, round((self.alone + self.together) * self.steps))
        seeded = min(seeded, self.steps - 1)
        at = {first + (seeded - first) * b // self.blocks for b in range(self.blocks)}
        X = torch.zeros(len(y), *obs.image_shape, device=obs.device, dtype=obs.dtype)
        pull = torch.zeros((), device=obs.device, dtype=obs.dtype)
        tried = 0

        def match(z):
            return self.distance(obs.simulate(pixels.image(z), y), obs.gradient)

        def natural(z):
            total = match(z) + self.tv * total_variation(z)
            if self.bn:
                x, known = pixels.image(z), obs.bn_stats
                total = total + self.bn * statistics_distance(obs.model, x, known)
            return total

        def seed(z):
            return natural(z) + pull * (z - X).square().mean()

        def combined(z, memory):
            nonlocal tried
            change_places(z, y, memory)
            with torch.no_grad():
                found = self.combine(z, match)
            tried += found.evaluations
            return found

        rngs = generators(rng, self.restarts)

        def each(k, variables, memory):
            [z] = variables
            size = self.noise * self.lr * cosine_decay(k / self.steps)
            for row, own in zip(z, rngs, strict=True):
                row.add_(torch.randn(row.shape, generator=own).to(row), alpha=size)
            if k + 1 in at:
                pixels.project(z)
                X.copy_(combined(z, memory).x)
                pull.fill_(self.group)

        found = minimise(
            seed,
            [gaussian(obs)(self.restarts, rng)],
            optimiser=adam(
                self.lr, signed=True, cosine=True, part=(0.0, seeded / self.steps)
            ),
            steps=seeded,
            project=pixels.project,
            each=each,
            rank=match,
            image=pixels.image,
            frames=self.frames // 2,
            at_once=at_once(obs),
        )
        last = combined(found.variables[0], {})
        rec = search(
            obs,
            rng,
            restarts=1,
            steps=self.steps - seeded,
            start=replace(
                found,
                variables=[last.x[None]],
                evaluations=found.evaluations + tried,
            ),
            loss=natural,
            match=match,
            image=pixels.image,
            labels=lambda z: y,
            optimiser=adam(
                self.lr, signed=True, cosine=True, part=(seeded / self.steps, 1.0)
            ),
            project=pixels.project,
            best=True,
            frames=self.frames - self.frames // 2,
        )
        least = last.losses[best_of(last.losses)].item()
        notes = {"combined": last.loss, "best_seed": least}
        return replace(rec, losses=last.losses, notes=notes)
