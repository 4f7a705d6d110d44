"""What is run: a Case is one attack on one batch, with its key."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gi_lib import checkpoints, data, federated, labels, metrics, models, optimise, training
from gi_lib.attacks import ATTACKS
from gi_lib.defenses import DEFENSES, Defense
from gi_lib.federated import SGD, Adam, Client, LossGradient, ThreatModel
from gi_lib.provenance import PROFILES
from gi_lib.types import Observation, Reconstruction, differing, nearest, whole

Attack = Callable[[Observation, torch.Generator], Reconstruction]


TRAINED = "trained"
"""The weights that are made by the recipe of a case's model and dataset."""


@dataclass(frozen=True)
class Case:
    """One attack on one batch.

    Args:
        attack: a frozen dataclass such as DLG(restarts=8).
        model: a key of models.MODELS, or another's name as `models.build` takes it.
        dataset: a key of data.DATASETS, or folder:PATH for images of one's own.
        indices: the images of the batch, by their index in the split; of all clients, one after another.
        seed: of the model, the attack and the clients.
        weights: a key of models.WEIGHTS, "trained" for what training.RECIPES makes of the model on the dataset,
            name@hash of a checkpoint, or None for the untrained model.
        size: side of the images in pixels; None for the dataset's own.
        split: of the dataset.
        threat, client, defense: as in `observe`.
        train: whether the model is in train mode.
        clients: among how many clients the batch is shared out evenly; the attacker sees their mean.
        rounds: how many rounds on the same data the attacker sees; between two the server moves the model by
            `client.lr` times the update. The last one is attacked. Where the attack has `again`, that chooses the next
            model, and there are at most as many rounds.
        auxiliary: such a name, whose train split is the attacker's own.
        double: whether clients and attacker compute in float64.
        profile: a key of PROFILES; it is written down, and changes nothing else of the case.
        stage: where several studies are run as one queue, all of a stage run before any of the next.

    Raises:
        ValueError: a name is unknown, a number is out of range, or the weights are another model's.
    """

    attack: Attack
    model: str
    dataset: str
    indices: tuple[int, ...]
    seed: int = 0
    weights: str | None = None
    size: int | None = None
    split: str = "test"
    threat: ThreatModel = ThreatModel()
    client: Client = Client()
    defense: Defense | None = None
    train: bool = False
    clients: int = 1
    rounds: int = 1
    auxiliary: str | None = None
    double: bool = False
    profile: str = field(default="quick", metadata={"display": True})
    stage: int = field(default=1, metadata={"display": True})

    def __post_init__(self):
        if not callable(self.attack) or isinstance(self.attack, type):
            raise ValueError(f"a case needs an attack with its settings, such as DLG(), got {self.attack!r}")
        models.check_name(self.model)
        data.check_name(self.dataset)
        data.check_name(self.auxiliary or self.dataset)
        if not isinstance(self.profile, str) or self.profile not in PROFILES:
            raise ValueError(nearest(self.profile, PROFILES, "profile"))
        if self.weights is not None:
            _check_weights(self)
        whole(self, "seed", least=0)
        if self.size is not None:
            whole(self, "size")
        for name in ("train", "double"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Case needs {name}, True or False, got {getattr(self, name)!r:.60}")
        if self.split not in data.SPLITS:
            raise ValueError(nearest(self.split, data.SPLITS, "split"))
        if self.defense is not None and not isinstance(self.defense, Defense):
            raise ValueError(f"a case needs a Defense, or None, got {self.defense!r:.60}")
        whole(self, "clients", "rounds", "stage")
        if not isinstance(self.indices, tuple) or not self.indices:
            raise ValueError("a case needs at least one index, in a tuple; an attack on an empty batch has no meaning")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.indices):
            raise ValueError(f"the indices of a case are whole numbers >= 0, got {self.indices!r:.80}")
        if self.clients > len(self.indices):
            raise ValueError(f"{self.clients} clients can't share {len(self.indices)} images; give each at least one")
        if not isinstance(self.threat, ThreatModel) or not isinstance(self.client, Client):
            raise ValueError("a case needs a ThreatModel and a Client")
        for fact, given in (("has_auxiliary_data", self.auxiliary is not None), ("many_rounds", self.rounds > 1)):
            if getattr(self.threat, fact) != given:
                raise ValueError(
                    f"the threat model says {fact}={getattr(self.threat, fact)}, and the case says otherwise; set both"
                    " `auxiliary` or `rounds` and the fact, or neither"
                )


