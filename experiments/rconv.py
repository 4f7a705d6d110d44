"""R-CONV (Eltaras et al., 2024): ten CIFAR-10 images through CNN6 with ReLU, and through a wider one; small batches.

The twin of CNN6 has too few equations in its first layer, the wider one enough: rconv.count says so beforehand. The
batches are of 16 x 16 pixels and of different labels, which are read from the update.
"""

from gi_lib.attacks import RConv
from gi_lib.bench import Case

IMAGES = range(10)
DIFFERENT = (0, 1, 3, 4, 5, 7)  # the first images of the test split whose labels all differ

CASES = [
    *(
        Case(RConv(), model, "cifar10", indices=(i,), double=double, profile="survey")
        for model, double in (
            ("cnn6_relu_wide", True),
            ("cnn6_relu", True),
            ("cnn6_relu_wide", False),
        )
        for i in IMAGES
    ),
    *(
        Case(RConv(), "cnn6_relu_wide", "cifar10", indices=DIFFERENT[:size], size=16, double=True, profile="survey")
        for size in (2, 4, 6)
    ),
]
