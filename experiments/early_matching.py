"""CPL and SAPAG beside DLG and iDLG on the LeNet: single CIFAR-10 images, each with a network of its own.

How soon a start leads to the image: DLG's LeNet with weights U(-0.5, 0.5), iDLG from N(0, 1), and CPL from patterns of
four widths, the widest of which is one tile, plain U(0, 1); with and without its label term; DLG, which seeks the label
too. A step of L-BFGS is up to 20 gradient evaluations, and every step is scored.

Where DLG fails: the same LeNet with PyTorch's own weights. SAPAG with its kernel's width falling and fixed, and as a
control the squared distance and the cosine by signed Adam, without a prior.

Twenty images at 16 pixels, on which as many gradient evaluations as here suffice; and at their own size, behind the
survey in the queue.
"""

from gi_lib.attacks import CPL, DLG, IDLG, SAPAG, InvertingGradients
from gi_lib.bench import Case
from gi_lib.matching import squared_l2

IMAGES = range(20)
SCALES = (  # side of the images, steps of L-BFGS, of Adam, stages of the queue: the main attacks, the others
    (16, 15, 300, (1, 2)),
    (32, 300, 3000, (8, 8)),
)


def attacks(side: int, lbfgs: int, adam: int) -> tuple[list[tuple], list[tuple]]:
    """Model and attack, the main ones and the others."""
    every = {"steps": lbfgs, "frames": min(6 * lbfgs, 200)}
    control = {"steps": adam, "tv": 0.0}
    main = [
        ("lenet", IDLG(**every)),
        ("lenet", CPL(pattern=side // 2, **every)),
        ("lenet", CPL(pattern=side, **every)),
        ("lenet_default", IDLG(**every)),
        ("lenet_default", SAPAG(steps=adam)),
    ]
    others = [
        ("lenet", CPL(pattern=side // 4, **every)),
        ("lenet", CPL(pattern=side // 8, **every)),
        ("lenet", CPL(pattern=side // 2, label=1.0, **every)),
        ("lenet", DLG(**every)),
        ("lenet_default", SAPAG(steps=adam, wide=1.0)),
        ("lenet_default", InvertingGradients(distance=squared_l2, **control)),
        ("lenet_default", InvertingGradients(**control)),
    ]
    return main, others


CASES = [
    Case(
        attack,
        model,
        "cifar10",
        indices=(i,),
        seed=i,
        size=None if side == 32 else side,
        profile="survey",
        stage=stage,
    )
    for side, lbfgs, adam, stages in SCALES
    for stage, tried in zip(stages, attacks(side, lbfgs, adam), strict=True)
    for model, attack in tried
    for i in IMAGES
]
