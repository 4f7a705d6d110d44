"""The picture of a case, `results/<study>/<key>.png`: lossless, the true images above the reconstructed ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gi_lib.types import Images


def picture_path(path: Path, key: str) -> Path:
    """Where the picture of the case `key` of the file of records `path` is."""
    return Path(path).with_suffix("") / f"{key}.png"


def bitmap(rows: Sequence[Images]) -> Image.Image:
    """Rows of images [B, C, H, W] in [0, 1], one below the other, in 8 bits, grey or colour; NaN is black."""
    lines = [torch.cat(list(images.detach().cpu().nan_to_num(0)), dim=2) for images in rows]
    pixels = (torch.cat(lines, dim=1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def write_picture(path: Path, truth: Images, reconstruction: Images, *, zoom: int = 1) -> None:
    """Save true images above reconstructed ones, both [B, C, H, W] in [0, 1] in the same order, as 8-bit PNG.

    Every pixel becomes `zoom` x `zoom`.

    Raises:
        OSError: the disk is full, or the file can't be written; then nothing is left of it.
    """
    image = bitmap([truth, reconstruction])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        size = (zoom * image.width, zoom * image.height)
        image.resize(size, Image.Resampling.NEAREST).save(path, "PNG", optimize=True)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def read_picture(path: Path, batch_size: int) -> tuple[Images, Images]:
    """The true and the reconstructed images, each [B, C, H, W] in [0, 1], of a picture without zoom.

    Raises:
        FileNotFoundError: there is no such picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}; it is stored with the records, and a failed case has none")
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1) / 255
    upper, lower = (torch.stack(row.chunk(batch_size, dim=2)) for row in pixels.chunk(2, dim=1))
    return upper, lower
