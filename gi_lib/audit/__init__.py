"""Is my model exposed? What this package has, run against one model within a budget, question by question.

An audit can show that a model leaks. It can't show that one does not: what was not found within a budget may be found
by more of it, or by an attack that is not here. Attacks see an Observation and nothing else; simulated clients are
scored after they have ended.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gi_lib import checks, metrics, provenance
from gi_lib import labels as rules
from gi_lib.attacks import (
    DLG,
    IDLG,
    RGAP,
    SME,
    SPEAR,
    BatchNormUpdate,
    BiasRatio,
    FedAvgEpochs,
    GradInversion,
    InvertingGradients,
    RobbingTheFed,
)
from gi_lib.attacks.bn_update import Inferred
from gi_lib.audit import page
from gi_lib.audit.facts import (
    MOST_DRAWS,
    MOST_UNKNOWNS,
    PIECEWISE_LINEAR,
    Pictures,
    facts_of,
    largest_system,
    picture_uri,
    public_images,
    rank,
)
from gi_lib.copies import batch_norms
from gi_lib.defenses import Defense
from gi_lib.federated import PLAIN, Client, ThreatModel, Update, granted, observe, receive
from gi_lib.results.verdicts import beyond_chance
from gi_lib.types import (
    Batch,
    Classifier,
    NotApplicableError,
    Observation,
    Reconstruction,
    Scores,
    WithheldError,
    check_shape,
)

__all__ = ["ANSWERS", "Audit", "Finding", "audit", "granted", "write", "write_failure"]

ANSWERS = ("leaks", "leaks in part", "not found", "not tried")
"""From the worst. None of them says "safe"."""
REFUSED, NO_SIGN = "refuse it", "no sign"
"""Answers to whether the model looks planted."""
LEAST_STEPS = 20
"""Fewer steps of a search are none."""
USEFUL = 100
"""Evaluations that a search must have before another search shares the budget."""
SHOWN = 8
"""Images of a batch that a report shows."""
RANK_SHARE = 0.2
"""Of the budget, that counting the rank may take."""
FEDSGD = Client()
THE_LABELS = "the labels"
STATISTICS = "the batch's batch-norm statistics"
RETURNED = "the running statistics that come back"
SAME = 1e-3
"""How near to the batch's own, in parts of their norm, inferred statistics count as these."""
BOUND = "Where a bound is needed whoever attacks: DP-SGD, with accounting over all rounds. Nothing else here gives one."
TO_CHANGE = {
    "labels": "Labels: let secure aggregation add the clients' updates before the server sees one. Then it learns the"
    " classes of all clients together.",
    "formula": "First layer: let a convolution see the pixels, in place of a dense layer with a bias, whose gradients"
    " give its input by a division.",
    "server": "The server: let clients compare the model that they get with the one that was agreed on, and refuse any"
    " other.",
    "search": "Images: give each client more of them in a step, and aggregate over clients, so that nobody sees the"
    " update of a few.",
    "statistics": "Batch norm: keep the running statistics at the client.",
    "nothing": "Nothing found is not nothing there: audit again with more time (--budget), weights as in your rounds"
    " (--weights) and images of your own (--images).",
}
"""What to change where something leaks, or where nothing was found."""
CANDIDATES = 500
"""The most images among which a reconstruction must find its original, to count as identified."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Args:
        question: what is asked.
        answer: one of ANSWERS; of what is counted "determined nearby", "not determined", "too few", or "open"; of the
            client's checks "refuse it" or "no sign".
        sure: how sure that is, and why.
        evidence: what was measured, each number with its floor and its chance.
        attacker: what the attacker must know or do, with the letter of the threat model.
        numbers: the same numbers, for the JSON.
        pictures: caption and data URI.
        change: what makes the answer better, or surer.
    """

    question: str
    answer: str
    sure: str
    evidence: str
    attacker: str
    numbers: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[tuple[str, str], ...] = ()
    change: str = ""

    @property
    def leaks(self) -> bool:
        """Whether something was shown to leak, at least in part."""
        return self.answer in ANSWERS[:2]


