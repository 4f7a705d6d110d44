"""The questions that need no search: labels, equations, returned statistics, closed forms, the server, the checks."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from gi_lib import checks, metrics
from gi_lib import labels as rules
from gi_lib.attacks import RGAP, SPEAR, BiasRatio, RobbingTheFed
from gi_lib.attacks.bn_update import Inferred
from gi_lib.audit.case import RETURNED, TO_CHANGE, Case, Result, Target, on_each, on_images, run
from gi_lib.audit.facts import MOST_DRAWS, MOST_UNKNOWNS, largest_system, public_images, rank
from gi_lib.audit.report import NO_SIGN, REFUSED, Finding
from gi_lib.copies import batch_norms
from gi_lib.federated import ThreatModel, granted, observe
from gi_lib.results.verdicts import beyond_chance
from gi_lib.types import NotApplicableError, Observation

RANK_SHARE = 0.2
"""Of the budget, that counting the rank may take."""
SAME = 1e-3
"""How near to the batch's own, in parts of their norm, inferred statistics count as these."""


def which_labels(case: Case) -> Finding:
    """What the label rules find, and which classes the last layer's bias proves to be there."""
    question, attacker = "Which classes are in the batch?", case.attacker(None)
    hits, images, chance = 0, 0, 0.0
    said, reason = [], ""
    proven: list[int] = []
    for target in case.targets:
        obs = target.see(ThreatModel())
        try:
            found = rules.infer(obs)
        except NotApplicableError as error:
            reason = str(error)
            continue
        if target.truth is None:
            known = "given" if obs.labels is not None else f"inferred by {rules.chosen(obs)}"
            said.append(f"recorded update: labels {', '.join(map(str, found.tolist()))}, {known}")
            proven = [] if case.details or obs.labels is not None else _proven(obs)
            continue
        hits += round(metrics.label_accuracy(found.cpu(), target.truth.labels) * len(found))
        images += len(found)
        chance += _chance(target.truth.labels, obs.num_classes) * len(found)
    if not images and not said:
        return Finding(question, "not tried", "no rule applies", reason, attacker, {"kind": "labels"})
    answer, sure = "not found", "no client could be simulated"
    if images:
        chance /= images
        named = rules.chosen(case.targets[0].see(ThreatModel()))
        said.append(f"simulated clients: {hits} of {images} labels found by {named} (chance {chance:.0%})")
        answer = "leaks" if hits == images else "leaks in part" if beyond_chance(hits, images, chance) else "not found"
        sure = f"measured on {images} image{'s' if images > 1 else ''} of simulated clients"
    if proven:
        said.append(f"recorded update: the bias gradient of {', '.join(map(str, proven))} is negative")
        answer = "leaks" if answer == "leaks" else "leaks in part"
        sure = "certain, if labels are hard and nothing was added: only a class that is there has a negative gradient"
    numbers = {"kind": "labels", "found": hits, "images": images, "chance": chance, "proven": proven}
    return Finding(question, answer, sure, "; ".join(said), attacker, numbers, change=TO_CHANGE["labels"])


def _proven(obs: Observation) -> list[int]:
    """The classes of which dL/db_k = mean(p_k - [y = k]) is negative."""
    try:
        _, bias = rules.last_layer(obs)
    except NotApplicableError:
        return []
    return [] if bias is None else (bias < 0).nonzero().flatten().tolist()


def _chance(truth: Tensor, classes: int) -> float:
    """Expected share of the labels that as many guesses at random find; as those of the rules, they may repeat."""
    guesses = torch.randint(classes, (500, len(truth)), generator=torch.Generator().manual_seed(0))
    return sum(metrics.label_accuracy(guess, truth) for guess in guesses) / len(guesses)


def counted(case: Case, budget: float) -> Finding:
    """Equations against unknowns, and the rank of the Jacobian where it can be counted in time."""
    obs = case.targets[0].see(ThreatModel())
    unknowns = math.prod(case.shape) * case.batch_size
    equations = sum(int(g.count_nonzero()) for g in obs.gradient.values())
    found, why = None, f"{unknowns:,} unknowns take more than {RANK_SHARE:.0%} of the budget"
    if not case.simulated or case.details:
        why = "it is counted for one step of a simulated client"
    elif equations >= unknowns:
        assert case.simulated[0].truth is not None
        try:
            found = rank(case.model, case.simulated[0].truth, seconds=RANK_SHARE * budget)
        except (ValueError, RuntimeError) as error:  # a model that is not one in float64
            why = str(error)
    evidence = f"{equations:,} numbers of the update are not zero, for {unknowns:,} unknown pixels"
    answer, sure = "open", "more equations than unknowns are necessary, and not sufficient: they may repeat each other"
    if equations < unknowns:
        answer, sure = "too few", "counted: a prior must supply what the update does not hold"
    elif found is None:
        case.untried.append(("rank of the equations", why))
    else:
        evidence += f"; at the images of a simulated client their rank is {found:,}"
        full = found == unknowns
        answer = "determined nearby" if full else "not determined"
        sure = "counted: " + (
            "no other images near these have the same update; how to find them is another question"
            if full
            else "some changes of the images do not change the update, to first order"
        )
    numbers = {"kind": "count", "equations": equations, "unknowns": unknowns, "rank": found}
    return Finding("Does the update determine the images?", answer, sure, evidence, "nobody: a property", numbers)


