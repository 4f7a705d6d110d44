"""How the survey measures: its cells, its budgets in rungs, and how the settings of an attack are tuned.

A cell is one model on one dataset. Its images are image i with the network of seed i. A budget counts gradient
evaluations, and comes in rungs, each about three times the one before: a cell has a plateau where two of them agree.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gi_lib.bench.cases import Attack, Case, key
from gi_lib.results import Record

SMALL, LARGE = ("mlp", "lenet", "cnn6"), ("convnet", "vgg11", "resnet18", "resnet50", "vit")
MODELS = SMALL + LARGE
DATASETS: dict[str, int | None] = {"mnist": None, "cifar10": None, "cifar100": None, "imagenet": 64}
"""And the side at which their images are taken; None is their own."""

RUNGS = (1, 2, 3)
_BUDGETS = {"small": (700, 2000, 6000), "large": (100, 300, 1000)}
_IMAGES = {"small": range(8), "large": range(4)}

GRID: tuple[dict[str, float], ...] = tuple({"tv": tv, "lr": lr} for tv in (1e-4, 1e-3, 1e-2, 1e-1) for lr in (0.1, 0.3))
"""What is tried for a technique's prior and its step, the same for every technique. The steps are the paper's and a
larger one: in the first rung of the large networks the paper's can hardly cross the box."""
TUNED_ON = {"mnist": "mnist", "cifar10": "cifar10", "cifar100": "cifar10", "imagenet": "cifar10"}
"""On whose train split the settings for a dataset are chosen. The sample of ImageNet has no train split."""
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
    """The attack with as many steps as a budget allows.

    A step has one evaluation for each start; with L-BFGS up to `max_iter`, or as many as the attack says by
    `evaluations_a_step`.

    Raises:
        ValueError: the budget is less than one step.
    """
    each = getattr(attack, "evaluations_a_step", getattr(attack, "max_iter", 1)) * getattr(attack, "restarts", 1)
    if evaluations < each:
        raise ValueError(
            f"a budget of {evaluations} gradient evaluations is less than one step of {type(attack).__name__}, which"
            f" has {each}; give at least {each}"
        )
    return dataclasses.replace(attack, steps=evaluations // each)


def _settings(attack: Attack, model: str) -> list[Attack]:
    """The attack with every setting of GRID, at the first rung."""
    return [
        at_budget(dataclasses.replace(attack, **setting), budget(model, 1))  # type: ignore[type-var]
        for setting in GRID
    ]


SURVIVORS = (8, 4, 2, 2)
"""How many settings are tried on each image: after the first image the better half goes on, and again after the second
(successive halving; Jamieson, Talwalkar, AISTATS 2016)."""


def tuning(attack: Attack, records: Mapping[str, Record], datasets: Sequence[str] = ("mnist", "cifar10")) -> list[Case]:
    """The cases that choose an attack's settings, as far as the records of earlier ones tell which they are.

    Args:
        attack: with fields `tv` and `lr`, which take the values of GRID.
        records: of the tuning so far, by key.
        datasets: whose train split gives the images.

    Raises:
        ValueError: a dataset has no train split.
    """
    for dataset in datasets:
        _check_train(dataset)
    return [
        case
        for model in MODELS
        for dataset in datasets
        for cases in _rounds(attack, model, dataset, records)
        for case in cases
    ]


def _check_train(dataset: str) -> None:
    if DATASETS.get(dataset, "") is not None:  # the sample of ImageNet, whose side is given
        raise ValueError(
            f"{dataset} has no train split here, and its attacked images choose no settings: tune on one of"
            f" {', '.join(sorted(set(TUNED_ON.values())))}, whose settings TUNED_ON takes over"
        )


def _rounds(attack: Attack, model: str, dataset: str, records: Mapping[str, Record]) -> Iterator[list[Case]]:
    """The cases of each image in turn, of the settings that are left; it ends where a record is missing."""
    left = _settings(attack, model)
    done: list[Case] = []
    for i, number in enumerate(SURVIVORS):
        left = _best(left, done, records)[:number]
        own = {"seed": DRAW + i, "split": "train", "profile": "survey"}
        cases = [Case(setting, model, dataset, (i,), **own) for setting in left]  # type: ignore[arg-type]
        yield cases
        if not all(key(case) in records for case in cases):
            return
        done += cases


def _best(settings: Sequence[Attack], done: Sequence[Case], records: Mapping[str, Record]) -> list[Attack]:
    """By the images that were identified, then by dB above the floor; of equal ones the first of GRID."""

    def merit(setting: Attack) -> tuple[float, float]:
        rows = [records[key(case)] for case in done if case.attack == setting]
        return sum(_identified(row) for row in rows), sum(_above(row) for row in rows)

    return sorted(settings, key=merit, reverse=True)


def _identified(row: Record) -> int:
    return sum(row["identified"] or [False])


def _above(row: Record) -> float:
    """Mean dB above the floor; a case that failed, or an image that is missed, comes last."""
    found = [
        -math.inf if p is None else p - f for p, f in zip(row["psnr"] or [None], row["floor"] or [0.0], strict=True)
    ]
    return statistics.fmean(found)


def tuned(attack: Attack, model: str, dataset: str, records: Mapping[str, Record]) -> Attack | None:
    """The attack with the settings that the tuning has chosen for a cell; None until its records are complete."""
    *earlier, last = _rounds(attack, model, TUNED_ON[dataset], records)
    if len(earlier) + 1 < len(SURVIVORS) or not all(key(case) in records for case in last):
        return None
    done = [case for cases in (*earlier, last) for case in cases]
    return _best([case.attack for case in last], done, records)[0]


def cell(attack: Attack, model: str, dataset: str, rung: int, stage: int) -> list[Case]:
    """The cases of a cell: one an image, at the budget of a rung where the attack takes steps."""
    if hasattr(attack, "steps"):
        attack = at_budget(attack, budget(model, rung))
    own = {"size": DATASETS[dataset], "profile": "survey", "stage": stage}
    return [Case(attack, model, dataset, (i,), seed=i, **own) for i in images(model)]  # type: ignore[arg-type]
