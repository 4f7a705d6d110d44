"""Inverting Gradients on the networks of its own table (Geiping et al., NeurIPS 2020): CIFAR-10 images, labels known.

The LeNet with its input normalised, at alpha 0.01 and 4,800 steps, which a public rerun of the authors' code states for
the table; the same at 24,000 steps, which `reconstruct_image.py` of the public code has. The ResNet20-4, untrained, at
what a processor without a GPU affords, in two rungs. A CIFAR ResNet-20, a quarter as wide, untrained and the public
trained one, which normalises its input by ImageNet's statistics as it was trained to. Image i meets the untrained
network drawn from seed i.
"""

from gi_lib import ThreatModel
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case

TARGETS = (  # model, weights, steps, images, stage of the queue
    ("lenet_normalised", None, 1600, 16, 4),
    ("lenet_normalised", None, 4800, 16, 4),
    ("lenet_normalised", None, 24_000, 8, 7),
    ("resnet20", None, 500, 8, 6),
    ("resnet20", "cifar10_resnet20", 500, 8, 6),
    ("resnet20", None, 1500, 16, 6),
    ("resnet20", "cifar10_resnet20", 1500, 16, 6),
    ("resnet20_4", None, 300, 8, 4),
    ("resnet20_4", None, 1000, 8, 7),
)

CASES = [
    Case(
        InvertingGradients(steps=steps, tv=0.01),
        model,
        "cifar10",
        indices=(i,),
        seed=i,
        weights=weights,
        threat=ThreatModel(knows_labels=True),
        profile="survey",
        stage=stage,
    )
    for model, weights, steps, images, stage in TARGETS
    for i in range(images)
]
