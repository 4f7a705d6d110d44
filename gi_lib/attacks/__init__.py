"""One file a paper.

An attack maps (Observation, torch.Generator) to a Reconstruction and never sees the truth.
"""

from gi_lib.attacks.bias_ratio import BiasRatio
from gi_lib.attacks.dlg import DLG
from gi_lib.attacks.idlg import IDLG
from gi_lib.attacks.inverting_gradients import InvertingGradients

ATTACKS = {
    "bias_ratio": BiasRatio,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting_gradients": InvertingGradients,
}

__all__ = ["ATTACKS", "DLG", "IDLG", "BiasRatio", "InvertingGradients"]
