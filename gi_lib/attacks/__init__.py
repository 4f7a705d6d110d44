"""One file a paper.

An attack maps (Observation, torch.Generator) to a Reconstruction and never sees the
truth. What it can't do without stands in its `needs`. One that needs a malicious server
also has `plant`: (model, image_shape, auxiliary, generator) -> (the planted model, or
one for each client, and a trapdoor); one that asks again in the next round has `again`:
(observation, generator) -> the same, or None where it has what it seeks.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gi_lib.attacks.agic import AGIC
    from gi_lib.attacks.ares import ARES
    from gi_lib.attacks.bayes import BayesOptimal
    from gi_lib.attacks.bias_ratio import BiasRatio
    from gi_lib.attacks.bn_update import BatchNormUpdate
    from gi_lib.attacks.cocktail import CocktailParty
    from gi_lib.attacks.cocktail_features import CocktailFeatures
    from gi_lib.attacks.copa import COPA
    from gi_lib.attacks.cpl import CPL
    from gi_lib.attacks.dlg import DLG
    from gi_lib.attacks.e2egi import E2EGI
    from gi_lib.attacks.fedavg_epochs import FedAvgEpochs
    from gi_lib.attacks.fedleak import FedLeak
    from gi_lib.attacks.fishing import Fishing
    from gi_lib.attacks.gradinversion import GradInversion
    from gi_lib.attacks.hf_gradinv import HFGradInv
    from gi_lib.attacks.idlg import IDLG
    from gi_lib.attacks.inverting_gradients import InvertingGradients
    from gi_lib.attacks.loki import LOKI
    from gi_lib.attacks.mkor import MKOR
    from gi_lib.attacks.multiscale import Multiscale
    from gi_lib.attacks.practical_recipe import PracticalRecipe
    from gi_lib.attacks.qbi import QBI
    from gi_lib.attacks.rconv import RConv
    from gi_lib.attacks.rgap import RGAP
    from gi_lib.attacks.robbing_the_fed import RobbingTheFed
    from gi_lib.attacks.sapag import SAPAG
    from gi_lib.attacks.seer import SEER
    from gi_lib.attacks.sme import SME
    from gi_lib.attacks.spear import SPEAR
    from gi_lib.attacks.spear_pp import SPEARpp
    from gi_lib.attacks.trap_weights import TrapWeights
    from gi_lib.attacks.vgia import VGIA


class Registry(Mapping[str, Any]):
    """Name of a file -> the attack that it holds.

    A file is imported when its attack is first asked for. So a chapter rests on the
    attacks that it runs, and a change of one executes no other's chapter again.
    """

    def __init__(self, classes: dict[str, str]):
        self.names = {cls: name for name, cls in classes.items()}
        self._classes = classes

    def __getitem__(self, name: str) -> Any:
        cls = self._classes[name]
        return getattr(importlib.import_module(f"gi_lib.attacks.{name}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def name_of(self, cls: type) -> str | None:
        """The name of an attack; None for a class that is not here."""
        name = self.names.get(cls.__name__)
        here = cls.__module__ == f"gi_lib.attacks.{name}"
        return name if here else None


ATTACKS = Registry(
    {
        "agic": "AGIC",
        "ares": "ARES",
        "bayes": "BayesOptimal",
        "bias_ratio": "BiasRatio",
        "bn_update": "BatchNormUpdate",
        "cocktail": "CocktailParty",
        "cocktail_features": "CocktailFeatures",
        "copa": "COPA",
        "cpl": "CPL",
        "dlg": "DLG",
        "fedleak": "FedLeak",
        "fedavg_epochs": "FedAvgEpochs",
        "e2egi": "E2EGI",
        "fishing": "Fishing",
        "gradinversion": "GradInversion",
        "hf_gradinv": "HFGradInv",
        "idlg": "IDLG",
        "inverting_gradients": "InvertingGradients",
        "loki": "LOKI",
        "mkor": "MKOR",
        "rgap": "RGAP",
        "multiscale": "Multiscale",
        "practical_recipe": "PracticalRecipe",
        "qbi": "QBI",
        "rconv": "RConv",
        "robbing_the_fed": "RobbingTheFed",
        "sapag": "SAPAG",
        "seer": "SEER",
        "sme": "SME",
        "trap_weights": "TrapWeights",
        "vgia": "VGIA",
        "spear": "SPEAR",
        "spear_pp": "SPEARpp",
    }
)

__all__ = [
    "AGIC",
    "ARES",
    "ATTACKS",
    "COPA",
    "CPL",
    "DLG",
    "E2EGI",
    "IDLG",
    "LOKI",
    "MKOR",
    "QBI",
    "RGAP",
    "SAPAG",
    "SEER",
    "SME",
    "SPEAR",
    "VGIA",
    "BatchNormUpdate",
    "BayesOptimal",
    "BiasRatio",
    "CocktailFeatures",
    "CocktailParty",
    "FedAvgEpochs",
    "FedLeak",
    "Fishing",
    "GradInversion",
    "HFGradInv",
    "InvertingGradients",
    "Multiscale",
    "PracticalRecipe",
    "RConv",
    "Registry",
    "RobbingTheFed",
    "SPEARpp",
    "TrapWeights",
]


def __getattr__(name: str) -> object:
    if name not in ATTACKS.names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return ATTACKS[ATTACKS.names[name]]


def __dir__() -> list[str]:
    return sorted([*globals(), *ATTACKS.names])
