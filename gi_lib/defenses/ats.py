"""ATS, automatic transformation search (Gao, Guo, Zhang, Qiu, Wen, Liu, CVPR 2021).

arXiv:2011.12505; later IEEE TPAMI, 2023.

A client trains on transformed images. A policy is three operations of AutoAugment's
kind, each of a fixed strength and of a random sign. The search for policies is not
repeated: those that the authors publish for CIFAR-100 and a ResNet-20 are here, by the
numbers of `policy.py` of their public code.

    3-1-7      shift along x by 150/331 of the width, contrast 1 +- 0.33,
               shift along y by 2/9 of 150/331
    43-18-18   shift along y by 3/9 of 150/331, contrast 1 +- 0.39, twice

Each image draws one of the policies. The code lists a probability with each operation
and applies the operation always, as is done here.

Departs from the public code: the random crop and flip before the policy, which it has
with and without ATS, are left out; the mean grey of the contrast is not rounded to 8
bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gi_lib.defenses.base import Defense

REACH = 150 / 331
"""Of a shift of strength 9, as a share of the side."""

Operation = Callable[[Tensor, int], Tensor]
"""(image [C, H, W], sign) -> the transformed image."""


def shift(image: Tensor, sign: int, *, axis: int, strength: int) -> Tensor:
    """Pixels move by strength/9 of REACH along an axis; what enters is black."""
    from torchvision.transforms import functional as F  # slow to import

    pixels = math.floor(sign * strength / 9 * REACH * image.shape[axis] + 0.5)
    moved = [-pixels, 0] if axis == -1 else [0, -pixels]
    return F.affine(image, 0.0, moved, 1.0, [0.0, 0.0])


def contrast(image: Tensor, sign: int, *, strength: int) -> Tensor:
    """The distance of the pixels to their mean grey times 1 +- strength / 18."""
    from torchvision.transforms import functional as F

    return F.adjust_contrast(image, 1 + sign * strength / 18)


OPERATIONS: dict[int, Operation] = {
    1: partial(contrast, strength=6),
    3: partial(shift, axis=-1, strength=9),
    7: partial(shift, axis=-2, strength=2),
    18: partial(contrast, strength=7),
    43: partial(shift, axis=-2, strength=3),
}
"""Of the fifty of `policy.py` those that the published policies use."""


def _known(policy: object) -> bool:
    """Whether it is a sequence of numbers of OPERATIONS."""
    numbers = policy if isinstance(policy, tuple) else ()
    return bool(numbers) and all(type(n) is int and n in OPERATIONS for n in numbers)


@dataclass(frozen=True)
class ATS(Defense):
    """Trains on images that are transformed by a policy drawn for each.

    Args:
        policies: each a sequence of numbers of OPERATIONS.
    """

    policies: tuple[tuple[int, ...], ...] = ((3, 1, 7), (43, 18, 18))
    revision = 1

    def __post_init__(self):
        given = self.policies if isinstance(self.policies, tuple) else ()
        if not given or not all(map(_known, given)):
            raise ValueError(
                "ATS needs policies, tuples of the operations"
                f" {', '.join(map(str, OPERATIONS))}; got {self.policies!r:.80}"
            )

    def on_batch(
        self, images: Tensor, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return torch.stack([self.transform(image, rng) for image in images]), labels

    def transform(self, image: Tensor, rng: torch.Generator) -> Tensor:
        """One image [C, H, W] in [0, 1] by a policy drawn for it."""
        which = int(torch.randint(len(self.policies), (), generator=rng))
        for number in self.policies[which]:
            sign = 2 * int(torch.randint(2, (), generator=rng)) - 1
            image = OPERATIONS[number](image, sign)
        return image
