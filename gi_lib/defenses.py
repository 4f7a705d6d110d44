"""What a client does to its data or its update before it sends anything."""

from dataclasses import dataclass

import torch

from gi_lib.types import Batch, Gradient


@dataclass(frozen=True)
class Defense:
    """A defense overrides the hook where it acts; every hook is the identity by default."""

    def on_batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Before the update is computed."""
        return batch

    def on_update(self, gradient: Gradient, rng: torch.Generator) -> Gradient:
        """Before the update is sent."""
        return gradient


@dataclass(frozen=True)
class GaussianNoise(Defense):
    """Adds independent noise N(0, std^2) to every entry of the update (tried by Zhu et al., NeurIPS 2019)."""

    std: float = 1e-3

    def on_update(self, gradient: Gradient, rng: torch.Generator) -> Gradient:
        return {
            name: g + self.std * torch.randn(g.shape, generator=rng, dtype=g.dtype).to(g.device)
            for name, g in gradient.items()
        }