@dataclass(frozen=True)
class Audit:
    """What was asked of a model, and what came of it.

    Args:
        name: of the model.
        facts: what it is, its value, and what that means for what leaks.
        findings: one a question.
        untried: what was not tried, and why.
        care: warnings that bear on the result.
        made: what made the numbers.
    """

    name: str
    facts: tuple[tuple[str, str, str], ...]
    findings: tuple[Finding, ...]
    untried: tuple[tuple[str, str], ...]
    care: tuple[str, ...]
    made: dict[str, str]

    @property
    def answer(self) -> str:
        """The worst of ANSWERS that was found on images, of a server that is honest."""
        honest = [f for f in self.findings if f.numbers.get("kind") == "images" and not f.numbers.get("malicious")]
        return min((f.answer for f in honest), key=ANSWERS.index, default="not tried")

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change: of each finding that leaks, and how to look again where no images were found."""
        leaking = [f.change for f in self.findings if (f.leaks or f.answer == REFUSED) and f.change]
        again = [f.change for f in self.findings if f.answer == self.answer == "not found" and f.change]
        return (*dict.fromkeys(leaking + again), BOUND)

    @property
    def shown(self) -> tuple[tuple[str, str], ...]:
        """The pictures of the worst that was found: of an honest server, if images leak to one."""
        leaking = [f for f in self.findings if f.leaks and f.pictures]
        ranked = sorted(leaking, key=lambda f: (bool(f.numbers.get("malicious")), ANSWERS.index(f.answer)))
        return tuple((f"{f.question} {caption}", uri) for f in ranked[:1] for caption, uri in f.pictures[:1])

    @property
    def headline(self) -> str:
        """One sentence: the worst that was found of an honest server, and of one that changes the model."""
        said = {
            "leaks": "Exposed: images come back from the update",
            "leaks in part": "Exposed in part: some of an image comes back from the update",
            "not found": "No image was found within this budget, which proves nothing beyond it",
            "not tried": "No attack on the images could be run",
        }[self.answer]
        more = []
        if any(f.leaks for f in self.findings if f.numbers.get("kind") == "labels"):
            more.append("labels leak")
        if any(f.leaks for f in self.findings if f.numbers.get("kind") == "statistics"):
            more.append("the batch's statistics leak")
        if any(f.leaks for f in self.findings if f.numbers.get("malicious")):
            more.append("a server that changes the model gets images")
        if any(f.answer == REFUSED for f in self.findings):
            more.append("the model itself looks planted")
        return f"{said}{'; ' if more else ''}{'; '.join(more)}."

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, of types that JSON has."""
        findings = [{k: v for k, v in vars(f).items() if k != "pictures"} for f in self.findings]
        return {
            "name": self.name,
            "headline": self.headline,
            "what_to_change": list(self.advice),
            "facts": {what: value for what, value, _ in self.facts},
            "findings": findings,
            "not_tried": dict(self.untried),
            "take_care": list(self.care),
            "made": self.made,
        }

    def page(self) -> str:
        """The report as one self-contained HTML page."""
        return page.whole(self)

    def _repr_html_(self) -> str:
        return page.body(self)


def write(path: str | Path, html: str, values: dict[str, Any]) -> Path:
    """Write a report and the JSON beside it, each whole or not at all; returns where the JSON is.

    Raises:
        ValueError: the page would have the name of the JSON.
        OSError: they can't be written; then what was there before is still there.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"{path} would be the page and its JSON at once: name the page {path.with_suffix('.html')}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.with_suffix(".json").is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder has the name of the numbers", str(path.with_suffix(".json")))
    texts = {path: html, path.with_suffix(".json"): json.dumps(values, indent=1, ensure_ascii=False) + "\n"}
    parts = {where: where.with_name(f".{where.name}.{os.getpid()}.part") for where in texts}
    try:
        for where, text in texts.items():
            parts[where].write_text(text, encoding="utf-8")
        for where, part in parts.items():
            part.replace(where)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return path.with_suffix(".json")


def write_failure(path: str | Path, name: str, reason: str) -> bool:
    """Write the page of an audit that could not run, and its JSON, unless a report is there; returns whether it was.

    Only what an audit that could not run has left there is replaced.

    Raises:
        OSError: they can't be written.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    if path.exists() or beside.exists():
        try:
            earlier = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not isinstance(earlier, dict) or earlier.keys() != {"name", "error"}:
            return False
    write(path, page.failed(name, reason), {"name": name, "error": reason})
    return True


