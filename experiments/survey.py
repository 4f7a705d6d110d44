"""The survey: every technique on eight untrained models and four datasets, four single images a cell.

Image i meets the networks drawn from seed i, and the attack starts from seed i: the spread over a cell's images
is a spread over draws too. ImageNet's photographs are taken at 64 x 64 pixels. Labels are sought, not known. The
steps are what two cores without a GPU afford, and far fewer than the papers' on the large networks; each row says
how many it took. Image by image, so that a study that is stopped has some images of every cell rather than all
images of some.
"""

from gi_lib.attacks import DLG, IDLG, BiasRatio, InvertingGradients
from gi_lib.bench import Case

DATASETS = (("mnist", None), ("cifar10", None), ("cifar100", None), ("imagenet", 64))
IMAGES = range(4)
STEPS = {  # of Inverting Gradients; and of DLG and iDLG, each of which is 20 iterations
    "mlp": (600, 20),
    "lenet": (2000, 200),
    "cnn6": (2000, 60),
    "convnet": (120, 6),
    "vgg11": (120, 6),
    "resnet18": (120, 6),
    "resnet50": (80, 4),
    "vit": (240, 10),
}

CASES = [
    Case(attack, model, dataset, indices=(i,), seed=i, size=size, profile="survey")
    for i in IMAGES
    for model, (steps, outer) in STEPS.items()
    for dataset, size in DATASETS
    for attack in (BiasRatio(), InvertingGradients(steps=steps), DLG(steps=outer), IDLG(steps=outer))
]
