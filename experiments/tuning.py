"""The weight of the prior and the step of each technique, tuned on images that are not attacked.

Four weights and two steps on four images of the train splits of MNIST and CIFAR-10, with networks that are drawn for
this alone, at the survey's first rung. After the first image the better half of the settings goes on, and a half of
that after the second. What the records choose is the survey's setting "tuned". Techniques that the survey runs on
CIFAR-10 alone are tuned for it alone, after the others.
"""

import dataclasses
from pathlib import Path

from gi_lib import results
from gi_lib.attacks import SAPAG, InvertingGradients, PracticalRecipe
from gi_lib.bench import protocol

RECORDS = results.by_key(Path(__file__).parents[1] / "results" / "tuning.jsonl")
CASES = [case for attack in (InvertingGradients(),) for case in protocol.tuning(attack, RECORDS)]
CASES += [
    dataclasses.replace(case, stage=6)
    for attack in (PracticalRecipe(), SAPAG())
    for case in protocol.tuning(attack, RECORDS, datasets=("cifar10",))
]
