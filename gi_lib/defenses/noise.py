"""Noise on what is sent."""

from dataclasses import dataclass

import torch

from gi_lib.defenses.base import Defense, Law
from gi_lib.matching import Scalar, l1, squared_l2
from gi_lib.types import Gradient, Sent, real

NARROW = 1e-3
"""Spread of the law that stands for no noise at all, which has no density."""


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

    def law(self, sent: Gradient) -> Law:
        """-log p = |g' - g|^2 / (2 std^2)."""
        std = self.std or NARROW

        def surprise(simulated: Gradient, observed: Gradient) -> Scalar:
            return squared_l2(simulated, observed) / (2 * std**2)

        return Law(surprise, std)


@dataclass(frozen=True)
class LaplaceNoise(Defense):
    """Adds noise of density exp(-|n| / scale) / (2 scale) to every entry of the update.

    As GaussianNoise it is no differential privacy.
    """

    scale: float = 1e-3
    revision = 1

    def __post_init__(self):
        real(self, "scale")

    def on_update(
        self, gradient: Gradient, sent: Sent, rng: torch.Generator
    ) -> Gradient:
        def noise(g: torch.Tensor) -> torch.Tensor:
            # The difference of two exponential draws is a Laplace draw.
            a, b = (
                torch.empty(g.shape, dtype=g.dtype).exponential_(generator=rng)
                for _ in range(2)
            )
            return self.scale * (a - b).to(g.device)

        return {name: g + noise(g) for name, g in gradient.items()}

    def law(self, sent: Gradient) -> Law:
        """-log p = |g' - g|_1 / scale."""
        scale = self.scale or NARROW

        def surprise(simulated: Gradient, observed: Gradient) -> Scalar:
            return l1(simulated, observed) / scale

        return Law(surprise, scale)
