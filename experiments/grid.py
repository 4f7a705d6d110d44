"""Techniques that read images instead of searching for them, on the eight models and four datasets: batches of eight.

SPEAR and the cocktail party attack wait for an honest client's gradient; the others plant rows of a server's own in
front of the network, or in its first dense layer where it begins with one, and ARES and mKOR in the layers that are
there. Two batches a cell, each with the untrained
network of its number. ImageNet's photographs are taken at 64 pixels; its sample has no train split, and there the
server's own data are CIFAR-10's. A technique that does not apply to a network says so in its record.
"""

from dataclasses import dataclass

from gi_lib.attacks import ARES, LOKI, MKOR, QBI, SPEAR, VGIA, CocktailParty, RobbingTheFed, TrapWeights, qbi
from gi_lib.bench import Case, protocol
from gi_lib.federated import ThreatModel

BATCH, BATCHES = 8, 2
PIXELS = {"mean": 0.473, "std": 0.251}  # of CIFAR-10, for networks that do not normalise
PASSIVE, SERVER = ThreatModel(), ThreatModel(malicious_server=True)
WITH_DATA = ThreatModel(malicious_server=True, has_auxiliary_data=True)
WANTED = {
    "SPEAR": (SPEAR(), PASSIVE),
    "Cocktail party": (CocktailParty(iterations=3000, lr=0.005), PASSIVE),
    "Trap weights": (TrapWeights(), SERVER),
    "QBI": (QBI(batch=BATCH, **PIXELS), SERVER),
    "PAIRS": (QBI(batch=BATCH, rule=qbi.pairs), WITH_DATA),
    "Robbing the Fed": (RobbingTheFed(bins=128), WITH_DATA),
    "VGIA": (VGIA(), WITH_DATA),
    "ARES": (ARES(), WITH_DATA),
    "mKOR": (MKOR(), SERVER),
    "LOKI": (LOKI(clients=2), WITH_DATA),  # of four images each
}


@dataclass(frozen=True)
class Cell:
    """What is wanted of a technique on one model and one dataset."""

    technique: str
    model: str
    dataset: str
    cases: list[Case]


def cases(attack, threat: ThreatModel, model: str, dataset: str) -> list[Case]:
    own = {"size": protocol.DATASETS[dataset], "threat": threat, "profile": "survey"}
    own["clients"] = getattr(attack, "clients", 1)
    if threat.has_auxiliary_data:
        own["auxiliary"] = protocol.TUNED_ON[dataset] if dataset == "imagenet" else dataset
    batches = [tuple(range(BATCH * i, BATCH * (i + 1))) for i in range(BATCHES)]
    return [Case(attack, model, dataset, images, seed=i, **own) for i, images in enumerate(batches)]  # type: ignore[arg-type]


PLAN = [
    Cell(technique, model, dataset, cases(attack, threat, model, dataset))
    for technique, (attack, threat) in WANTED.items()
    for dataset in protocol.DATASETS
    for model in protocol.MODELS
]
CASES = [case for cell in PLAN for case in cell.cases]
