"""What a run would do, before it is started: the cells that apply, those that don't, and the hours."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gi_lib import progress
from gi_lib.bench.cases import Case, text
from gi_lib.bench.measure import AttackError, attempt


@dataclass(frozen=True)
class Cell:
    """Cases that differ in their images and seeds alone.

    Args:
        name: attack, model, weights, dataset and what else makes it.
        cases: how many of them a run would run.
        reason: why the attack does not apply, or fails; None where it runs.
        seconds: of one case, estimated; None where there is a reason.
    """

    name: str
    cases: int
    reason: str | None
    seconds: float | None


def plan(cases: Iterable[Case], root: Path | None, device: str) -> list[Cell]:
    """Try one case of each cell with few steps on this device, and scale the time to all of its steps."""
    cells: dict[str, list[Case]] = {}
    for case in cases:
        cells.setdefault(_cell(case), []).append(case)
    return [_tried(name, some, root, device) for name, some in progress.bar(cells.items(), desc="plan", unit="cell")]


def _cell(case: Case) -> str:
    facts: list[Any] = [text(case.attack, brief=True), case.model, case.weights or "untrained", case.dataset]
    facts += [case.size and f"{case.size} px", len(case.indices) > 1 and f"batch {len(case.indices)}"]
    facts += [case.client != type(case.client)() and str(case.client), text(case.threat, brief=True)]
    facts += [case.defense and text(case.defense, brief=True), case.double and "float64", case.train and "train mode"]
    facts += [case.clients > 1 and f"{case.clients} clients", case.rounds > 1 and f"{case.rounds} rounds"]
    return ", ".join(str(fact) for fact in facts if fact)


FEW = (2, 6)
"""Two numbers of steps: the difference of their times is that of the steps between."""


def _tried(name: str, cases: list[Case], root: Path | None, device: str) -> Cell:
    case = cases[0]
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
            return Cell(name, len(cases), f"{cause}", None)
        except Exception as error:  # noqa: BLE001 # one cell's, whatever it is
            return Cell(name, len(cases), f"{error}", None)
        whole = time.perf_counter() - start
        seconds.append(record["seconds"] or 0.0)
    if len(seconds) == 2:
        whole += (steps - FEW[1]) * max(0.0, seconds[1] - seconds[0]) / (FEW[1] - FEW[0])
    return Cell(name, len(cases), None, whole)


def _with_steps(case: Case, steps: int) -> Case:
    return dataclasses.replace(case, attack=dataclasses.replace(case.attack, steps=steps))  # type: ignore[type-var]
