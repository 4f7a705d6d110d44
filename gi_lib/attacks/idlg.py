"""Improved Deep Leakage from Gradients, iDLG (Zhao, Mopuri, Bilen, arXiv:2001.02610).

    y* = argmin over k of  dL/db_k,       x* = argmin over x of  | g(x, y*) - g* |^2

The gradient of the last layer is negative at the true label alone, so that the label is read off, and
DLG seeks the image only.

Needs: the batch size, which must be one.
Departs from the paper: where the last layer has no bias, the rule reads its weights (see labels.idlg);
otherwise as DLG departs, whose loop it is.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.attacks.dlg import DLG
from gi_lib.types import NotApplicableError, Observation, Reconstruction


@dataclass(frozen=True)
class IDLG:
    needs: ClassVar[tuple[str, ...]] = ("update", "batch_size")

    steps: int = 300  # public code; each of up to max_iter iterations
    lr: float = 1.0  # public code
    max_iter: int = 20  # torch's default, as in the public code
    history: int = 100  # torch's default, as in the public code
    restarts: int = 1
    frames: int = 0  # snapshots kept for a slider

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        return self.many([obs], [rng])[0]

    def many(self, observations: Sequence[Observation], rngs: Sequence[torch.Generator]) -> list[Reconstruction]:
        """Attack several observations of the same model in one loop."""
        known = []
        for obs in observations:
            obs.need(self, *self.needs)
            if obs.batch_size != 1:
                raise NotApplicableError(f"iDLG reads one label, got batch_size={obs.batch_size}; use DLG for a batch")
            known.append(dataclasses.replace(obs, labels=labels.idlg(obs)))
        return DLG(**dataclasses.asdict(self)).many(known, rngs)
