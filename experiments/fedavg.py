"""Inverting Gradients on FedAvg: 1, 2, 4 and 8 local steps on one image, and a batch of 8 in one step; labels known.

Image i meets the network drawn from seed i.
"""

from gi_lib import Client, ThreatModel
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case

KNOWN = ThreatModel(knows_labels=True, knows_training_details=True)
LOCAL_STEPS = (1, 2, 4, 8)
NETWORKS = {"lenet": 2000, "resnet20": 1000}  # and the attack's steps
LR = 0.01

CASES = [
    Case(
        InvertingGradients(steps=steps),
        model,
        "cifar10",
        indices=(i,),
        seed=i,
        threat=KNOWN,
        client=Client(steps=T, lr=LR),
        profile="survey",
    )
    for i in range(4)
    for model, steps in NETWORKS.items()
    for T in LOCAL_STEPS
] + [
    Case(InvertingGradients(steps=steps), model, "cifar10", tuple(range(8)), threat=KNOWN, profile="survey")
    for model, steps in NETWORKS.items()
]
