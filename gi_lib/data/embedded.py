"""The two datasets that are always there: digits, and photos."""

from pathlib import Path

import numpy as np

from gi_lib.data.images import resize
from gi_lib.data.sources import Found, read_pack
from gi_lib.data.specs import DATASETS, PHOTOGRAPHS

DIGITS_TRAIN = 1200  # the first ones, in the order of the file

# The part of each photograph (top, left, height, width) that test crops are cut from, and train crops.
# The two do not overlap. The subject is in the test part, and its crops are at least 225 px wide, so that no
# size enlarges them; a train crop may be enlarged.
PARTS = {
    "astronaut": {"test": (0, 60, 300, 330), "train": (300, 0, 212, 512)},
    "chelsea": {"test": (0, 110, 300, 341), "train": (0, 0, 300, 110)},
    "coffee": {"test": (0, 160, 400, 440), "train": (0, 0, 400, 160)},
    "rocket": {"test": (0, 107, 427, 427), "train": (0, 0, 427, 107)},
    "hubble_deep_field": {"test": (0, 0, 436, 1000), "train": (436, 0, 436, 1000)},
    "retina": {"test": (0, 0, 1411, 1000), "train": (0, 1000, 1411, 411)},
    "immunohistochemistry": {"test": (0, 0, 300, 512), "train": (300, 0, 212, 512)},
}
# The square crops of a part: side in units of the part's shorter side, how far down and right (0 to 1).
CROPS = ((1.0, 0.5, 0.5), (0.75, 0.0, 0.5), (0.75, 1.0, 1.0), (0.75, 0.5, 0.0))


def digits(split: str) -> Found:
    whole = read_pack(Path(__file__).parents[1] / "assets" / "digits.npz", DATASETS["digits"])
    part = slice(DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    return Found(np.asarray(whole.images)[part], whole.labels[part], "embedded")


def photos(split: str, size: int) -> Found:
    """Image i is a crop of photograph i mod 7, so that any seven in a row differ in their labels."""
    from skimage import data  # slow to import, and only needed here

    photographs = [getattr(data, name)() for name in PHOTOGRAPHS]
    crops = []
    for scale, down, right in CROPS:
        for name, photograph in zip(PHOTOGRAPHS, photographs, strict=True):
            top, left, height, width = PARTS[name][split]
            side = round(scale * min(height, width))
            y, x = top + round(down * (height - side)), left + round(right * (width - side))
            crops.append(resize(photograph[y : y + side, x : x + side], size))
    labels = np.tile(np.arange(len(PHOTOGRAPHS), dtype=np.int64), len(CROPS))
    return Found(np.stack(crops), labels, "embedded")
