"""A batch of eight: Inverting Gradients on eight CIFAR-10 images in one gradient of an untrained network.

The survey's tuned settings at its second rung; labels are counted in the gradient (labels.infer). Two batches, each
with the network drawn from its number.
"""

from pathlib import Path

from gi_lib import results
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case, protocol

TUNING = results.by_key(Path(__file__).parents[1] / "results" / "tuning.jsonl")
BATCH, BATCHES = 8, 2

CASES = [
    Case(
        protocol.at_budget(tuned, protocol.budget(model, 2)),
        model,
        "cifar10",
        indices=tuple(range(BATCH * i, BATCH * (i + 1))),
        seed=i,
        profile="survey",
        stage=5,
    )
    for model in protocol.MODELS
    if (tuned := protocol.tuned(InvertingGradients(), model, "cifar10", TUNING))
    for i in range(BATCHES)
]
