"""Inverting Gradients on single CIFAR-10 images (Geiping et al., NeurIPS 2020), labels known.

The ConvNet untrained, a CIFAR ResNet-20 untrained, and the public trained one of the same shape, which
normalises its input by ImageNet's statistics as it was trained to. One start each. The authors are quoted second
hand with up to 24,000 steps; STEPS is what a processor without a GPU affords. DLG's LeNet is small enough for
24,000, and is drawn anew for each image, since its draw decides much.
"""

from gi_lib import ThreatModel
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case

IMAGES = range(8)
NETWORKS = (("convnet", None), ("resnet20", None), ("resnet20", "cifar10_resnet20"))
STEPS = {"convnet": 600, "resnet20": 1500}

CASES = [
    Case(
        InvertingGradients(steps=STEPS[model], tv=1e-4, restarts=1),
        model,
        "cifar10",
        indices=(i,),
        weights=weights,
        threat=ThreatModel(knows_labels=True),
        profile="survey",
    )
    for model, weights in NETWORKS
    for i in IMAGES
] + [
    Case(
        InvertingGradients(steps=24_000),
        "lenet",
        "cifar10",
        indices=(i,),
        seed=i,
        threat=ThreatModel(knows_labels=True),
        profile="survey",
    )
    for i in IMAGES
]
