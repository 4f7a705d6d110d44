"""How the survey measures: its cells, its budgets in rungs, and how the settings of an attack are tuned.

A cell is one model on one dataset. Its images are image i with the network of seed i. A budget counts gradient
evaluations, and comes in rungs, each about three times the one before: a cell has a plateau where two of them agree.
"""

import dataclasses
from typing import Any

from gi_lib.bench.cases import Attack, Case

SMALL, LARGE = ("mlp", "lenet", "cnn6"), ("convnet", "vgg11", "resnet18", "resnet50", "vit")
MODELS = SMALL + LARGE
DATASETS: dict[str, int | None] = {"mnist": None, "cifar10": None, "cifar100": None, "imagenet": 64}
"""And the side at which their images are taken; None is their own."""

RUNGS = (1, 2, 3)
_BUDGETS = {"small": (700, 2000, 6000), "large": (100, 300, 1000)}
_IMAGES = {"small": range(8), "large": range(4)}

GRID: tuple[dict[str, float], ...] = tuple(
    {"tv": tv, "lr": lr} for tv in (1e-4, 1e-3, 1e-2, 1e-1) for lr in (0.1, 0.03)
)
"""What is tried for a technique's prior and its step, the same for every technique."""
TUNED_ON = {"mnist": "mnist", "cifar10": "cifar10", "cifar100": "cifar10", "imagenet": "cifar10"}
"""On which train split the settings for a dataset are chosen. The sample of imagenet has no train split."""
DRAW = 1000
"""Networks of seeds from here on are drawn for tuning alone."""


def size(model: str) -> str:
    """Whether the budgets of a model are those of the "small" networks or of the "large"."""
    return "small" if model in SMALL else "large"


def budget(model: str, rung: int) -> int:
    """Gradient evaluations of a rung."""
    return _BUDGETS[size(model)][rung - 1]


def images(model: str) -> range:
    return _IMAGES[size(model)]


def at_budget(attack: Any, evaluations: int) -> Any:
    """The attack with as many steps as it can take; one of L-BFGS has `max_iter` evaluations."""
    return dataclasses.replace(attack, steps=max(1, evaluations // getattr(attack, "max_iter", 1)))


def tuning(
    attack: Attack, *, models: tuple[str, ...] = MODELS, datasets: tuple[str, ...] = ("mnist", "cifar10")
) -> list[Case]:
    """The cases by which an attack's settings are chosen: GRID on four images of the train split, at the first rung.

    Image by image, so that all settings of a cell have the same images at any time.
    """
    return [
        Case(
            at_budget(dataclasses.replace(attack, **setting), budget(model, 1)),  # type: ignore[type-var]
            model,
            dataset,
            (i,),
            seed=DRAW + i,
            size=DATASETS[dataset],
            split="train",
            profile="survey",
        )
        for i in range(4)
        for model in models
        for dataset in datasets
        for setting in GRID
    ]
