"""The row for L-BFGS in the table of Inverting Gradients (Geiping et al., NeurIPS 2020): the untrained LeNet.

The squared distance by L-BFGS, without a prior and without a box: DLG with the label known. The images, networks and
starts are those of the study `inverting_gradients`, to be read beside them. We know neither the paper's number of
iterations nor of starts. DLG's iterations are taken, 300 steps of up to 20; a start of L-BFGS succeeds or flies off, so
that one start stands beside the best of eight, by the loss.
"""

from gi_lib import ThreatModel
from gi_lib.attacks import DLG
from gi_lib.bench import Case

CASES = [
    Case(
        DLG(restarts=starts),
        "lenet_normalised",
        "cifar10",
        indices=(i,),
        seed=i,
        threat=ThreatModel(knows_labels=True),
        profile="survey",
        stage=4,
    )
    for starts in (1, 8)
    for i in range(16)
]
