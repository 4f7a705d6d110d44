"""R-GAP (Zhu, Blaschko, ICLR 2021) on the two of the eight models that it can go back through: ten single images of
CIFAR-10, gradients in both precisions. Image i meets the network drawn from seed i.
"""

from gi_lib.attacks import RGAP
from gi_lib.bench import Case

MODELS = ("cnn6", "lenet")
IMAGES = range(10)

CASES = [
    Case(RGAP(), model, "cifar10", indices=(i,), seed=i, double=double, profile="survey")
    for double in (True, False)
    for model in MODELS
    for i in IMAGES
]
