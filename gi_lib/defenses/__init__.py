"""One file a family: frozen dataclasses that override the hook where they act."""

from gi_lib.defenses.ats import ATS
from gi_lib.defenses.base import Defense, Law
from gi_lib.defenses.dp_sgd import DPSGD, ClippedGradients
from gi_lib.defenses.noise import GaussianNoise, LaplaceNoise
from gi_lib.defenses.precode import PRECODE
from gi_lib.defenses.pruning import Pruning
from gi_lib.defenses.soteria import Soteria

DEFENSES = {
    "ats": ATS,
    "dp_sgd": DPSGD,
    "gaussian_noise": GaussianNoise,
    "laplace_noise": LaplaceNoise,
    "precode": PRECODE,
    "pruning": Pruning,
    "soteria": Soteria,
}

__all__ = [
    "ATS",
    "DEFENSES",
    "DPSGD",
    "PRECODE",
    "ClippedGradients",
    "Defense",
    "GaussianNoise",
    "LaplaceNoise",
    "Law",
    "Pruning",
    "Soteria",
]
