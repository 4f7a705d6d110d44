"""Surrogate Model Extension, SME (Zhu, Yao, Blaschko, ICML 2023).

The local steps lead from the weights w_0 to w_T. One gradient, at a point between the
two, stands for them all:

    w'(a) = (1 - a) w_0 + a w_T
    min over x, a of  1 - <g(x; w'(a)), d> / |g(x; w'(a))| + lambda TV(x) / 2

with d = (w_0 - w_T) / |w_0 - w_T| and g the gradient of all N images at once. x moves
by Adam, and a by an Adam of its own, both cut by ten after 3/8, 5/8 and 7/8 of the
steps. a stays in [0, 1], x in the box; TV is the sum of two means, which the paper's
code halves. `alpha=0, lr_a=0` is the paper's baseline: one gradient at w_0.

`bend` > 0 is the curve of NL-SME (Xia et al., arXiv:2509.22082): w' lies on a quadratic
Bezier curve,

    w'(a) = (1 - a)^2 w_0 + 2 a (1 - a) c + a^2 w_T

whose control point c [P] is sought too. It begins in the middle, where the curve is the
line, and moves by Adam, in each weight by `bend` of the mean (root of squares) distance
that the weights went. Of that paper we know the abstract: the rate is ours.

Where several rounds on the same data are known (Observation.earlier), the mean over the
rounds is minimised, each with an a of its own; neither paper has that.
Departs from the papers: a is moved as u = (a - alpha) lr / lr_a by the same Adam, which
is the same step up to Adam's epsilon. A client of one step has a = 0. Where a ends
stands in `notes`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.matching import Distance, cosine
from gi_lib.optimise import adam
from gi_lib.parametrisations import Pixels
from gi_lib.priors import total_variation
from gi_lib.search import Start, gaussian, search
from gi_lib.types import (
    Gradient,
    Needs,
    Observation,
    Reconstruction,
    displayed,
    function,
    real,
    whole,
)


def between(obs: Observation, a: Tensor, c: Gradient | None = None) -> Gradient:
    """w'(a): the weights after a share a [] of the way from w_0 to w_T.

    Args:
        c: how far the control point is from the middle; None takes the line.
    """
    client: Any = obs.client
    w0, found = dict(obs.model.named_parameters()), {}
    for name, g in obs.gradient.items():
        found[name] = w0[name].detach() - a * client.lr * g
        if c is not None:
            found[name] = found[name] + 2 * a * (1 - a) * c[name]
    return found


@dataclass(frozen=True)
class SME:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 1

    steps: int = 1000  # public code; so are all values here
    lr: float = 1.0  # of x, in the model's units
    alpha: float = 0.5  # a, at the start
    lr_a: float = 0.001
    tv: float = 0.01  # lambda
    bend: float = 0.0  # ours; 0: SME, the line
    distance: Distance = cosine
    restarts: int = 1
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        real(self, "lr_a", "tv", "bend", "alpha")
        function(self, "distance", "label_rule")
        if self.alpha > 1:
            raise ValueError(
                f"SME needs alpha, a share of the way from 0 to 1, got {self.alpha!r}"
            )

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        rounds = [(o, o.one_gradient()) for o in (*obs.earlier, obs)]
        client: Any = obs.client
        several = obs.each_client.steps > 1
        ratio = self.lr_a / self.lr

        def shares(u: Tensor) -> Tensor:
            return several * (self.alpha + ratio * u)

        def control(o: Observation, v: tuple[Tensor, ...]) -> Gradient | None:
            """How far c is from the middle, of which v is told in steps of Adam."""
            if not v:
                return None
            sizes = [g.numel() for g in o.gradient.values()]
            way = torch.cat([g.flatten() for g in o.gradient.values()])
            scale = client.lr * way.square().mean().sqrt()
            parts = (self.bend / self.lr * scale * v[0]).split(sizes)
            named = zip(o.gradient.items(), parts, strict=True)
            return {name: part.view_as(g) for (name, g), part in named}

        def match(z, u, *v):
            x, each = pixels.image(z), []
            for (o, one), a in zip(rounds, shares(u), strict=True):
                g = one.simulate(x, y, between(o, a, control(o, v)))
                each.append(self.distance(g, o.gradient))
            return torch.stack(each).mean()

        def loss(z, u, *v):
            return match(z, u, *v) + self.tv * total_variation(z) / 2

        def project(z, u, *v):
            pixels.project(z)
            if ratio:
                u.clamp_(-self.alpha / ratio, (1 - self.alpha) / ratio)

        def zeros(*shape: int) -> Start:
            return lambda rows, rng: torch.zeros(rows, *shape).to(obs.device, obs.dtype)

        P = sum(g.numel() for g in obs.gradient.values())
        start = [gaussian(obs), zeros(len(rounds)), *([zeros(P)] if self.bend else [])]

        return search(
            rounds[-1][1],
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=start,
            loss=loss,
            match=match,
            image=lambda z, *other: pixels.image(z),
            labels=lambda z, *other: y,
            optimiser=adam(self.lr, drops=(3 / 8, 5 / 8, 7 / 8)),
            project=project,
            notes=lambda z, u, *v: {"alpha": shares(u)[-1].item()},
            frames=self.frames,
        )