@dataclass(frozen=True)
class _Target:
    """A recorded update, or a simulated client, whose images the judge alone knows."""

    name: str
    see: Callable[[ThreatModel], Observation]
    truth: Batch | None = None


@dataclass(frozen=True)
class _Result:
    """What one attack came to on one target."""

    target: _Target
    rec: Reconstruction | None
    scores: Scores | None = None
    failed: str = ""


@dataclass(frozen=True)
class _Case:
    """What is audited, and what was not tried so far."""

    model: Classifier
    shape: tuple[int, int, int]
    batch_size: int
    client: Client
    defense: Defense | None
    seed: int
    pictures: Pictures | None
    candidates: Tensor | None
    """Images among which a reconstruction must find its original."""
    targets: list[_Target] = field(default_factory=list)
    untried: list[tuple[str, str]] = field(default_factory=list)

    @property
    def details(self) -> bool:
        """Whether the client has training details, which its attacker is told."""
        return self.client.steps > 1 or self.client.optimiser != PLAIN

    @property
    def simulated(self) -> list[_Target]:
        return [target for target in self.targets if target.truth is not None]

    def attacker(self, attack: Any, told: Sequence[str] = ()) -> str:
        threat = granted(attack, labels=THE_LABELS in told, details=self.details)
        who = "an attacker with" if told else "an eavesdropper with"
        known = ["the update", "the model", "the batch size"]
        known += ["the client's training details"] * self.details + list(told)
        return f"{who} {', '.join(known[:-1])} and {known[-1]} ({threat.letter})"