def returned(case: Case) -> list[Finding]:
    """Whether the running statistics that come back tell those of the batch."""
    if not batch_norms(case.targets[0].see(ThreatModel()).model):
        return []
    threat, told, layers, apart = granted(Inferred()), [], 0, 0.0
    numbers, reason = 0, ""
    for target in case.targets:
        try:
            goal, _ = Inferred()(target.see(threat))
        except NotApplicableError as error:
            reason = str(error)
            continue
        layers, numbers = len(goal), sum(mean.numel() + var.numel() for mean, var in goal.values())
        told.append(target)
        if target.truth is not None:
            own = target.see(dataclasses.replace(threat, knows_bn_stats=True)).bn_stats or {}
            pairs = [(a, b) for name in goal for a, b in zip(goal[name], own[name], strict=True)]
            apart = max(apart, *(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs))
    if not told:
        case.untried.append(("what the returned statistics tell", reason))
        return []
    question = "Do the running statistics that come back tell the batch's?"
    evidence = f"{numbers:,} numbers of the batch, the mean and variance of each channel of {layers} batch norms"
    answer, sure = "leaks", "solved: the new running value is a known mixture of the old one and the batch's"
    if any(target.truth is not None for target in told):
        evidence += f"; of simulated clients they are inferred to within {apart:.1g} of their norm"
        answer = "leaks" if apart < SAME else "leaks in part"
    if len(told) < len(case.targets):
        evidence += f"; not of every update: {reason}"
    attacker = case.attacker(Inferred(), [RETURNED])
    found = {"kind": "statistics", "numbers": numbers, "layers": layers, "apart": apart}
    return [Finding(question, answer, sure, evidence, attacker, found, change=TO_CHANGE["statistics"])]


def closed_forms(case: Case) -> list[Finding]:
    found = [
        *_closed_form(case, BiasRatio(), "bias ratio", "one division"),
        *_closed_form(case, RGAP(), "R-GAP", "linear equations, layer by layer"),
    ]
    if case.batch_size > 1:  # of one image the bias ratio is the same
        found += _closed_form(case, SPEAR(draws=MOST_DRAWS), "SPEAR", "null vectors of rows of a gradient")
    return found


def _closed_form(case: Case, attack: Any, name: str, cost: str) -> list[Finding]:
    def solved(i: int, target: Target) -> Result:
        obs = target.see(granted(attack))
        if isinstance(attack, RGAP) and (size := largest_system(obs)) > MOST_UNKNOWNS:
            raise NotApplicableError(f"a layer has {size:,} unknowns, and up to {MOST_UNKNOWNS:,} are solved here")
        return run(case, attack, target, obs)

    if not (results := on_each(case, f"closed form ({name})", case.targets, solved)):
        return []
    return [
        on_images(case, f"Does a formula give the images? ({name})", results, case.attacker(attack), cost, "formula")
    ]


def malicious(case: Case) -> list[Finding]:
    """An imprint before the model. It has to be planted before the round, so that clients are simulated."""
    attack, what = RobbingTheFed(), "a server that changes the model (Robbing the Fed)"
    public = public_images(case.shape, split="train")
    if public is None or not case.simulated:
        needed = "it needs public images, and clients simulated on others, before the round"
        case.untried.append((what, needed))
        return []

    def read(i: int, target: Target) -> Result:
        assert target.truth is not None
        rng = torch.Generator().manual_seed(case.seed + i)
        planted, trapdoor = attack.plant(case.model, case.shape, public, rng)
        threat = granted(attack, details=case.details)
        settings = {"client": case.client, "defense": case.defense, "threat": threat, "auxiliary": public}
        obs = observe(planted, target.truth, **settings, trapdoor=trapdoor, rng=rng)  # type: ignore[arg-type]
        return run(case, attack, target, obs)

    if not (results := on_each(case, what, case.simulated, read)):
        return []
    attacker = f"a server that puts a layer of its own before the model, with public images ({granted(attack).letter})"
    question = "What does a server get that changes the model? (Robbing the Fed)"
    found = on_images(case, question, results, attacker, "one subtraction", "server")
    return [dataclasses.replace(found, numbers=found.numbers | {"malicious": True})]


def checked(case: Case) -> list[Finding]:
    """What a client's checks say of the model as it is, on the first simulated client's batch."""
    if not case.simulated:
        case.untried.append(("what a client can check", "no client could be simulated"))
        return []
    assert case.simulated[0].truth is not None
    try:
        verdict = checks.received(case.model, case.simulated[0].truth)
    except (ValueError, RuntimeError) as error:
        case.untried.append(("what a client can check", str(error)))
        return []
    sure = f"{len(verdict.findings)} checks, each with a threshold that honest networks stay under"
    if not verdict.refused:
        sure += "; a plant that knows the checks may pass them"
    if case.batch_size < checks.ROWS:
        sure += (
            f"; on {case.batch_size} image{'s' if case.batch_size > 1 else ''}, too few for those that look at a batch"
        )
    numbers = {f.check: f.value if math.isfinite(f.value) else None for f in verdict.findings}
    return [
        Finding(
            "Does the model look planted?",
            REFUSED if verdict.refused else NO_SIGN,
            sure,
            "; ".join(map(str, verdict.findings)),
            "nobody: a client asks it of the model that it received",
            {"kind": "checks", **numbers},
            change=TO_CHANGE["server"],
        )
    ]
