"""The weight of the prior in Inverting Gradients: the survey's CIFAR-10 images and steps, four weights, four networks.

The survey itself takes 1e-4, the default of the authors' command line.
"""

import runpy
from pathlib import Path

from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case

STEPS = runpy.run_path(str(Path(__file__).with_name("survey.py")))["STEPS"]
NETWORKS = ("lenet", "cnn6", "convnet", "resnet18")
WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)

CASES = [
    Case(InvertingGradients(steps=STEPS[model][0], tv=tv), model, "cifar10", indices=(i,), seed=i, profile="survey")
    for i in range(4)
    for model in NETWORKS
    for tv in WEIGHTS
]