def audit(
    model: Classifier,
    image_shape: tuple[int, int, int],
    *,
    name: str = "model",
    update: Update | None = None,
    labels: Tensor | None = None,
    images: Batch | None = None,
    batch_size: int = 1,
    clients: int = 2,
    client: Client = FEDSGD,
    defense: Defense | None = None,
    budget: float = 60.0,
    steps: int | None = None,
    seed: int = 0,
) -> Audit:
    """Attack a recorded update, if there is one, and simulated clients, and say what leaks.

    Args:
        model: a classifier (models.build, models.wrap) with the weights that a round starts from, in the mode in
            which clients train it.
        image_shape: (C, H, W) of what it sees.
        name: how the report calls it.
        update: as `receive` takes it; the attacks on it have no truth to be scored against.
        labels: of the recorded update's images, int64 [B], where the attacker knows them.
        images: what simulated clients train on; None takes the embedded photographs, resized.
        batch_size: B, of each client; of the recorded update the number of its labels, where they are given.
        clients: how many are simulated; each has images of its own.
        client: what a client computes; the attacker knows it.
        defense: of the simulated clients; the attacker does not know it. A recorded update is taken as it is.
        budget: seconds of wall time for the searches; a little more passes before and after them.
        steps: of each search; None divides the budget among them.
        seed: of the attacks and the clients.

    Raises:
        ValueError: the update does not fit, the model can't be attacked, there are too few images for the batch, or
            the budget is too small for any search; the sentence says the least.
    """
    shape = check_shape(image_shape)
    for what, number in (("batch_size", batch_size), ("clients", clients), ("steps", 1 if steps is None else steps)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"an audit needs {what}, a whole number >= 1, got {number!r}")
    if isinstance(budget, bool) or not budget > 0 or not math.isfinite(budget):
        raise ValueError(f"an audit needs a budget in seconds, a finite number > 0, got {budget!r}")
    if labels is not None and update is None:
        raise ValueError("labels are those of a recorded update: give the update too")
    if images is not None and tuple(images.images.shape[1:]) != shape:
        raise ValueError(
            f"the images are {list(images.images.shape[1:])} and the model takes {list(shape)}: give image_shape, or"
            " resize the images"
        )
    batch_size = batch_size if labels is None else len(labels)
    public = public_images(shape)
    own = None if images is None else Pictures(images.images, images.labels, f"{len(images)} images of your own")
    known = [some.images for some in (own, public) if some is not None]
    candidates = torch.cat(known)[:CANDIDATES] if known else None
    pictures = own or public
    case = _Case(model, shape, batch_size, client, defense, seed, pictures, candidates)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if update is not None:
            case.targets.append(_recorded(case, update, labels))
        case.targets.extend(_simulated(case, clients))
        first = case.targets[0].see(ThreatModel())
    care = tuple(dict.fromkeys(" ".join(str(w.message).split()) for w in caught))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an attack says of one observation, the findings say of all
        started = time.perf_counter()
        if steps is None:
            _check_budget(first, len(case.targets), budget, seed)
        findings = [_labels(case), _counted(case, budget), *_returned(case), *_closed_forms(case), *_malicious(case)]
        findings += _checked(case)
        findings += _searches(case, started + budget, steps)
    made = {
        "time": f"{time.perf_counter() - started:.0f} s, "
        + (f"of a budget of {budget:g} s" if steps is None else f"for {steps} steps of each search"),
        "simulated on": "nothing" if pictures is None else pictures.about,
        "seed": str(seed),
        "commit": provenance.commit() or "unknown",
        "device": provenance.device_name(str(first.device)),
        "versions": ", ".join(f"{k} {v}" for k, v in provenance.versions().items()),
    }
    facts = facts_of(first, model, client, defense)
    return Audit(name, facts, tuple(findings), (*case.untried, *NOT_HERE), care, made)


NOT_HERE = (
    ("priors that are generative, untrained or of diffusion", "not in this package yet"),
    ("learned inversion", "not in this package yet"),
    ("unmixing of batches (cocktail party, SPEAR++)", "an audit unmixes with SPEAR"),
    ("many rounds on the same data", "an audit looks at one round"),
    ("attackers who know the defense", "an audit's attackers take the update as it is"),
)


def _recorded(case: _Case, update: Update, labels: Tensor | None) -> _Target:
    size = case.batch_size
    obs = receive(case.model, update, image_shape=case.shape, batch_size=size, labels=labels, client=case.client)

    def see(threat: ThreatModel) -> Observation:
        for asked, there, what in (
            (threat.knows_labels, obs.labels, "the labels"),
            (threat.knows_bn_stats, obs.bn_stats, "the batch-norm statistics"),
            (threat.knows_buffers, obs.buffers, "the running statistics"),
        ):
            if asked and there is None:
                raise WithheldError(f"{what} of the recorded batch are not given")
        return obs

    return _Target("recorded update", see)


def _simulated(case: _Case, clients: int) -> list[_Target]:
    """Clients with images of their own. Each computes the same update for every threat model."""
    if case.pictures is None:
        if not case.targets:
            raise ValueError(
                f"there is nothing to attack: no images of {case.shape[0]} channels are embedded; give a recorded"
                " update, or images of your own"
            )
        case.untried.append(("simulated clients", f"no images of {case.shape[0]} channels are embedded"))
        return []
    there, size = len(case.pictures.images), case.batch_size
    if size > there:
        raise ValueError(
            f"a batch of {size} needs as many images, and there are {there}; give more of them, or a smaller batch"
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(case.seed))

    def target(i: int, batch: Batch) -> _Target:
        seen: dict[ThreatModel, Observation] = {}

        def see(threat: ThreatModel) -> Observation:
            threat = dataclasses.replace(threat, knows_training_details=case.details)
            if threat not in seen:
                rng = torch.Generator().manual_seed(case.seed + i)
                settings = {"client": case.client, "defense": case.defense, "threat": threat}
                seen[threat] = observe(case.model, batch, **settings, rng=rng)  # type: ignore[arg-type]
            return seen[threat]

        return _Target(f"simulated client {i + 1}", see, batch)

    batches = [case.pictures.batch(part, case.model.num_classes) for part in order.split(size) if len(part) == size]
    return [target(i, batch) for i, batch in enumerate(batches[:clients])]


