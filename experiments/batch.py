"""A batch of eight: eight CIFAR-10 images in one gradient of an untrained network.

Inverting Gradients with the survey's tuned settings, and with their own FedLeak, the practical recipe and the
techniques that combine several seeds, as the survey has them; each at its second rung. Labels are counted in the
gradient (labels.infer). Two batches, each with the network drawn from its number.
"""

import runpy
from pathlib import Path

from gi_lib import results
from gi_lib.attacks import FedLeak, InvertingGradients, PracticalRecipe
from gi_lib.bench import Case, protocol

HERE = Path(__file__).parent
TUNING = results.by_key(HERE.parent / "results" / "tuning.jsonl")
OTHERS = (*runpy.run_path(str(HERE / "survey.py"))["STATISTICS"].values(), FedLeak(), PracticalRecipe())
BATCH, BATCHES = 8, 2

CASES = [
    Case(
        protocol.at_budget(attack, protocol.budget(model, 2)),
        model,
        "cifar10",
        indices=tuple(range(BATCH * i, BATCH * (i + 1))),
        seed=i,
        profile="survey",
        stage=stage,
    )
    for model in protocol.MODELS
    for attack, stage in (
        (protocol.tuned(InvertingGradients(), model, "cifar10", TUNING), 5),
        *((attack, 6 if model in protocol.SMALL else 8) for attack in OTHERS),
    )
    if attack
    for i in range(BATCHES)
]
