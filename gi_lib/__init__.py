"""Gradient inversion: observe what a client of federated learning sends, and reconstruct what it trained on.

Batch --observe(models, client, threat, defense)--> Observation --attack--> Reconstruction
      --evaluate(truth)--> Scores
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gi_lib.federated import SGD as SGD
    from gi_lib.federated import Adam, Client, ThreatModel, loss_gradient, observe, receive
    from gi_lib.metrics import evaluate
    from gi_lib.types import Batch, NotApplicableError, Observation, Reconstruction, Scores, WithheldError

__version__ = "0.2.0"

_WHERE = {  # name -> its module; each is imported when it is first asked for, so that `gi --help` waits for none
    **dict.fromkeys(("SGD", "Adam", "Client", "ThreatModel", "loss_gradient", "observe", "receive"), "federated"),
    "evaluate": "metrics",
    **dict.fromkeys(
        ("Batch", "NotApplicableError", "Observation", "Reconstruction", "Scores", "WithheldError"), "types"
    ),
}

__all__ = [
    "SGD",
    "Adam",
    "Batch",
    "Client",
    "NotApplicableError",
    "Observation",
    "Reconstruction",
    "Scores",
    "ThreatModel",
    "WithheldError",
    "evaluate",
    "loss_gradient",
    "observe",
    "receive",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"gi_lib.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
