"""What each part of the practical recipe buys, and the recipe beside Inverting Gradients at equal evaluations.

CIFAR-10 images one by one, the label known; image i meets the untrained network drawn from seed i, and every attack
starts from seed i. The whole recipe, then one part changed at a time: the squash of the gradient (the sign, or
nothing), the total variation (of the channels alone), the start (N(0, 1), which is a patch as wide as the image), and
no feature prior. Beside them Inverting Gradients, and the image pyramid of the same framework. On lenet and convnet, at
300 and 2,000 evaluations. "tuned" is what the study `tuning` chose for a network; it has no cases until it has chosen.
"""

from dataclasses import dataclass
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
    cases: list[Case]


TUNING = results.by_key(Path(__file__).parents[1] / "results" / "tuning.jsonl")
SIDE = 32  # of CIFAR-10's images
WHOLE, OTHER = "the whole recipe", "Inverting Gradients"
ATTACKS = {
    WHOLE: PracticalRecipe(),
    "the sign in place of the soft sign": PracticalRecipe(squash=hard_sign),
    "no sign": PracticalRecipe(squash=None),
    "total variation of the channels alone": PracticalRecipe(prior=isotropic_total_variation),
    "start from N(0, 1)": PracticalRecipe(patch=SIDE),
    "no feature prior": PracticalRecipe(feature=0.0),
    OTHER: InvertingGradients(),
    "multiscale": Multiscale(),
    "multiscale, enlarged without a focus": Multiscale(resize=enlarge),
}
WANTED = (  # network, evaluations, stage of the queue
    ("lenet", 300, 1),
    ("lenet", 2000, 2),
    ("convnet", 300, 2),
    ("convnet", 2000, 6),
)

PLAN = []
for model, evaluations, stage in WANTED:
    tuned = {f"{name}, tuned": protocol.tuned(ATTACKS[name], model, "cifar10", TUNING) for name in (WHOLE, OTHER)}
    for name, attack in (ATTACKS | {name: attack for name, attack in tuned.items() if attack}).items():
        own = {"threat": ThreatModel(knows_labels=True), "profile": "survey", "stage": stage}
        spent = protocol.at_budget(attack, evaluations)
        cases = [Case(spent, model, "cifar10", (i,), seed=i, **own) for i in range(8)]
        PLAN.append(Row(name, model, evaluations, cases))
CASES = [case for row in PLAN for case in row.cases]
