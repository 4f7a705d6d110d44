"""What each part of the practical recipe buys, and the recipe beside Inverting Gradients at equal evaluations.

CIFAR-10 images one by one, the label known; image i meets the untrained network drawn from seed i, and every attack
starts from seed i. The whole recipe, then one part changed at a time: the squash of the gradient (the sign, or
nothing), the total variation (of the channels alone), the start (N(0, 1), which is a patch as wide as the image), and
no feature prior. Beside them Inverting Gradients. "default" are the settings of the framework, with its image pyramid
beside them; "tuned" is the step and the weight of total variation that the study `tuning` chose for a network, one pair
for the recipe with all its changes and one for Inverting Gradients. What is not tuned yet has no cases.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from gi_lib import ThreatModel, results
from gi_lib.attacks import InvertingGradients, Multiscale, PracticalRecipe
from gi_lib.attacks.multiscale import enlarge
from gi_lib.bench import Case, protocol
from gi_lib.optimise import hard_sign
from gi_lib.priors import isotropic_total_variation


@dataclass(frozen=True)
class Row:
    """What is compared: an attack on one network, at one number of evaluations."""

    name: str
    model: str
    evaluations: int
    setting: str
    cases: list[Case]


TUNING = results.by_key(Path(__file__).parents[1] / "results" / "tuning.jsonl")
SIDE = 32  # of CIFAR-10's images
WHOLE, OTHER = "the whole recipe", "Inverting Gradients"
PARTS = {
    WHOLE: PracticalRecipe(),
    "the sign in place of the soft sign": PracticalRecipe(squash=hard_sign),
    "no sign": PracticalRecipe(squash=None),
    "total variation of the channels alone": PracticalRecipe(prior=isotropic_total_variation),
    "start from N(0, 1)": PracticalRecipe(patch=SIDE),
    "no feature prior": PracticalRecipe(feature=0.0),
}
PYRAMID = {
    "multiscale": Multiscale(),
    "multiscale, enlarged without a focus": Multiscale(resize=enlarge),
}
WANTED = (  # network, evaluations, setting, stage of the queue
    ("lenet", 300, "default", 1),
    ("lenet", 2000, "default", 1),
    ("lenet", 300, "tuned", 1),
    ("lenet", 2000, "tuned", 1),
    ("convnet", 100, "tuned", 2),
    ("convnet", 300, "tuned", 6),
    ("convnet", 300, "default", 7),
    ("convnet", 2000, "tuned", 9),
    ("convnet", 2000, "default", 9),
)


def attacks(model: str, setting: str) -> dict[str, PracticalRecipe | InvertingGradients | Multiscale]:
    """By name; none where nothing is tuned yet."""
    if setting == "default":
        return PARTS | {OTHER: InvertingGradients()} | PYRAMID
    recipe, other = (
        protocol.tuned(attack, model, "cifar10", TUNING) for attack in (PracticalRecipe(), InvertingGradients())
    )
    if recipe is None or other is None:
        return {}
    return {name: replace(part, lr=recipe.lr, tv=recipe.tv) for name, part in PARTS.items()} | {OTHER: other}


PLAN = []
for model, evaluations, setting, stage in WANTED:
    for name, attack in attacks(model, setting).items():
        own = {"threat": ThreatModel(knows_labels=True), "profile": "survey", "stage": stage}
        spent = protocol.at_budget(attack, evaluations)
        cases = [Case(spent, model, "cifar10", (i,), seed=i, **own) for i in range(8)]
        PLAN.append(Row(name, model, evaluations, setting, cases))
CASES = [case for row in PLAN for case in row.cases]
