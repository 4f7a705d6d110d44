"""One file a family: frozen dataclasses that override the hook where they act."""

from gi_lib.defenses.base import Defense
from gi_lib.defenses.dp_sgd import DPSGD, ClippedGradients
from gi_lib.defenses.noise import GaussianNoise

DEFENSES = {
    "dp_sgd": DPSGD,
    "gaussian_noise": GaussianNoise,
}

__all__ = ["DEFENSES", "DPSGD", "ClippedGradients", "Defense", "GaussianNoise"]
