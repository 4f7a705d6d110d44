"""One file a paper.

An attack maps (Observation, torch.Generator) to a Reconstruction and never sees the
truth. What it can't do without stands in its `needs`. One that needs a malicious server
also has `plant`: (model, image_shape, auxiliary, generator) -> (the planted model, a
trapdoor).
"""

from typing import Any

from gi_lib.attacks.bias_ratio import BiasRatio
from gi_lib.attacks.dlg import DLG
from gi_lib.attacks.gradinversion import GradInversion
from gi_lib.attacks.idlg import IDLG
from gi_lib.attacks.inverting_gradients import InvertingGradients
from gi_lib.attacks.robbing_the_fed import RobbingTheFed

ATTACKS: dict[str, Any] = {
    "bias_ratio": BiasRatio,
    "dlg": DLG,
    "gradinversion": GradInversion,
    "idlg": IDLG,
    "inverting_gradients": InvertingGradients,
    "robbing_the_fed": RobbingTheFed,
}

__all__ = [
    "ATTACKS",
    "DLG",
    "IDLG",
    "BiasRatio",
    "GradInversion",
    "InvertingGradients",
    "RobbingTheFed",
]