def _check_budget(obs: Observation, targets: int, budget: float, seed: int) -> None:
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


def _run(case: _Case, attack: Any, target: _Target, obs: Observation) -> _Result:
    try:
        rec, truth = attack(obs, torch.Generator().manual_seed(case.seed)), target.truth
        scores = None if truth is None else metrics.evaluate(rec, truth, candidates=case.candidates)
    except NotApplicableError:
        raise
    except (ArithmeticError, ValueError, RuntimeError) as error:
        return _Result(target, None, failed=str(error))
    return _Result(target, rec, scores)


def _labels(case: _Case) -> Finding:
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


def _counted(case: _Case, budget: float) -> Finding:
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


def _returned(case: _Case) -> list[Finding]:
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


def _closed_forms(case: _Case) -> list[Finding]:
    found = [
        *_closed_form(case, BiasRatio(), "bias ratio", "one division"),
        *_closed_form(case, RGAP(), "R-GAP", "linear equations, layer by layer"),
    ]
    if case.batch_size > 1:  # of one image the bias ratio is the same
        found += _closed_form(case, SPEAR(draws=MOST_DRAWS), "SPEAR", "null vectors of rows of a gradient")
    return found


def _each(
    case: _Case, what: str, targets: Sequence[_Target], result: Callable[[int, _Target], _Result]
) -> list[_Result]:
    """The result on each target. One that refuses is written down as not tried, and takes nothing from the others."""
    results, refused = [], []
    for i, target in enumerate(targets):
        try:
            results.append(result(i, target))
        except ValueError as error:  # it does not apply, or a defense or a model refuses what a server planted
            refused.append((f"{what} on the {target.name}", str(error)))
    if results or len({reason for _, reason in refused}) > 1:
        case.untried.extend(refused)
    elif refused:
        case.untried.append((what, refused[0][1]))
    return results


def _closed_form(case: _Case, attack: Any, name: str, cost: str) -> list[Finding]:
    def solved(i: int, target: _Target) -> _Result:
        obs = target.see(granted(attack))
        if isinstance(attack, RGAP) and (size := largest_system(obs)) > MOST_UNKNOWNS:
            raise NotApplicableError(f"a layer has {size:,} unknowns, and up to {MOST_UNKNOWNS:,} are solved here")
        return _run(case, attack, target, obs)

    if not (results := _each(case, f"closed form ({name})", case.targets, solved)):
        return []
    return [_images(case, f"Does a formula give the images? ({name})", results, case.attacker(attack), cost, "formula")]


def _malicious(case: _Case) -> list[Finding]:
    """An imprint before the model. It has to be planted before the round, so that clients are simulated."""
    attack, what = RobbingTheFed(), "a server that changes the model (Robbing the Fed)"
    public = public_images(case.shape, split="train")
    if public is None or not case.simulated:
        needed = "it needs public images, and clients simulated on others, before the round"
        case.untried.append((what, needed))
        return []

    def read(i: int, target: _Target) -> _Result:
        assert target.truth is not None
        rng = torch.Generator().manual_seed(case.seed + i)
        planted, trapdoor = attack.plant(case.model, case.shape, public, rng)
        threat = granted(attack, details=case.details)
        settings = {"client": case.client, "defense": case.defense, "threat": threat, "auxiliary": public}
        obs = observe(planted, target.truth, **settings, trapdoor=trapdoor, rng=rng)  # type: ignore[arg-type]
        return _run(case, attack, target, obs)

    if not (results := _each(case, what, case.simulated, read)):
        return []
    attacker = f"a server that puts a layer of its own before the model, with public images ({granted(attack).letter})"
    question = "What does a server get that changes the model? (Robbing the Fed)"
    found = _images(case, question, results, attacker, "one subtraction", "server")
    return [dataclasses.replace(found, numbers=found.numbers | {"malicious": True})]


