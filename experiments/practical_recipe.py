"""What each part of the practical recipe buys, and the recipe beside Inverting Gradients at equal evaluations.

CIFAR-10 images one by one, the label known; image i meets the untrained network drawn from seed i, and every attack
starts from seed i. The whole recipe, then one part changed at a time: the squash of the gradient (the sign, or
nothing), the total variation (of the channels alone), the start (N(0, 1), which is a patch as wide as the image), and
no feature prior. On lenet at two rungs of the survey, and on convnet at 2,000 evaluations. "tuned" is what the study
`tuning` chose for a network; it has no cases until it has chosen.
"""

from pathlib import Path

from gi_lib import ThreatModel, results
from gi_lib.attacks import InvertingGradients, PracticalRecipe
from gi_lib.bench import Case, protocol
from gi_lib.optimise import hard_sign
from gi_lib.priors import isotropic_total_variation

TUNING = results.by_key(Path(__file__).parents[1] / "results" / "tuning.jsonl")
SIDE = 32  # of CIFAR-10's images
PARTS = {
    "whole recipe": PracticalRecipe(),
    "the sign of the gradient": PracticalRecipe(squash=hard_sign),
    "the gradient itself": PracticalRecipe(squash=None),
    "total variation of the channels alone": PracticalRecipe(prior=isotropic_total_variation),
    "start from N(0, 1)": PracticalRecipe(patch=SIDE),
    "no feature prior": PracticalRecipe(feature=0.0),
}
PLAN = (("lenet", 700, 1), ("lenet", 2000, 2), ("convnet", 2000, 6))  # network, evaluations, stage of the queue


def rows(model: str, evaluations: int) -> dict[str, PracticalRecipe | InvertingGradients]:
    """What is compared on a network: a name of each row, and its attack at this budget."""
    named = PARTS | {"Inverting Gradients": InvertingGradients()}
    for name in ("whole recipe", "Inverting Gradients"):
        tuned = protocol.tuned(named[name], model, "cifar10", TUNING)
        if tuned is not None:
            named[f"{name}, tuned"] = tuned
    return {name: protocol.at_budget(attack, evaluations) for name, attack in named.items()}


CASES = [
    Case(
        attack,
        model,
        "cifar10",
        indices=(i,),
        seed=i,
        threat=ThreatModel(knows_labels=True),
        profile="survey",
        stage=stage,
    )
    for model, evaluations, stage in PLAN
    for attack in rows(model, evaluations).values()
    for i in range(8)
]
