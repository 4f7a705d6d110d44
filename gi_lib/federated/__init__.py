"""What clients compute and what of it the attacker sees.

`observe` is the only way from a Batch to an Observation; `receive` makes one of an update that came from elsewhere.
"""

from gi_lib.federated.clients import (
    FEDSGD,
    PLAIN,
    SGD,
    Adam,
    Client,
    Clients,
    LossGradient,
    graph_of,
    loss_gradient,
    weighted_mean,
)
from gi_lib.federated.observing import ThreatModel, granted, observe
from gi_lib.federated.receiving import Update, receive

__all__ = [
    "FEDSGD",
    "PLAIN",
    "SGD",
    "Adam",
    "Client",
    "Clients",
    "LossGradient",
    "ThreatModel",
    "Update",
    "granted",
    "graph_of",
    "loss_gradient",
    "observe",
    "receive",
    "revision",
    "weighted_mean",
]

revision = 1
"""Of what clients compute: raised when it changes, so that all cases run again."""
