"""What the optimiser moves and what image that is: z -> x in [0, 1].

A Parametrisation has `start`, a point z for a given x, `image`, the map z -> x, and `project`, which keeps z
feasible in place after a step.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Parametrisation(Protocol):
    def start(self, x: Tensor) -> Tensor: ...
    def image(self, z: Tensor) -> Tensor: ...
    def project(self, z: Tensor) -> None: ...


@dataclass(frozen=True)
class Pixels:
    """x = mean + std z, channel by channel: pixels in the units that the model sees; with 0 and 1, pixels.

    Args:
        mean, std: [C, 1, 1], or numbers.
        boxed: whether `project` clamps x to [0, 1].
    """

    mean: Tensor | float = 0.0
    std: Tensor | float = 1.0
    boxed: bool = True

    def start(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def image(self, z: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(c, dtype=z.dtype, device=z.device) for c in (self.mean, self.std))
        return torch.addcmul(mean, std, z)

    def project(self, z: Tensor) -> None:
        if self.boxed:
            z.clamp_(*self._box)

    @cached_property
    def _box(self) -> tuple[Tensor, Tensor]:
        low, high = ((edge - torch.as_tensor(self.mean)) / self.std for edge in (0.0, 1.0))
        return low, high


@dataclass(frozen=True)
class TanhBox:
    """x = (tanh z + 1) / 2: every z is an image in (0, 1) (Carlini, Wagner, S&P 2017, arXiv:1608.04644)."""

    margin: float = 1e-4
    """How far `start` stays from 0 and 1, where z would be infinite."""

    def start(self, x: Tensor) -> Tensor:
        return torch.atanh(2 * x.clamp(self.margin, 1 - self.margin) - 1)

    def image(self, z: Tensor) -> Tensor:
        return (torch.tanh(z) + 1) / 2

    def project(self, z: Tensor) -> None:
        """Nothing to do: every z is feasible."""