def _checked(case: _Case) -> list[Finding]:
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


def _battery(obs: Observation) -> list["_Search"]:
    """The searches that this model and client call for, in an attacker's order.

    SME, whose step costs one gradient, where a client takes several local steps; L-BFGS where the model is smooth; then
    first order, which simulates the steps.
    """
    found = [_Search("Inverting Gradients", lambda n: InvertingGradients(steps=n), InvertingGradients.steps, USEFUL)]
    if not any(isinstance(layer, PIECEWISE_LINEAR) for layer in obs.model.modules()):
        one = obs.batch_size == 1
        found.insert(
            0,
            _Search(
                "iDLG" if one else "DLG",
                (lambda n: IDLG(steps=n)) if one else (lambda n: DLG(steps=n)),
                DLG.steps,
                USEFUL // DLG.max_iter,
            ),
        )
    client: Any = obs.client
    if getattr(client, "steps", 1) > 1:
        found.insert(0, _Search("SME", lambda n: SME(steps=n), SME.steps, USEFUL))
        if client.local_batch is not None and client.local_batch < (obs.batch_size or 1):
            found.append(_Search("copies of epochs", lambda n: FedAvgEpochs(steps=n), FedAvgEpochs.steps, USEFUL))
    if batch_norms(obs.model):
        found.append(
            _Search("GradInversion", lambda n: GradInversion(steps=n, restarts=2), GradInversion.steps, USEFUL)
        )
    if any(norm.training and norm.running_mean is not None for norm in batch_norms(obs.model).values()):
        found.append(_Search("batch-norm update", lambda n: BatchNormUpdate(steps=n), BatchNormUpdate.steps, USEFUL))
    return found


def _searches(case: _Case, end: float, steps: int | None) -> list[Finding]:
    """Each search on every target with as many steps as what is left of the time allows, shared out evenly."""
    plan: list[_Search] = []
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

        def tried(i: int, target: _Target, search: _Search = search, n: int = n) -> _Result:
            return _run(case, search.make(n), target, search.seen[i][1])

        results = _each(case, search.name, [target for target, _ in search.seen], tried)
        if not results:
            continue
        spent = f"{n:,} steps on each update, {time.perf_counter() - begun:.0f} s in all"
        question = f"Does a search find the images? ({search.name})"
        attacker = case.attacker(search.make(1), search.told)
        by = "statistics" if {STATISTICS, RETURNED} & set(search.told) else "search"
        findings.append(_images(case, question, results, attacker, spent, by))
    return findings


def _first_step(case: _Case, search: "_Search") -> float:
    """Seconds of a step on the first target that the search does not refuse; the others are dropped from it."""
    while search.seen:
        target, obs = search.seen[0]
        try:
            return _step_seconds(search.make(2), obs, case.seed)
        except NotApplicableError as error:
            case.untried.append((f"{search.name} on the {target.name}", str(error)))
            del search.seen[0]
    return math.inf


@dataclass
class _Search:
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
    seen: list[tuple[_Target, Observation]] = field(default_factory=list)
    seconds: float = math.inf

    def useful(self, seconds: float) -> bool:
        return self.affords(seconds) >= self.least

    def affords(self, seconds: float) -> int:
        """Steps on each target in so many seconds."""
        return min(self.most, int(max(0.0, seconds) / len(self.seen) / self.seconds))


def _seen(attack: Any, target: _Target) -> tuple[Observation, list[str]]:
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


