"""Trained networks beside untrained ones: Inverting Gradients on single images.

The survey's models as `experiments/train.py` trains them on CIFAR-10, at the survey's second rung with its tuned
settings; image i meets the one trained network, and in the study `survey` the untrained one of seed i. The techniques
that combine several seeds as the survey has them. Networks whose checkpoint the project does not keep are made by
`python experiments/train.py MODEL cifar10`.

And public networks beside untrained ones of the same shape, labels known: LeNet-5 on MNIST at 32 pixels, ResNet-56 on
CIFAR-10, SqueezeNet 1.1 on ImageNet at 224 pixels, at the weight of the prior of the authors' command line.
"""

import dataclasses
import runpy
from pathlib import Path

from gi_lib import ThreatModel, results
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case, protocol
from gi_lib.training import RECIPES

HERE = Path(__file__).parent
TUNING = results.by_key(HERE.parent / "results" / "tuning.jsonl")
STATISTICS = runpy.run_path(str(HERE / "survey.py"))["STATISTICS"]
TARGETS = (  # model, its weights, dataset, size, steps
    ("lenet5", "mnist_lenet5", "mnist", 32, 2000),
    ("resnet56", "cifar10_resnet56", "cifar10", None, 600),
    ("squeezenet", "imagenet_squeezenet", "imagenet", None, 200),
)

OWN = []
for (model, dataset), recipe in RECIPES.items():
    if dataset != "cifar10" or recipe.accuracy is None:  # nobody has trained it yet
        continue
    tuned = protocol.tuned(InvertingGradients(), model, dataset, TUNING)
    for attack, stage in ((tuned, 2), *((attack, 7) for attack in STATISTICS.values())):
        if attack:
            cases = protocol.cell(attack, model, dataset, 2, stage)
            OWN += [dataclasses.replace(case, weights="trained") for case in cases]

CASES = OWN + [
    Case(
        InvertingGradients(steps=steps),
        model,
        dataset,
        indices=(i,),
        seed=i,
        weights=trained,
        size=size,
        threat=ThreatModel(knows_labels=True),
        profile="survey",
        stage=8,
    )
    for i in range(4)
    for model, weights, dataset, size, steps in TARGETS
    for trained in (None, weights)
]
