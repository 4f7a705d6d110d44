"""The bias ratio (Phong et al., 2018) on the dense network: 32 single images of each dataset, in both precisions."""

from gi_lib.attacks import BiasRatio
from gi_lib.bench import Case

DATASETS = (("mnist", None), ("cifar10", None), ("cifar100", None), ("imagenet", 64))
IMAGES = range(32)

CASES = [
    Case(BiasRatio(), "mlp", dataset, indices=(i,), size=size, double=double, profile="survey")
    for double in (False, True)
    for dataset, size in DATASETS
    for i in IMAGES
]
