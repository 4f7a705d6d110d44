"""Whole batches from the first dense layer: SPEAR, SPEAR++, the cocktail party attack and FastICA.

exact: SPEAR on CIFAR-10 and on ImageNet at 64 px through dense6 (six dense layers, five of width 200), untrained,
another network for each batch; 2, 4, 8 and 10 images, twenty batches each, and five of 12 and of 16; float64, and
float32 on CIFAR-10. long: 20 images and eight million draws, 24 images and thirty-two million.
dictionary: SPEAR++ on the same with up to 24 images, and through layers of width 1,000 with up to 64; at 20 and 32
images without projected starts too.
party: FC2 and CIFAR-100, from 8 to 128 images: the cocktail party attack with its README's weights, without its
negentropy as its public code runs, with a prior three times as heavy, and FastICA. The README has 25,000 iterations and
a rate of .001, this study 3,000 and .005.
features: the cocktail party attack behind the convolutions of cnn2, on CIFAR-10; one, four, eight and sixteen images.
"""

from dataclasses import dataclass

from gi_lib.attacks import SPEAR, CocktailFeatures, CocktailParty, SPEARpp
from gi_lib.bench import Case

LIMIT = 1800
SIZES = {"cifar10": None, "imagenet": 64, "cifar100": None}


@dataclass(frozen=True)
class Row:
    """What is compared: one attack at one batch size, several batches."""

    part: str
    name: str
    cases: list[Case]


def cases(attack, model: str, dataset: str, B: int, batches: int, stage: int, double: bool = True) -> list[Case]:
    own = {"size": SIZES[dataset], "double": double, "profile": "survey", "stage": stage}
    return [
        Case(attack, model, dataset, tuple(range(B * i, B * (i + 1))), seed=i, **own)  # type: ignore[arg-type]
        for i in range(batches)
    ]


PLAN = [
    Row(
        "exact",
        f"{dataset}, {'float64' if double else 'float32'}",
        cases(SPEAR(), "dense6", dataset, B, n, 4 if B > 12 else 1, double),
    )
    for dataset, double in (("cifar10", True), ("cifar10", False), ("imagenet", True))
    for B, n in ((2, 20), (4, 20), (8, 20), (10, 20), (12, 5), (16, 5))
    if n == 20 or double
]
PLAN += [
    Row("dictionary", "width 200", cases(SPEARpp(), "dense6", "cifar10", B, n, 1))
    for B, n in ((8, 10), (12, 10), (16, 10), (20, 10), (24, 5))
]
PLAN += [
    Row("dictionary", "width 1,000", cases(SPEARpp(), "dense6_wide", "cifar10", B, 3, 2)) for B in (20, 32, 48, 64)
]
PLAN += [
    Row("dictionary", f"{said}, no projection", cases(SPEARpp(complete=False), model, "cifar10", B, 3, 2))
    for said, model, B in (("width 200", "dense6", 20), ("width 1,000", "dense6_wide", 32))
]
PARTY = {"iterations": 3000, "lr": 0.005}
PARTIES = {
    "cocktail party": CocktailParty(**PARTY),
    "no negentropy": CocktailParty(w_ne=0.0, **PARTY),
    "heavier prior": CocktailParty(w_tv=10.0, **PARTY),
    "FastICA": CocktailParty(fast_ica=200),
}
PLAN += [
    Row("party", name, cases(attack, "fc2", "cifar100", B, 3 if B <= 32 else 1, 1 if B <= 16 else 3, double=False))
    for name, attack in PARTIES.items()
    for B in (8, 16, 32, 64, 128)
]
PLAN += [
    Row("features", "cocktail party", cases(CocktailFeatures(), "cnn2", "cifar10", B, 3, 2, double=False))
    for B in (1, 4, 8, 16)
]
PLAN += [
    Row("long", "cifar10", cases(SPEAR(draws=draws), "dense6", "cifar10", B, n, 4))
    for B, draws, n in ((20, 8_000_000, 2), (24, 32_000_000, 1))
]
CASES = sorted((case for row in PLAN for case in row.cases), key=lambda case: case.stage)
