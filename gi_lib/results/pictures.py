"""The picture of a case, `results/<study>/<key>.png`: lossless, the true images above the reconstructed ones.

Of a batch of more than MANY images it shows PICTURED, first those that came back, and says within the file which.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from gi_lib.types import Images

MANY, PICTURED = 32, 8


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

    Every pixel becomes `zoom` x `zoom`. Of more than MANY images PICTURED are saved, first those that are not black
    below, as an image is that was missed.

    Raises:
        OSError: the disk is full, or the file can't be written; then nothing is left of it.
    """
    said = PngImagePlugin.PngInfo()
    if len(truth) > MANY:
        missed = (reconstruction == 0).flatten(1).all(1).int()
        places = missed.argsort(stable=True)[:PICTURED].sort().values
        truth, reconstruction = truth[places], reconstruction[places]
        said.add_text("images", " ".join(map(str, places.tolist())))
    image = bitmap([truth, reconstruction])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        size = (zoom * image.width, zoom * image.height)
        image.resize(size, Image.Resampling.NEAREST).save(path, "PNG", optimize=True, pnginfo=said)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def pictured(path: Path, batch_size: int) -> list[int]:
    """The places in their batch of the images that a picture shows."""
    with Image.open(path) as image:
        return _places(image, batch_size)


def _places(image: Image.Image, batch_size: int) -> list[int]:
    places = [int(place) for place in image.info.get("images", "").split()] or [batch_size]
    return places if len(places) > 1 else list(range(places[0]))  # a number alone: so many, from the first on


def read_picture(path: Path, batch_size: int) -> tuple[Images, Images]:
    """The true and the reconstructed images, each [N, C, H, W] in [0, 1], of a picture without zoom.

    N is the batch size, or as many as `pictured` names of a large batch, in its order.

    Raises:
        FileNotFoundError: there is no such picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}; it is stored with the records, and a failed case has none")
    with Image.open(path) as image:
        shown = len(_places(image, batch_size))
        pixels = torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1) / 255
    upper, lower = (torch.stack(row.chunk(shown, dim=2)) for row in pixels.chunk(2, dim=1))
    return upper, lower
