"""A malicious server: Robbing the Fed (Fowl et al., 2022), trap weights (Boenisch et al., 2023), QBI, mKOR, VGIA, ARES.

PLAN says what a record is for; CASES are all of it. A batch of images is drawn from the test split by the number of the
batch, which is the seed of its network too. The sample of ImageNet has no train split: there the server's own data are
CIFAR-10's, at the same size.
"""

from typing import NamedTuple

import torch

from gi_lib.attacks import ARES, MKOR, QBI, VGIA, RobbingTheFed, TrapWeights, qbi, robbing_the_fed
from gi_lib.bench import Case
from gi_lib.bench.protocol import LARGE, MODELS
from gi_lib.federated import Client, ThreatModel

WITH_DATA = ThreatModel(malicious_server=True, has_auxiliary_data=True)
NO_DATA = {"threat": ThreatModel(malicious_server=True), "auxiliary": None}
SIZES = {"imagenet": 200, "cifar10": 2000, "cifar100": 2000}
"""Images of a test split, as the project's data have it."""
MEAN, STD = 0.473, 0.251
"""Of CIFAR-10's pixels, all channels together: what QBI is told where a model does not normalise."""
LOCAL = {rate: Client(steps=8, lr=rate, local_batch=16, shuffle=True) for rate in (0.001, 0.01, 0.1)}


class Row(NamedTuple):
    """Cases that make one line of a table."""

    part: str
    name: str
    setting: object
    cases: list[Case]


def batch(dataset: str, number: int, size: int) -> tuple[int, ...]:
    drawn = torch.randperm(SIZES[dataset], generator=torch.Generator().manual_seed(number))
    return tuple(sorted(drawn[:size].tolist()))


def cases(attack, model, dataset, size, numbers, **more) -> list[Case]:
    more = {"threat": WITH_DATA, "auxiliary": "cifar10", "profile": "survey"} | more
    more |= {"size": 64} if dataset == "imagenet" else {}
    return [Case(attack, model, dataset, batch(dataset, i, size), seed=i, **more) for i in numbers]


IMPRINT = RobbingTheFed(bins=128)
SPARSE = RobbingTheFed(bins=128, sparse=True)
OTHERS = {
    "a row of the cosine transform": RobbingTheFed(bins=128, measurement=robbing_the_fed.CosineRow()),
    "random": RobbingTheFed(bins=128, measurement=robbing_the_fed.random_row),
}


def rows_attacks(size: int):
    """name -> (attack, facts)."""
    return {
        "trap weights": (TrapWeights(), NO_DATA),
        "QBI": (QBI(batch=size, mean=MEAN, std=STD), NO_DATA),
        "quantiles of own data": (QBI(batch=size, rule=qbi.quantiles), {}),
        "PAIRS": (QBI(batch=size, rule=qbi.pairs), {}),
    }


COST = {name: 3 if name in LARGE else 2 for name in MODELS}
"""The stage of a model's cases: what is cheap runs first."""

CARRYING = {"lenet": 10, "cnn2": 10, "vgg11": 5}
"""Networks whose convolutions mKOR can make carry an image, and on how many batches."""

PLAN = [
    *(
        Row("rows", name, size, cases(attack, "mlp", "cifar10", size, range(3), **more))
        for size in (20, 50, 100, 200)
        for name, (attack, more) in rows_attacks(size).items()
    ),
    *(
        Row("batch", "mean brightness", size, cases(IMPRINT, "lenet", "cifar10", size, range(5)))
        for size in (8, 32, 64, 128)
    ),
    *(
        Row("local steps", name, rate, cases(attack, "lenet", "cifar10", 64, range(3), client=client))
        for rate, client in LOCAL.items()
        for name, attack in (("plain", IMPRINT), ("sparse", SPARSE))
    ),
    *(Row("measured", name, 64, cases(attack, "lenet", "cifar10", 64, range(5))) for name, attack in OTHERS.items()),
    Row("models", "lenet", None, cases(IMPRINT, "lenet", "imagenet", 64, range(50))),
    *(
        Row("models", name, None, cases(IMPRINT, name, "imagenet", 64, range(10), stage=COST[name]))
        for name in MODELS
        if name != "lenet"
    ),
    *(
        Row("fronts", name, 50, cases(TrapWeights(), name, "cifar10", 50, range(2), stage=COST[name], **NO_DATA))
        for name in MODELS
        if name != "mlp"
    ),
    *(
        Row(f"carried, {dataset}", name, size, cases(MKOR(), name, dataset, size, range(batches), **NO_DATA))
        for dataset in ("cifar10", "cifar100")
        for name, batches in CARRYING.items()
        for size in (16, 64, 100)
    ),
    *(Row("certificate", "VGIA", size, cases(VGIA(), "mlp", "cifar10", size, range(10))) for size in (16, 64)),
    *(
        Row("inner layer", f"ARES, p = {p:g}", size, cases(ARES(p=p), "mlp", "cifar10", size, range(10)))
        for size in (16, 64)
        for p in (0.0, 1.0)
    ),
    Row("inner layer", "ARES, p = 1, cnn2", 16, cases(ARES(p=1.0), "cnn2", "cifar10", 16, range(3), stage=3)),
]

CASES = sorted((case for row in PLAN for case in row.cases), key=lambda case: case.stage)
LIMIT = 1800