def _check_weights(case: Case) -> None:
    weights = case.weights
    if not isinstance(weights, str):
        raise ValueError(f"weights are named by a text, got {weights!r:.60}")
    if "@" in weights:
        checkpoints.check_reference(weights)
    elif weights == TRAINED:
        training.recipe(case.model, case.dataset)
        own = data.DATASETS[case.dataset].image_shape[1]
        if case.size not in (None, own):
            raise ValueError(
                f"{case.model} was trained on {case.dataset} at {own} px, not at {case.size}; leave size out"
            )
    elif weights not in models.WEIGHTS:
        raise ValueError(nearest(weights, [TRAINED, *models.WEIGHTS], "set of weights"))
    elif (owner := models.WEIGHTS[weights].model) != case.model:
        raise ValueError(f"the weights {weights!r} belong to {owner!r}, not to {case.model!r}")


_NAMES: dict[type, str] = {
    **{cls: name for name, cls in DEFENSES.items()},
    **{cls: cls.__name__ for cls in (Case, ThreatModel, Client, LossGradient, SGD, Adam)},
}


def text(value: Any, *, brief: bool = False) -> str:
    """A text that is the same in every process and on every machine, and differs where the value differs.

    A dataclass is written with the fields that are not at their default, but for those that only display, and with
    its revision; one of ours by its name in the registry, another by module and name; a function likewise. `brief`,
    for tables, has class names alone.

    Raises:
        ValueError: a part has no such text, as a lambda has none.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = [f"{name}={text(v, brief=brief)}" for name, v in differing(value).items()]
        name = cls.__qualname__ if brief else _name(cls)
        return f"{name}({', '.join(fields)}){'' if brief else _revision(cls)}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(text(v, brief=brief) for v in value) + "]"
    if isinstance(value, float):
        return repr(float(value))  # a float of numpy's writes its class as well
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    name = getattr(value, "__qualname__", "<")
    if "<" in name:
        raise ValueError(
            f"{value!r:.200} has no stable text, so that its case has no key; use a named function at the top of a"
            " module, or a dataclass"
        )
    return name if brief else f"{value.__module__}.{name}{_revision(value)}"


def _name(cls: type) -> str:
    return _NAMES.get(cls) or ATTACKS.name_of(cls) or f"{cls.__module__}.{cls.__qualname__}"


def _revision(thing: object) -> str:
    number = getattr(thing, "revision", None)
    return f"#{number}" if isinstance(number, int) else ""


def identity(case: Case) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the case's text without any revision.

    Two records of one identity are of the same case, made by different revisions: the later one counts.
    """
    return hashlib.sha256(re.sub(r"#\d+", "", text(case)).encode()).hexdigest()[:12]


def key(case: Case) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the case's text and of the revisions that it rests on.

    Trained weights are one of these, by the hash of their recipe: another recipe gives the case another key, and leaves
    its identity.
    """
    rests_on: dict[str, int | str] = {
        "client": federated.revision,
        "solvers": optimise.revision,
        "metrics": metrics.revision,
    }
    if not case.threat.knows_labels:
        rests_on["labels"] = labels.revision if len(case.indices) == 1 else labels.batch_revision
    if case.model in models.MODELS:
        rests_on[case.model] = models.MODELS[case.model].revision
    if case.weights == TRAINED:
        rests_on["recipe"] = training.recipe(case.model, case.dataset).hash
    whole_text = " ".join([text(case), *(f"{name}#{number}" for name, number in rests_on.items())])
    return hashlib.sha256(whole_text.encode()).hexdigest()[:12]
