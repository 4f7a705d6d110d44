"""Batch statistics and many seeds: GradInversion term by term, E2EGI and HF-GradInv, on batches of CIFAR-10.

The public ResNet-20, trained, in train mode, as a client's is: it normalises by the batch's own statistics. Labels are
known, and no label is twice in a batch. GradInversion with one term more at a time, at 500 steps of four seeds, whose
evaluations all count: the gradient alone, with total variation and norm, with the true statistics, with the pull to
the plain mean of the seeds, and to the registered mean. Beside them what is left where the statistics are withheld.
The weight of its total variation, which is second hand and a mean here, was chosen on one batch of the train split, of
0.0001, 0.03 and 0.1. E2EGI from four seeds, with its combination and with the best seed in its place. Batches of four,
then of eight.

HF-GradInv at 1,000 steps of its one start, with the true statistics and with the running ones, beside GradInversion at
as many evaluations; and all three on one batch of the untrained ResNet-18.
"""

from dataclasses import dataclass

from gi_lib import ThreatModel
from gi_lib.attacks import E2EGI, GradInversion, HFGradInv
from gi_lib.attacks.e2egi import best_seed
from gi_lib.attacks.gradinversion import plain_mean
from gi_lib.bench import Case


@dataclass(frozen=True)
class Row:
    """What is compared: an attack under a threat model, on batches of one size."""

    part: str
    name: str
    model: str
    batch: int
    cases: list[Case]


BATCHES = {  # the first images of the test split whose labels differ
    4: ((0, 1, 3, 4), (2, 5, 6, 7), (8, 9, 11, 12), (10, 13, 14, 15)),
    8: (
        (0, 1, 3, 4, 5, 7, 11, 13),
        (2, 6, 9, 12, 15, 16, 17, 20),
        (8, 10, 14, 18, 21, 22, 23, 24),
        (19, 25, 26, 27, 28, 30, 31, 35),
    ),
}
STATISTICS = ThreatModel(knows_labels=True, knows_bn_stats=True)
WITHHELD = ThreatModel(knows_labels=True)
SEEDS = {"steps": 500, "restarts": 4, "renew": 25, "tv": 0.1}  # the paper renews its consensus 200 times; here 18
ALONE = {"tv": 0.0, "l2": 0.0, "bn": 0.0, "group": 0.0}
LADDER = {
    "gradient": (GradInversion(**SEEDS | ALONE), WITHHELD),
    "+ total variation and norm": (GradInversion(**SEEDS, bn=0.0, group=0.0), WITHHELD),
    "+ batch statistics": (GradInversion(**SEEDS, group=0.0), STATISTICS),
    "+ group, plain mean": (GradInversion(**SEEDS, consensus=plain_mean), STATISTICS),
    "+ group, registered mean": (GradInversion(**SEEDS), STATISTICS),
    "all but the statistics": (GradInversion(**SEEDS, bn=0.0), WITHHELD),
}
COMBINED = {
    "E2EGI": (E2EGI(steps=500, restarts=4), STATISTICS),
    "E2EGI, best seed": (E2EGI(steps=500, restarts=4, combine=best_seed), STATISTICS),
    "E2EGI, statistics withheld": (E2EGI(steps=500, restarts=4, bn=0.0), WITHHELD),
}
EQUAL = {
    "HF-GradInv": (HFGradInv(steps=1000), STATISTICS),
    "HF-GradInv, running statistics": (HFGradInv(steps=1000), WITHHELD),
    "GradInversion": (GradInversion(**SEEDS | {"steps": 250}), STATISTICS),
}
PARTS = {"ladder": LADDER, "combined": COMBINED, "equal": EQUAL}


def cases(attack, threat, model: str, batch: int) -> list[Case]:
    """One a batch; the first comes first in the queue."""
    weights = "cifar10_resnet20" if model == "resnet20" else None
    own = {"weights": weights, "train": True, "threat": threat, "profile": "survey"}
    wanted = BATCHES[batch] if weights else BATCHES[batch][:1]
    stages = [(1 if i == 0 else 2) if weights and batch == 4 else 3 for i in range(len(wanted))]
    return [
        Case(attack, model, "cifar10", indices, seed=i, stage=stage, **own)
        for i, (indices, stage) in enumerate(zip(wanted, stages, strict=True))
    ]


WANTED = (("resnet20", 4, PARTS), ("resnet20", 8, ("ladder", "combined")), ("resnet18", 4, ("equal",)))
PLAN = [
    Row(part, name, model, batch, cases(attack, threat, model, batch))
    for model, batch, parts in WANTED
    for part in parts
    for name, (attack, threat) in PARTS[part].items()
]
CASES = [case for row in PLAN for case in row.cases]
