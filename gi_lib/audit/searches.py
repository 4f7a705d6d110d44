"""The searches of an audit, and how they share its time."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gi_lib.attacks import DLG, IDLG, SME, BatchNormUpdate, FedAvgEpochs, GradInversion, InvertingGradients
from gi_lib.audit.case import RETURNED, STATISTICS, THE_LABELS, Case, Result, Target, on_each, on_images, run
from gi_lib.audit.facts import PIECEWISE_LINEAR
from gi_lib.audit.report import Finding
from gi_lib.copies import batch_norms
from gi_lib.federated import ThreatModel, granted
from gi_lib.types import NotApplicableError, Observation

LEAST_STEPS = 20
"""Fewer steps of a search are none."""
USEFUL = 100
"""Evaluations that a search must have before another search shares the budget."""


@dataclass
class Search:
    """A search, what it is shown, and what it costs.

    Args:
        make: the attack with so many steps.
        most: steps that its paper takes.
        least: steps under which it is left out, where there is another.
        told: what it is told beyond the least.
        seconds: of a step on one target.
    """

    name: str
    make: Callable[[int], Any]
    most: int
    least: int
    told: list[str] = field(default_factory=list)
    seen: list[tuple[Target, Observation]] = field(default_factory=list)
    seconds: float = math.inf

    def useful(self, seconds: float) -> bool:
        return self.affords(seconds) >= self.least

    def affords(self, seconds: float) -> int:
        """Steps on each target in so many seconds."""
        return min(self.most, int(max(0.0, seconds) / len(self.seen) / self.seconds))


def check_budget(obs: Observation, targets: int, budget: float, seed: int) -> None:
    """ValueError unless the cheapest search can take its least number of steps on every target."""
    y = torch.zeros(obs.batch_size or 1, dtype=torch.int64, device=obs.device)
    each = _step_seconds(InvertingGradients(steps=2, label_rule=lambda obs: y), obs, seed)
    least = LEAST_STEPS * each * targets
    if budget < least:
        raise ValueError(
            f"a budget of {budget:g} s is too small for any search: a step takes about {each:.2g} s here, and"
            f" {LEAST_STEPS} steps on {targets} update{'s' if targets > 1 else ''} take {least:.2g} s; give at least"
            f" {math.ceil(2 * least)} s, or fewer clients, or smaller images"
        )


def _step_seconds(attack: Any, obs: Observation, seed: int) -> float:
    """Wall time of a step of an attack of two steps, and one evaluation at the end; the first run warms up."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        with contextlib.suppress(ArithmeticError):  # no finite loss: the run itself will tell
            attack(obs, torch.Generator().manual_seed(seed))
        taken.append((time.perf_counter() - begun) / 3)
    return min(taken)


def _battery(obs: Observation) -> list["Search"]:
    """The searches that this model and client call for, in an attacker's order.

    SME, whose step costs one gradient, where a client takes several local steps; L-BFGS where the model is smooth; then
    first order, which simulates the steps.
    """
    found = [Search("Inverting Gradients", lambda n: InvertingGradients(steps=n), InvertingGradients.steps, USEFUL)]
    if not any(isinstance(layer, PIECEWISE_LINEAR) for layer in obs.model.modules()):
        one = obs.batch_size == 1
        found.insert(
            0,
            Search(
                "iDLG" if one else "DLG",
                (lambda n: IDLG(steps=n)) if one else (lambda n: DLG(steps=n)),
                DLG.steps,
                USEFUL // DLG.max_iter,
            ),
        )
    client: Any = obs.client
    if getattr(client, "steps", 1) > 1:
        found.insert(0, Search("SME", lambda n: SME(steps=n), SME.steps, USEFUL))
        if client.local_batch is not None and client.local_batch < (obs.batch_size or 1):
            found.append(Search("copies of epochs", lambda n: FedAvgEpochs(steps=n), FedAvgEpochs.steps, USEFUL))
    if batch_norms(obs.model):
        found.append(Search("GradInversion", lambda n: GradInversion(steps=n, restarts=2), GradInversion.steps, USEFUL))
    if any(norm.training and norm.running_mean is not None for norm in batch_norms(obs.model).values()):
        found.append(Search("batch-norm update", lambda n: BatchNormUpdate(steps=n), BatchNormUpdate.steps, USEFUL))
    return found


def searched(case: Case, end: float, steps: int | None) -> list[Finding]:
    """Each search on every target with as many steps as what is left of the time allows, shared out evenly."""
    plan: list[Search] = []
    for search in _battery(case.targets[0].see(ThreatModel())):
        for target in case.targets:
            try:
                obs, told = _seen(search.make(1), target)
                search.told += [fact for fact in told if fact not in search.told]
                search.seen.append((target, obs))
            except NotApplicableError as error:
                case.untried.append((f"{search.name} on the {target.name}", str(error)))
        if search.seen:
            plan.append(search)
    if steps is None:
        for search in plan:
            search.seconds = _first_step(case, search)
        plan = [search for search in plan if search.seen]
        while len(plan) > 1 and (short := [s for s in plan if not s.useful((end - time.perf_counter()) / len(plan))]):
            plan.remove(short[-1])
            case.untried.append((short[-1].name, f"the budget leaves it less than {short[-1].least} steps"))
    findings = []
    for i, search in enumerate(plan):
        affords = search.affords((end - time.perf_counter()) / (len(plan) - i))
        n = steps or max(affords, min(search.least, LEAST_STEPS))
        begun = time.perf_counter()

        def tried(i: int, target: Target, search: Search = search, n: int = n) -> Result:
            return run(case, search.make(n), target, search.seen[i][1])

        results = on_each(case, search.name, [target for target, _ in search.seen], tried)
        if not results:
            continue
        spent = f"{n:,} steps on each update, {time.perf_counter() - begun:.0f} s in all"
        question = f"Does a search find the images? ({search.name})"
        attacker = case.attacker(search.make(1), search.told)
        by = "statistics" if {STATISTICS, RETURNED} & set(search.told) else "search"
        findings.append(on_images(case, question, results, attacker, spent, by))
    return findings


def _first_step(case: Case, search: "Search") -> float:
    """Seconds of a step on the first target that the search does not refuse; the others are dropped from it."""
    while search.seen:
        target, obs = search.seen[0]
        try:
            return _step_seconds(search.make(2), obs, case.seed)
        except NotApplicableError as error:
            case.untried.append((f"{search.name} on the {target.name}", str(error)))
            del search.seen[0]
    return math.inf


def _seen(attack: Any, target: Target) -> tuple[Observation, list[str]]:
    """What the attack is shown, and what it was told beyond the least; the labels, where no rule finds them."""
    threat = granted(attack)
    told = [STATISTICS] * threat.knows_bn_stats + [RETURNED] * threat.knows_buffers
    obs = target.see(threat)
    try:
        obs.need(attack)
    except NotApplicableError:
        obs = target.see(dataclasses.replace(threat, knows_labels=True))
        obs.need(attack)
    return obs, told + ([THE_LABELS] if obs.labels is not None else [])
