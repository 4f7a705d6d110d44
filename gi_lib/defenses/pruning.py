"""Pruning of what is sent: only the entries of largest magnitude of each tensor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gi_lib.defenses.base import Defense
from gi_lib.types import Gradient, Sent, real


@dataclass(frozen=True)
class Pruning(Defense):
    """Sends only the largest entries of each tensor (Zhu et al., NeurIPS 2019).

    Of a tensor of n entries the floor(q n) of smallest magnitude become zero, and the
    others are sent as they are. The threshold is each tensor's own: a global one would
    leave some layers without an entry. Entries as large as the threshold are all kept,
    so that ties never drop at random: a tensor of equal magnitudes is sent whole, and
    one of zeros stays one. Which entries are kept, the update itself shows.

    Args:
        share: q, in [0, 1); each tensor keeps one entry at least.
    """

    share: float = 0.9  # attackers on it are measured from .1 to .99
    revision = 1

    def __post_init__(self):
        real(self, "share")
        if self.share >= 1:
            raise ValueError(
                f"Pruning needs share, a number in [0, 1), got {self.share!r}; with 1"
                " nothing would be sent"
            )

    def on_update(
        self, gradient: Gradient, sent: Sent, rng: torch.Generator
    ) -> Gradient:
        return {name: self.pruned(g) for name, g in gradient.items()}

    def pruned(self, g: Tensor) -> Tensor:
        """One tensor of any shape, its smallest entries zero."""
        k = min(math.floor(round(self.share * g.numel(), 6)), g.numel() - 1)
        size = g.abs()
        threshold = size.flatten().kthvalue(k + 1).values
        return torch.where(size < threshold, 0, g)
