"""Is my model exposed? What this package has, run against one model within a budget, question by question.

An audit can show that a model leaks. It can't show that one does not: what was not found within a budget may be found
by more of it, or by an attack that is not here. Attacks see an Observation and nothing else; simulated clients are
scored after they have ended.
"""

import math
import time
import warnings

import torch
from torch import Tensor

from gi_lib import provenance
from gi_lib.audit.case import Case, recorded_update, simulated_clients
from gi_lib.audit.facts import Pictures, facts_of, public_images
from gi_lib.audit.questions import checked, closed_forms, counted, malicious, returned, which_labels
from gi_lib.audit.report import ANSWERS, Audit, Finding, write, write_failure
from gi_lib.audit.searches import check_budget, searched
from gi_lib.defenses import Defense
from gi_lib.federated import FEDSGD, Client, ThreatModel, Update
from gi_lib.types import Batch, Classifier, check_shape

__all__ = ["ANSWERS", "Audit", "Finding", "audit", "write", "write_failure"]

CANDIDATES = 500
"""The most images among which a reconstruction must find its original, to count as identified."""
NOT_HERE = (
    ("priors that are generative, untrained or of diffusion", "not in this package yet"),
    ("learned inversion", "not in this package yet"),
    ("unmixing of batches (cocktail party, SPEAR++)", "an audit unmixes with SPEAR"),
    ("many rounds on the same data", "an audit looks at one round"),
    ("attackers who know the defense", "an audit's attackers take the update as it is"),
)


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
    case = Case(model, shape, batch_size, client, defense, seed, pictures, candidates)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if update is not None:
            case.targets.append(recorded_update(case, update, labels))
        case.targets.extend(simulated_clients(case, clients))
        first = case.targets[0].see(ThreatModel())
    care = tuple(dict.fromkeys(" ".join(str(w.message).split()) for w in caught))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an attack says of one observation, the findings say of all
        started = time.perf_counter()
        if steps is None:
            check_budget(first, len(case.targets), budget, seed)
        findings = [which_labels(case), counted(case, budget), *returned(case), *closed_forms(case), *malicious(case)]
        findings += checked(case)
        findings += searched(case, started + budget, steps)
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
