"""Multiscale inversion, settings of breaching (Geiping, Fowl, Wen, 2022), a framework.

After the image pyramid of Plug-In Inversion (Ghiasi, Kazemi, Reich, Zhu, Goldblum,
Goldstein, ICML 2022), which inverts networks and not gradients. No paper has the
settings; this file follows them, and has none of the framework's code.

    x_s* = argmin over x_s of  1 - <g(up(x_s)), g*> / (|g(up(x_s))| |g*|)
                                 + alpha TV(up(x_s)),           s = 1 .. S

in S stages on images of s / S of the sides, enlarged by `up` to the whole before the
model sees them: each stage by Inverting Gradients' Adam on signs, in the box. A stage
begins with `resize` of the best iterate of the one before: `focus` shrinks it to half
of the new sides and pastes it into the middle of fresh noise, `enlarge` fills the image
with it.

Departs from the framework: its augmentations, circular shifts and jitter of colour, are
left out, since a shifted image is not the one whose gradient was sent.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gi_lib import labels
from gi_lib.execution import at_once
from gi_lib.matching import Distance, cosine
from gi_lib.optimise import Minimum, adam, minimise
from gi_lib.parametrisations import Pixels
from gi_lib.priors import total_variation
from gi_lib.search import Start, gaussian, search
from gi_lib.types import (
    Needs,
    Observation,
    Reconstruction,
    displayed,
    function,
    real,
    whole,
)

Sides = tuple[int, int]
Resize = Callable[[Tensor, Sides, torch.Generator], Tensor]
"""(all starts [R, B, C, h, w], new sides, generator) -> [R, B, C, h', w']."""


def enlarge(
    z: Float[Tensor, "*R C h w"], sides: Sides, rng: torch.Generator
) -> Float[Tensor, "*R C H W"]:
    """The images at other sides, bilinear."""
    flat = z.reshape(-1, *z.shape[-3:])
    larger = F.interpolate(flat, sides, mode="bilinear", align_corners=False)
    return larger.reshape(*z.shape[:-2], *sides)


def focus(
    z: Float[Tensor, "*R C h w"], sides: Sides, rng: torch.Generator
) -> Float[Tensor, "*R C H W"]:
    """The images at half of the sides, in the middle of noise from N(0, 1)."""
    h, w = (max(1, side // 2) for side in sides)
    top, left = (sides[0] - h) // 2, (sides[1] - w) // 2
    larger = torch.randn(*z.shape[:-2], *sides, generator=rng).to(z)
    larger[..., top : top + h, left : left + w] = enlarge(z, (h, w), rng)
    return larger


@dataclass(frozen=True)
class Multiscale:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 1

    steps: int = 14_000  # of all stages; breaching, 2,000 each
    stages: int = 7  # S, breaching; so are all values here
    resize: Resize = focus
    lr: float = 0.1
    tv: float = 0.2  # alpha
    restarts: int = 1
    distance: Distance = cosine
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "stages", "restarts")
        whole(self, "steps", least=self.stages)
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        function(self, "resize", "distance", "label_rule")
        real(self, "tv")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        (C, H, W), S = obs.image_shape, self.stages
        sides = [(max(1, s * H // S), max(1, s * W // S)) for s in range(1, S + 1)]

        def up(z):
            return enlarge(z, (H, W), rng)

        def match(z):
            return self.distance(obs.simulate(pixels.image(up(z)), y), obs.gradient)

        def loss(z):
            return match(z) + self.tv * total_variation(up(z))

        each_stage: dict[str, Any] = {
            "image": lambda z: pixels.image(up(z)),
            "optimiser": adam(self.lr, signed=True, drops=(3 / 8, 5 / 8, 7 / 8)),
            "project": pixels.project,
            "best": True,
            "frames": -(-self.frames // S),
        }
        start: Start | Minimum = gaussian(obs, obs.batch_size or 1, C, *sides[0])
        for larger in sides[1:]:
            found = minimise(
                loss,
                [start(self.restarts, rng)] if callable(start) else start,
                steps=self.steps // S,
                rank=match,
                at_once=at_once(obs),
                **each_stage,
            )
            moved = self.resize(found.variables[0], larger, rng)
            start = replace(found, variables=[moved])
        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps - (S - 1) * (self.steps // S),
            start=start,
            loss=loss,
            match=match,
            labels=lambda z: y,
            **each_stage,
        )
