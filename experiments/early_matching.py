"""CPL and SAPAG beside DLG and iDLG on the LeNet: single CIFAR-10 images, each with a network of its own.

How soon a start leads to the image: DLG's LeNet with weights U(-0.5, 0.5), iDLG from N(0, 1), and CPL from patterns of
four widths, the widest of which is one tile, plain U(0, 1); with and without its label term; DLG, which seeks the label
too. A step of L-BFGS is up to 20 gradient evaluations, and every step is scored.

Where DLG fails: the same LeNet with PyTorch's own start. SAPAG with its kernel's width falling and fixed, and as a
control the squared distance and the cosine by signed Adam, without a prior.

Twenty images at 16 pixels; and at their own size, queued behind the survey.
"""

from gi_lib.attacks import CPL, DLG, IDLG, SAPAG, InvertingGradients
from gi_lib.bench import Case
from gi_lib.matching import squared_l2

IMAGES = range(20)
SCALES = (  # side, steps of L-BFGS, of Adam, stage of the queue
    (16, 30, 600, 1),
    (None, 300, 3000, 8),
)


def attacks(side: int, lbfgs: int, adam: int) -> list[tuple[str, list]]:
    """Each model with its attacks."""
    every = {"steps": lbfgs, "frames": min(4 * lbfgs, 200)}
    widths = [side // 8, side // 4, side // 2, side]
    return [
        (
            "lenet",
            [
                IDLG(**every),
                *(CPL(pattern=width, **every) for width in widths),
                CPL(pattern=side // 2, label=1.0, **every),
                DLG(**every),
            ],
        ),
        (
            "lenet_default",
            [
                IDLG(steps=lbfgs),
                CPL(pattern=side // 2, steps=lbfgs),
                SAPAG(steps=adam),
                SAPAG(steps=adam, wide=1.0),
                InvertingGradients(steps=adam, tv=0.0, distance=squared_l2),
                InvertingGradients(steps=adam, tv=0.0),
            ],
        ),
    ]


CASES = [
    Case(attack, model, "cifar10", indices=(i,), size=size, seed=i, profile="survey", stage=stage)
    for size, lbfgs, adam, stage in SCALES
    for i in IMAGES
    for model, tried in attacks(size or 32, lbfgs, adam)
    for attack in tried
]
