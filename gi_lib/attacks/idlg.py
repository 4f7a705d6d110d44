"""Improved Deep Leakage from Gradients, iDLG (Zhao, Mopuri, Bilen, arXiv:2001.02610).

    y* = argmin over k of  dL/db_k,       x* = argmin over x of  | g(x, y*) - g* |^2

The gradient of the last layer is negative at the true label alone, so that the label is read off, and
DLG seeks the image only. The settings are DLG's.

Needs: the batch size, which must be one.
Departs from the paper: where the last layer has no bias, the rule reads its weights (see labels.idlg);
otherwise as DLG departs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gi_lib import labels
from gi_lib.attacks.dlg import DLG
from gi_lib.types import NotApplicableError, Observation, Reconstruction


@dataclass(frozen=True)
class IDLG(DLG):
    def many(self, observations: Sequence[Observation], rngs: Sequence[torch.Generator]) -> list[Reconstruction]:
        """Attack several observations of the same model in one loop."""
        known = []
        for obs in observations:
            obs.need(self, *self.needs)
            if obs.batch_size != 1:
                raise NotApplicableError(f"iDLG reads one label, got batch_size={obs.batch_size}; use DLG for a batch")
            known.append(dataclasses.replace(obs, labels=labels.infer(obs)))
        return super().many(known, rngs)
