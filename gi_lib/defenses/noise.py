"""Noise on what is sent."""

from dataclasses import dataclass

import torch

from gi_lib.defenses.base import Defense
from gi_lib.types import Gradient, Sent, real


@dataclass(frozen=True)
class GaussianNoise(Defense):
    """Adds noise N(0, std^2) to every entry of the update (Zhu et al., NeurIPS 2019).

    It is no differential privacy: nothing bounds what one image can change (see DPSGD).
    """

    std: float = 1e-3
    revision = 1

    def __post_init__(self):
        real(self, "std")

    def on_update(
        self, gradient: Gradient, sent: Sent, rng: torch.Generator
    ) -> Gradient:
        return {
            name: g
            + self.std * torch.randn(g.shape, generator=rng, dtype=g.dtype).to(g.device)
            for name, g in gradient.items()
        }
