"""Improved Deep Leakage from Gradients, iDLG (Zhao, Mopuri, Bilen, 2020).

arXiv:2001.02610.

    y* = argmin over k of  dL/db_k,       x* = argmin over x of  | g(x, y*) - g* |^2

The gradient of the last layer is negative at the true label alone, so that the label is
read off, and DLG seeks the image only. The settings are DLG's.

Departs from the paper: the rule reads the bias, where the public code sums rows of
the weights; without a bias it reads the weights (see labels.idlg). Otherwise as DLG
departs.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.attacks.dlg import DLG
from gi_lib.types import Needs, Observation, Reconstruction, function


@dataclass(frozen=True)
class IDLG(DLG):
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True, batch=1)

    label_rule: labels.LabelRule = labels.infer

    def __post_init__(self):
        super().__post_init__()
        function(self, "label_rule")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        return super().__call__(
            dataclasses.replace(obs, labels=self.label_rule(obs)), rng
        )
