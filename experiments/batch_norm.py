"""Where the batch-norm statistics come from, FedLeak's two parts, and batch norm as a factor, on CIFAR-10.

TARGETS: the batch-norm update on `convnet` in train mode, batches of eight, labels known: without statistics, with the
running ones that the client started from, with those of 256 images of the train split, with those that the returned
buffers tell, and with the batch's own. Four batches at 16 pixels, and two at their own size behind the survey.

FEDLEAK: its 2 x 2 on `resnet18` in eval mode, batches of four, at equal gradient evaluations: all of the gradient or
the largest half of its entries, the plain step or the regularised one, which costs two. Without both it is Inverting
Gradients, with the step and the prior that the study `tuning` chose for it on this network.

FACTOR: what batch norm is to one and the same search, on `resnet18`, single images and batches of four: eval mode;
train mode with the statistics withheld, with the running ones, with those that the buffers tell, with the batch's own;
and group norm in its place.

Each batch meets an untrained network of its own, and every attack on it starts from the same noise.
"""

from dataclasses import dataclass

from gi_lib.attacks import BatchNormUpdate, FedLeak
from gi_lib.attacks.bn_update import Exact, Inferred, Proxy, Running, Target
from gi_lib.bench import Case, protocol
from gi_lib.federated import granted
from gi_lib.matching import cosine


@dataclass(frozen=True)
class Row:
    """One line of a table, with its cases, one a batch."""

    part: str
    name: str
    batch: int
    side: int
    cases: list[Case]


SETTINGS = {"distance": cosine, "gradient": 1.0, "tv": 0.05, "l2": 0.0, "bn": 0.03, "lr": 0.3}
"""The angle, as other attacks here have it, and the weight of total variation that Huang et al. give; the step and the
weight of the statistics were chosen on four photographs and a network of three convolutions."""
SOURCES: dict[str, Target | None] = {
    "withheld": None,
    "running": Running(),
    "of other images": Proxy(),
    "from the buffers": Inferred(),
    "the batch's own": Exact(),
}


def cases(attack, model: str, batch: int, batches: int, **more) -> list[Case]:
    """Batch after batch of the test split."""
    more |= {"threat": granted(attack, labels=True), "profile": "survey"}
    if "auxiliary" in attack.needs.facts:
        more["auxiliary"] = "cifar10"
    return [
        Case(attack, model, "cifar10", tuple(range(batch * i, batch * (i + 1))), seed=i, **more) for i in range(batches)
    ]


TARGETS = [
    Row(
        "targets",
        name,
        8,
        side,
        cases(
            BatchNormUpdate(target, steps=steps, **SETTINGS),
            "convnet",
            8,
            batches,
            train=True,
            size=None if side == 32 else side,
            stage=stage,
        ),
    )
    for side, steps, batches, stage in ((16, 300, 4, 2), (32, 300, 2, 8))
    for name, target in SOURCES.items()
]

EVALUATIONS = 300
FEDLEAK = [
    Row(
        "fedleak",
        f"{'half' if fraction < 1 else 'all'} of the gradient, {'regularised' if mix else 'plain'}",
        4,
        32,
        cases(
            protocol.at_budget(FedLeak(lr=0.3, tv=0.01, fraction=fraction, mix=mix), EVALUATIONS),
            "resnet18",
            4,
            4,
            stage=3,
        ),
    )
    for fraction in (1.0, 0.5)
    for mix in (0.0, 0.5)
]

MODES: dict[str, tuple[str, bool, Target | None]] = {
    "eval mode": ("resnet18", False, None),
    "train mode, statistics withheld": ("resnet18", True, None),
    "train mode, running statistics": ("resnet18", True, Running()),
    "train mode, returned buffers": ("resnet18", True, Inferred()),
    "train mode, the batch's own": ("resnet18", True, Exact()),
    "group norm": ("resnet18_group", False, None),
}
FACTOR = [
    Row(
        "factor",
        name,
        batch,
        32,
        cases(
            BatchNormUpdate(target, steps=EVALUATIONS, **SETTINGS),
            model,
            batch,
            4,
            train=train,
            stage=stage,
        ),
    )
    for batch, stage in ((1, 1), (4, 3))
    for name, (model, train, target) in MODES.items()
]

PLAN = [*TARGETS, *FEDLEAK, *FACTOR]
CASES = [case for row in PLAN for case in row.cases]
