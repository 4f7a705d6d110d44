"""What a run would do, before it is started: the cells that apply, those that don't, and the hours.

What a case costs is told by records of its like, where there are any: an evaluation takes as long with every setting.
"""

import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gi_lib import progress
from gi_lib.attacks import ATTACKS
from gi_lib.bench.cases import Case, text
from gi_lib.bench.measure import AttackError, attempt
from gi_lib.results import Record


@dataclass(frozen=True)
class Cell:
    """Cases that differ in their images and seeds alone.

    Args:
        name: attack, model, weights, dataset and what else makes it.
        cases: how many of them a run would run.
        reason: why the attack does not apply, or fails; None where it runs.
        seconds: of one case, estimated; None where there is a reason.
        stage: the earliest of its cases.
    """

    name: str
    cases: int
    reason: str | None
    seconds: float | None
    stage: int


Estimate = Callable[[Case], float | None]
"""Seconds of a case; None where no record tells."""


def plan(cases: Iterable[Case], root: Path | None, device: str, estimate: Estimate | None = None) -> list[Cell]:
    """Cells with their seconds: by `estimate`; else one case is tried with few steps, scaled to all of its steps."""
    cells: dict[str, list[Case]] = {}
    for case in cases:
        cells.setdefault(cell_name(case), []).append(case)
    # A step of L-BFGS is many evaluations, and tells the rest no more than a step of one.
    short_first = sorted(cells.items(), key=lambda cell: getattr(cell[1][0].attack, "max_iter", 1))
    bar = progress.bar(short_first, desc="plan", unit="cell")
    found, tried = [], dict[tuple, float]()
    for name, some in bar:
        case, n = some[0], evaluations(some[0])
        reason, seconds = None, estimate(case) if estimate else None
        like = _like(ANY, {**vars(case), "client": str(case.client)})
        if seconds is None and estimate and n and like in tried:
            seconds = n * tried[like]
        if seconds is None:
            reason, seconds = _tried(case, root, device)
            if n and seconds is not None:
                tried[like] = seconds / n
        found.append(Cell(name, len(some), reason, seconds, min(case.stage for case in some)))
    return found


def by_records(rows: Iterable[Record]) -> Estimate:
    """The estimate by what records took on the same model and data: seconds an evaluation, or a whole case.

    Records of the same attack tell first; where there are none, those of any iterative attack.
    """
    evaluation: dict[tuple, list[float]] = {}
    whole: dict[tuple, list[float]] = {}
    for row in rows:
        if row["status"] == "ok" and row["seconds"] is not None:
            spent = row["cpu_seconds"] or row["seconds"]
            whole.setdefault(_like(row["attack"], row), []).append(spent)
            if row["gradient_evaluations"] and row["budget"]:
                for attack in (row["attack"], ANY):
                    evaluation.setdefault(_like(attack, row), []).append(spent / row["gradient_evaluations"])
    per_evaluation, per_case = (
        {like: statistics.median(values) for like, values in known.items()} for known in (evaluation, whole)
    )

    def seconds(case: Case) -> float | None:
        facts = {**vars(case), "client": str(case.client)}
        own = ATTACKS.name_of(type(case.attack)) or ""
        if (n := evaluations(case)) is None:
            return per_case.get(_like(own, facts))
        told = (per_evaluation[like] for attack in (own, ANY) if (like := _like(attack, facts)) in per_evaluation)
        one = next(told, None)
        return None if one is None else n * one

    return seconds


ANY = "any"


def _like(attack: str, facts: Any) -> tuple:
    """What the cost of an evaluation hangs on."""
    same = ("model", "dataset", "size", "client", "train", "clients")
    return (attack, len(facts["indices"]), *(facts[name] for name in same))


def evaluations(case: Case) -> int | None:
    """Gradient evaluations that a case is given; None where its attack takes no steps."""
    steps = getattr(case.attack, "steps", None)
    if not isinstance(steps, int):
        return None
    return steps * getattr(case.attack, "max_iter", 1) * getattr(case.attack, "restarts", 1)


def cell_name(case: Case) -> str:
    facts: list[Any] = [text(case.attack, brief=True), case.model, case.weights or "untrained", case.dataset]
    facts += [case.size and f"{case.size} px", len(case.indices) > 1 and f"batch {len(case.indices)}"]
    facts += [case.client != type(case.client)() and str(case.client), text(case.threat, brief=True)]
    facts += [case.defense and text(case.defense, brief=True), case.double and "float64", case.train and "train mode"]
    facts += [case.clients > 1 and f"{case.clients} clients", case.rounds > 1 and f"{case.rounds} rounds"]
    return ", ".join(str(fact) for fact in facts if fact)


FEW = (2, 6)
"""Two numbers of steps: the difference of their times is that of the steps between."""


def _tried(case: Case, root: Path | None, device: str) -> tuple[str | None, float | None]:
    """Why the case does not run, or its seconds."""
    steps: int = getattr(case.attack, "steps", 0)
    short = [case] if steps <= FEW[1] else [_with_steps(case, n) for n in FEW]
    seconds, whole = [], math.nan
    for each in short:
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                record, _ = attempt(each, root, device)
        except AttackError as error:
            cause = error.__cause__ or error
            return f"{cause}", None
        except Exception as error:  # noqa: BLE001 # one cell's, whatever it is
            return f"{error}", None
        whole = time.perf_counter() - start
        seconds.append(record["seconds"] or 0.0)
    if len(seconds) == 2:
        whole += (steps - FEW[1]) * max(0.0, seconds[1] - seconds[0]) / (FEW[1] - FEW[0])
    return None, whole


def _with_steps(case: Case, steps: int) -> Case:
    return dataclasses.replace(case, attack=dataclasses.replace(case.attack, steps=steps))  # type: ignore[type-var]
