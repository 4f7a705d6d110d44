"""One file a family: frozen dataclasses that override the hook where they act."""

from gi_lib.defenses.base import Defense
from gi_lib.defenses.dp_sgd import DPSGD, ClippedGradients
from gi_lib.defenses.noise import GaussianNoise
from gi_lib.defenses.pruning import Pruning

DEFENSES = {
    "dp_sgd": DPSGD,
    "gaussian_noise": GaussianNoise,
    "pruning": Pruning,
}

__all__ = [
    "DEFENSES",
    "DPSGD",
    "ClippedGradients",
    "Defense",
    "GaussianNoise",
    "Pruning",
]
