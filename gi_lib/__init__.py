"""Gradient inversion: observe what a client of federated learning sends, and reconstruct what it trained on.

Batch --observe(model, update, threat, defense)--> Observation --attack--> Reconstruction
      --evaluate(truth)--> Scores
"""

from gi_lib.federated import FedAvg, ThreatModel, fedsgd, observe
from gi_lib.metrics import evaluate
from gi_lib.types import Batch, NotApplicableError, Observation, Reconstruction, Scores, WithheldError

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "FedAvg",
    "NotApplicableError",
    "Observation",
    "Reconstruction",
    "Scores",
    "ThreatModel",
    "WithheldError",
    "evaluate",
    "fedsgd",
    "observe",
]
