"""DLG (Zhu et al., NeurIPS 2019) on its own ground: single CIFAR-100 images, a new random LeNet for each.

32 images, once with the label known, once with the label sought together with the image. Of eight stacked
restarts the one with the smallest matching loss counts. The public code takes 300 steps; 200 are what two
cores afforded.
"""

from gi_lib import ThreatModel
from gi_lib.attacks import DLG
from gi_lib.bench import Case

IMAGES = range(32)
STEPS = 200
THREATS = (ThreatModel(knows_labels=True), ThreatModel())

CASES = [
    Case(
        DLG(steps=STEPS, restarts=8),
        "lenet",
        "cifar100",
        indices=(i,),
        seed=i,
        threat=threat,
        profile="survey",
        stage=7,
    )
    for threat in THREATS
    for i in IMAGES
]
