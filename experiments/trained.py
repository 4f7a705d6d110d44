"""Inverting Gradients on public trained networks and on untrained ones of the same shape, labels known, one start.

LeNet-5 on MNIST at 32 pixels, ResNet-56 on CIFAR-10, SqueezeNet 1.1 on ImageNet at 224 pixels. ResNet-20 is in the
study `inverting_gradients`. Image i meets the untrained network drawn from seed i. The steps are what a processor
without a GPU affords.
"""

from gi_lib import ThreatModel
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case

TARGETS = (  # model, its weights, dataset, size, steps
    ("lenet5", "mnist_lenet5", "mnist", 32, 2000),
    ("resnet56", "cifar10_resnet56", "cifar10", None, 600),
    ("squeezenet", "imagenet_squeezenet", "imagenet", None, 200),
)

CASES = [
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
    )
    for i in range(4)
    for model, weights, dataset, size, steps in TARGETS
    for trained in (None, weights)
]
