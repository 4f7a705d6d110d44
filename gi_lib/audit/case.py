"""What is audited: a recorded update and simulated clients, and what an attack on them came to."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gi_lib import metrics
from gi_lib.audit.facts import Pictures, picture_uri
from gi_lib.audit.report import ANSWERS, Finding
from gi_lib.defenses import Defense
from gi_lib.federated import PLAIN, Client, ThreatModel, Update, granted, observe, receive
from gi_lib.results.verdicts import beyond_chance
from gi_lib.types import Batch, Classifier, NotApplicableError, Observation, Reconstruction, Scores, WithheldError

SHOWN = 8
"""Images of a batch that a report shows."""
THE_LABELS = "the labels"
STATISTICS = "the batch's batch-norm statistics"
RETURNED = "the running statistics that come back"
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


@dataclass(frozen=True)
class Target:
    """A recorded update, or a simulated client, whose images the judge alone knows."""

    name: str
    see: Callable[[ThreatModel], Observation]
    truth: Batch | None = None


@dataclass(frozen=True)
class Result:
    """What one attack came to on one target."""

    target: Target
    rec: Reconstruction | None
    scores: Scores | None = None
    failed: str = ""


@dataclass(frozen=True)
class Case:
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
    targets: list[Target] = field(default_factory=list)
    untried: list[tuple[str, str]] = field(default_factory=list)

    @property
    def details(self) -> bool:
        """Whether the client has training details, which its attacker is told."""
        return self.client.steps > 1 or self.client.optimiser != PLAIN

    @property
    def simulated(self) -> list[Target]:
        return [target for target in self.targets if target.truth is not None]

    def attacker(self, attack: Any, told: Sequence[str] = ()) -> str:
        threat = granted(attack, labels=THE_LABELS in told, details=self.details)
        who = "an attacker with" if told else "an eavesdropper with"
        known = ["the update", "the model", "the batch size"]
        known += ["the client's training details"] * self.details + list(told)
        return f"{who} {', '.join(known[:-1])} and {known[-1]} ({threat.letter})"


def recorded_update(case: Case, update: Update, labels: Tensor | None) -> Target:
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

    return Target("recorded update", see)


def simulated_clients(case: Case, clients: int) -> list[Target]:
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

    def target(i: int, batch: Batch) -> Target:
        seen: dict[ThreatModel, Observation] = {}

        def see(threat: ThreatModel) -> Observation:
            threat = dataclasses.replace(threat, knows_training_details=case.details)
            if threat not in seen:
                rng = torch.Generator().manual_seed(case.seed + i)
                settings = {"client": case.client, "defense": case.defense, "threat": threat}
                seen[threat] = observe(case.model, batch, **settings, rng=rng)  # type: ignore[arg-type]
            return seen[threat]

        return Target(f"simulated client {i + 1}", see, batch)

    batches = [case.pictures.batch(part, case.model.num_classes) for part in order.split(size) if len(part) == size]
    return [target(i, batch) for i, batch in enumerate(batches[:clients])]


def run(case: Case, attack: Any, target: Target, obs: Observation) -> Result:
    try:
        rec, truth = attack(obs, torch.Generator().manual_seed(case.seed)), target.truth
        scores = None if truth is None else metrics.evaluate(rec, truth, candidates=case.candidates)
    except NotApplicableError:
        raise
    except (ArithmeticError, ValueError, RuntimeError) as error:
        return Result(target, None, failed=str(error))
    return Result(target, rec, scores)


def on_each(case: Case, what: str, targets: Sequence[Target], result: Callable[[int, Target], Result]) -> list[Result]:
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


def on_images(case: Case, question: str, results: Sequence[Result], attacker: str, spent: str, by: str) -> Finding:
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


def _shown(result: Result) -> tuple[str, str] | None:
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
