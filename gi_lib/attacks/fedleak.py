"""FedLeak (Fan, Wang, Chen, Zhou, USENIX Security 2025).

arXiv:2506.08435. Matching all of a gradient is hard to minimise. Two changes,

    min over x in [0, 1]^n of  L(x) + lambda |dL/dx|_2,
    L(x) = 1 - <m g(x), m g*> / (|m g(x)| |m g*|) + alpha TV(x):

m in {0, 1} keeps a part of the gradient, chosen once (partial matching), and the norm
of the loss's own gradient is penalised (gradient regularisation). The derivative of
that norm is taken as a difference, so that no third derivatives are needed:

    lambda d|dL/dx|/dx = lambda / rho (d(x + rho d/|d|) - d(x)),  d(x) = dL/dx,

which with lambda = mix rho makes the step's gradient (1 - mix) d(x) + mix d(x + rho
d/|d|), two evaluations a step. rho is a share of |x| of each guess.

The search around them is that of Inverting Gradients: with `fraction=1` and `mix=0`
this is that attack. `choose` makes m: `largest` keeps the largest entries of each
parameter's observed gradient, `at_random` any.

Departs from the paper, of which we read the abstract and the introduction alone, and
whose code is not public: how the part is chosen, `fraction`, `mix` and `rho` are ours,
and so is the form of the penalty. Labels are known, or counted (labels.infer).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.matching import Distance, cosine
from gi_lib.optimise import Evaluate, Method, Optimiser, adam
from gi_lib.parametrisations import Pixels
from gi_lib.priors import total_variation
from gi_lib.search import gaussian, search
from gi_lib.types import (
    Gradient,
    Needs,
    Observation,
    Reconstruction,
    Rows,
    displayed,
    function,
    real,
    whole,
)

Choice = Callable[[Tensor, int, torch.Generator], Tensor]
"""(one parameter's observed gradient [n], k, generator) -> k indices."""


def largest(g: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """The k entries of the largest absolute value."""
    return g.abs().topk(k, sorted=False).indices


def at_random(g: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Any k entries."""
    return torch.randperm(len(g), generator=rng)[:k].to(g.device)


def part(
    g: Gradient, fraction: float, choose: Choice, rng: torch.Generator
) -> Gradient:
    """m: 1 at the chosen entries of each parameter, at least one, and 0 elsewhere."""
    found = {}
    for name, entries in g.items():
        k = max(1, round(fraction * entries.numel()))
        m = torch.zeros_like(entries).flatten()
        m[choose(entries.flatten(), k, rng)] = 1
        found[name] = m.view_as(entries)
    return found


def regularised(optimiser: Optimiser, mix: float, rho: float) -> Optimiser:
    """The optimiser that sees (1 - mix) d(x) + mix d(x + rho |x| d/|d|) for d(x)."""

    def begin(variables: list[Tensor], steps: int) -> Method:
        method = optimiser(variables, steps)

        def step(evaluate: Evaluate) -> tuple[Rows, bool]:
            def seen(rows: Tensor | slice) -> tuple[Rows, list[Tensor]]:
                losses, here = evaluate(rows)
                before = [v.clone() for v in variables]
                for v, d in zip(variables, here, strict=True):
                    size, length = (_lengths(t) for t in (v[rows], d))
                    v[rows] += rho * size * d / length.clamp_min(1e-30)
                _, ahead = evaluate(rows)
                for v, old in zip(variables, before, strict=True):
                    v.copy_(old)
                both = zip(here, ahead, strict=True)
                return losses, [torch.lerp(d, there, mix) for d, there in both]

            return method.step(seen)

        # It evaluates every row twice, which a captured step may not.
        return dataclasses.replace(method, step=step, capturable=False)

    return begin


def _lengths(rows: Tensor) -> Tensor:
    """|x| of each row, in a shape that multiplies it."""
    return rows.flatten(1).norm(dim=1).view(-1, *[1] * (rows.ndim - 1))


@dataclass(frozen=True)
class FedLeak:
    """Partial matching and gradient regularisation.

    Args:
        fraction: of each parameter's entries that are matched; 1 matches all.
        choose: which these are.
        mix: of the gradient ahead; 0 takes the plain one, in half the evaluations.
        rho: how far ahead, in parts of |x|.
    """

    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 1

    steps: int = 10_000
    lr: float = 0.1
    tv: float = 1e-4  # alpha
    fraction: float = 0.5
    choose: Choice = largest
    mix: float = 0.5
    rho: float = 0.05
    restarts: int = 1
    distance: Distance = cosine
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", "fraction", "rho", above=0)
        real(self, "tv", "mix")
        if self.fraction > 1 or self.mix > 1:
            raise ValueError(
                "FedLeak needs fraction and mix of at most 1, got"
                f" {self.fraction!r} and {self.mix!r}"
            )
        function(self, "choose", "distance", "label_rule")

    @property
    def evaluations_a_step(self) -> int:
        """Of the gradient, for each start."""
        return 2 if self.mix else 1

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        m, goal = None, obs.gradient
        if self.fraction < 1:
            m = part(obs.gradient, self.fraction, self.choose, rng)
            goal = {name: m[name] * g for name, g in goal.items()}

        def match(z):
            g = obs.simulate(pixels.image(z), y)
            if m is not None:
                g = {name: m[name] * entries for name, entries in g.items()}
            return self.distance(g, goal)

        def loss(z):
            return match(z) + self.tv * total_variation(z)

        optimiser = adam(self.lr, signed=True, drops=(3 / 8, 5 / 8, 7 / 8))
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
            optimiser=regularised(optimiser, self.mix, self.rho)
            if self.mix
            else optimiser,
            project=pixels.project,
            frames=self.frames,
        )
