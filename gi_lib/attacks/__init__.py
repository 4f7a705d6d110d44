"""One file a paper.

An attack maps (Observation, torch.Generator) to a Reconstruction and never sees the truth.
"""

from gi_lib.attacks.dlg import DLG
from gi_lib.attacks.inverting_gradients import InvertingGradients

ATTACKS = {
    "dlg": DLG,
    "inverting_gradients": InvertingGradients,
}

__all__ = ["ATTACKS", "DLG", "InvertingGradients"]
