"""Resizing, and image files that stand in for an array."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gi_lib.data.specs import DataError


@dataclass(frozen=True)
class ImageFiles:
    """Files that are decoded when they are asked for; stands in for a uint8 array [N, size, size, 3]."""

    paths: tuple[Path, ...]
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.paths), self.size, self.size, 3)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """The images at `indices`, uint8 [B, size, size, 3]; DataError where a file is damaged."""
        return np.stack([_decode(self.paths[i], self.size) for i in indices])


LONGEST = 32
"""Sides may differ by this factor: a strip of one pixel by 100,000 would be blown up to gigabytes."""


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] -> [size, size, C]: the shorter side becomes `size`, then the centre square is cut out.

    Pillow's bilinear filter widens as it shrinks an image, so nothing aliases (as in torchvision's Resize).
    """
    height, width, channels = image.shape
    scale = size / min(height, width)
    shape = round(height * scale), round(width * scale)
    pixels = image[..., 0] if channels == 1 else image
    resized = np.asarray(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BILINEAR))
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return resized.reshape(*shape, channels)[top : top + size, left : left + size]


def _decode(path: Path, size: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if max(image.size) > LONGEST * min(image.size):
                    raise DataError(
                        f"{path} is {image.width} x {image.height} pixels, too long a strip for a square of {size};"
                        " leave it out"
                    )
                return resize(np.asarray(image.convert("RGB")), size)
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's UnidentifiedImageError is an OSError; some damaged PNGs are a SyntaxError to it
        raise DataError(f"{path} can't be decoded ({error}); copy it afresh") from error
