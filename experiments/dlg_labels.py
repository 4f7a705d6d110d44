"""How often DLG's joint label is right: one start each on 100 random LeNets for three datasets, faces at 32 pixels.

iDLG (Zhao et al., 2020) reports 89.9, 83.3 and 79.1 % on MNIST, CIFAR-100 and LFW over 1,000 starts. The faces here
are AT&T's, in place of LFW's. A hundred steps of twenty iterations decide the label.
"""

from gi_lib.attacks import DLG
from gi_lib.bench import Case

DATASETS = (("mnist", None), ("cifar100", None), ("faces", 32))

CASES = [
    Case(DLG(steps=100), "lenet", dataset, indices=(i,), size=size, seed=i, profile="survey", stage=3)
    for i in range(100)
    for dataset, size in DATASETS
]
