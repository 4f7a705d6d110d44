"""Writes book/_static/readme.png, the picture of README.md, from the studies' records and pictures.

    python book/readme.py

Above the private images, below what the attack made of their gradient; the first eight of each study.
"""

from pathlib import Path

import torch
from PIL import Image

from gi_lib import results

ROOT = Path(__file__).resolve().parent.parent
SCALE = 3  # pixels shown for one pixel


def sheet(study: str, **values: str) -> torch.Tensor:
    """Two rows of eight images [3, H, W]: private, reconstructed."""
    path = ROOT / "results" / f"{study}.jsonl"
    frame = results.read(path)
    for column, value in values.items():
        frame = frame[frame[column] == value]
    frame = frame.sort_values("indices").head(8)
    pairs = [results.read_picture(results.picture_path(path, key), 1) for key in frame["key"]]
    columns = [torch.nn.functional.pad(torch.cat([x[0], y[0]], 1), (0, 1, 0, 1), value=1.0) for x, y in pairs]
    return torch.cat(columns, 2)


pictures = torch.cat([sheet("dlg", threat_letter="B"), sheet("inverting_gradients", model="convnet")], 1)
pixels = (pictures * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
picture = Image.fromarray(pixels)
picture = picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)
picture.save(ROOT / "book/_static/readme.png", optimize=True)