def _images(case: _Case, question: str, results: Sequence[_Result], attacker: str, spent: str, by: str) -> Finding:
    """What the reconstructions of one attack say; `by` names what to change, in TO_CHANGE."""
    scored = [r.scores for r in results if r.scores is not None]
    total = sum(len(r.target.truth) for r in results if r.target.truth is not None)
    chances = [metrics.chance(1 / len(case.candidates), s.returned) for s in scored if case.candidates is not None]
    chance = sum(chances) / max(1, len(chances))  # all batches are of one size
    identified = sum(int(s.identified.sum()) for s in scored if s.identified is not None)
    recovered = sum(int(s.recovered.sum()) for s in scored)
    above = [v for s in scored for v in (s.psnr - s.floor)[s.matched >= 0].tolist()]
    said = []
    answer, sure = "not found", f"not established, by {spent}: more of it or another attack may find them"
    if total:
        mean = (
            f"on the mean {abs(sum(above)) / len(above):.1f} dB {'above' if sum(above) >= 0 else 'below'} the floor,"
            f" over the {len(above)} that came back"
            if above
            else "nothing came back"
        )
        said.append(
            f"simulated clients: {identified} of {total} images identified (chance {chance:.1%}),"
            f" {recovered} recovered, {mean}"
        )
        if recovered or beyond_chance(identified, total, chance):
            answer = "leaks" if recovered == total else "leaks in part"
            sure = f"measured on {total} image{'s' if total > 1 else ''} of simulated clients, by {spent}"
    for result in results:
        if result.failed:
            said.append(f"{result.target.name}: failed, {result.failed}")
        elif result.target.truth is None and result.rec is not None:
            said.append(_unscored(result.rec, [r.rec for r in results if r.rec is not None and r.scores is not None]))
            if result.rec.notes.get("certified"):
                answer, sure = "leaks", "certain: the gradient of what came back is the recorded update"
    if results and all(result.failed for result in results):
        answer, sure = "not tried", "every run failed"
    numbers = {"kind": "images", "identified": identified, "recovered": recovered, "images": total, "chance": chance}
    numbers |= {"above_floor": above, "spent": spent}
    pictures = tuple(shown for r in results if (shown := _shown(r)) is not None)
    change = TO_CHANGE[by if answer in ANSWERS[:2] else "nothing"]
    return Finding(question, answer, sure, "; ".join(said), attacker, numbers, pictures, change)


def _unscored(rec: Reconstruction, simulated: Sequence[Reconstruction]) -> str:
    """What can be said where the truth is not known: how well the update is matched."""
    if (apart := rec.notes.get("relative_error")) is not None:
        return f"recorded update: the gradient of what came back is {apart:.1g} of its norm away from it"
    if not math.isfinite(rec.loss):
        return f"recorded update: {len(rec.images)} images came back, which could not be certified"
    known = ", ".join(f"{other.loss:.2g}" for other in simulated if math.isfinite(other.loss))
    beside = f", where those of simulated clients ended at {known}" if known else ""
    return f"recorded update: the search ended at a matching loss of {rec.loss:.2g}{beside}"


def _shown(result: _Result) -> tuple[str, str] | None:
    """Caption and data URI of one target's images, the private ones above the rebuilt where they are known."""
    if result.rec is None or not len(result.rec.images) or result.rec.images.shape[1] not in (1, 3):
        return None
    images = result.rec.images.detach().cpu().clamp(0, 1)
    if result.target.truth is None or result.scores is None:
        return f"{result.target.name}: rebuilt", picture_uri([images[:SHOWN]])
    own, matched = result.target.truth.images, result.scores.matched
    ordered = torch.zeros_like(own)
    ordered[matched >= 0] = images[matched[matched >= 0]].to(own.dtype)
    decibels = ", ".join(f"{v:.1f} dB" if v == v else "missed" for v in result.scores.psnr[:SHOWN].tolist())
    return f"{result.target.name}: private above, rebuilt below; {decibels}", picture_uri(
        [own[:SHOWN], ordered[:SHOWN]]
    )
