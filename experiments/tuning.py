"""The weight of the prior and the step of each technique, tuned on images that are not attacked.

Four weights and two steps on four images of the train splits of MNIST and CIFAR-10, of later techniques of CIFAR-10
alone, with networks that are drawn for this alone, at the survey's first rung. After the first image the better half of
the settings goes on, and a half of that after the second. What the records choose is the survey's setting "tuned".
"""

from pathlib import Path

from gi_lib import results
from gi_lib.attacks import InvertingGradients, PracticalRecipe
from gi_lib.bench import protocol

RECORDS = results.by_key(Path(__file__).parents[1] / "results" / "tuning.jsonl")
CASES = [case for attack in (InvertingGradients(),) for case in protocol.tuning(attack, RECORDS)]
CASES += [case for attack in (PracticalRecipe(),) for case in protocol.tuning(attack, RECORDS, datasets=("cifar10",))]
