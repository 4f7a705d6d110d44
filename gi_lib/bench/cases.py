"""What is run: a Case is one attack on one batch, with its key."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gi_lib import data, models
from gi_lib.defenses import Defense
from gi_lib.federated import ThreatModel, fedsgd
from gi_lib.types import LocalUpdate, Observation, Reconstruction, nearest

Attack = Callable[[Observation, torch.Generator], Reconstruction]


PROFILES = {
    "smoke": "tests: embedded data, seconds a case",
    "quick": "a reader's laptop: about a minute a chapter",
    "survey": "the published numbers; the record says what was spent",
}
"""What a run is for. A profile is written down with its case; each study and chapter says what it means there."""


LATER = {"later": True}
"""Metadata of a field that came after the first records: at its default it is left out of the key's text."""


@dataclass(frozen=True)
class Case:
    """One attack on one batch.

    Args:
        attack: a frozen dataclass such as DLG(restarts=8).
        model: a key of models.MODELS.
        dataset: a key of data.DATASETS.
        indices: the images of the batch, by their index in the split.
        seed: of the model, the attack and the defense.
        weights: a key of models.WEIGHTS, or None for the untrained model.
        size: side of the images in pixels; None for the dataset's own.
        split: of the dataset.
        threat, update, defense: as in `observe`.
        profile: a key of PROFILES; it is written down, and changes nothing else of the case.
        double: whether client and attacker compute in float64.

    Raises:
        ValueError: a name is unknown, the indices are empty, or the weights are another model's.
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
    update: LocalUpdate = fedsgd
    defense: Defense | None = None
    profile: str = "quick"
    double: bool = field(default=False, metadata=LATER)

    def __post_init__(self):
        names = ((self.model, models.MODELS, "model"), (self.dataset, data.DATASETS, "dataset"))
        for name, known, kind in (*names, (self.profile, PROFILES, "profile")):
            if name not in known:
                raise ValueError(nearest(name, known, kind))
        if self.weights is not None and self.weights not in models.WEIGHTS:
            raise ValueError(nearest(self.weights, models.WEIGHTS, "set of weights"))
        owner = self.model if self.weights is None else models.WEIGHTS[self.weights].model
        if owner != self.model:
            raise ValueError(f"the weights {self.weights!r} belong to {owner!r}, not to {self.model!r}")
        if not self.indices:
            raise ValueError("a case needs at least one index; an attack on an empty batch has no meaning")


def text(value: object, *, brief: bool = False) -> str:
    """A text that is the same in every process and on every machine, and differs where the value differs.

    Dataclasses are written with all their fields, but for those LATER at their default; functions by module and
    name. `brief` leaves out all fields at their default and the module, for tables.

    Raises:
        ValueError: a part has no such text, as a lambda has none.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [
            f"{f.name}={text(getattr(value, f.name), brief=brief)}"
            for f in dataclasses.fields(value)
            if not ((brief or "later" in f.metadata) and getattr(value, f.name) == f.default)
        ]
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(text(v, brief=brief) for v in value) + "]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    name = getattr(value, "__qualname__", "<")
    if "<" in name:
        raise ValueError(
            f"{value!r} has no stable text, so that its case has no key; use a named function at the top of a"
            " module, or a dataclass"
        )
    return name if brief else f"{value.__module__}.{name}"


def key(case: Case) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the case's text."""
    return hashlib.sha256(text(case).encode()).hexdigest()[:12]
