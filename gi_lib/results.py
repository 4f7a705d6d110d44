"""Records: one flat JSON row for each case that ran, in `results/<study>.jsonl`, with its picture beside it.

A file is only ever appended to, one line in one write. Where a key occurs more than once, its last line
counts. A picture, `results/<study>/<key>.png`, is lossless: the true images in the top row, the
reconstructions below.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
import torch
from PIL import Image

from gi_lib.types import Images


class Record(TypedDict):
    """The row of one case. What a failed case has not come to is null."""

    key: str
    """Hash of the case's text, 12 hexadecimal digits."""
    status: str
    """"ok", "failed", or "not applicable": the attack can't be run on this model or batch."""
    error: str | None
    """Type and message of what made it fail, or why it does not apply."""
    attack: str
    """Its name in ATTACKS."""
    attack_text: str
    """The attack with all its hyperparameters."""
    model: str
    weights: str | None
    """Name in WEIGHTS, or null for an untrained model."""
    dataset: str
    split: str
    size: int | None
    """Side of the images in pixels, where it was asked for."""
    indices: list[int]
    data_hash: str | None
    """Hash of the images and labels that were attacked."""
    seed: int
    threat: str
    threat_letter: str
    defense: str | None
    update: str
    profile: str
    batch_size: int
    psnr: list[float] | None
    """One value an image, in the order of `indices`; so are the next three."""
    ssim: list[float] | None
    lpips: list[float] | None
    """Null where LPIPS could not be had; `gi score` fills it in."""
    mse: list[float] | None
    identified: list[bool] | None
    """Whether the true image is the nearest to its reconstruction, among up to 500 of its split."""
    label_accuracy: float | None
    loss: float | None
    """Matching loss at the returned images."""
    restart_losses: list[float | None] | None
    """Loss of every restart before its last step; null where it was not finite."""
    seconds: float | None
    """Wall time of the attack; for cases that ran together, its even share."""
    together: int | None
    """Cases that ran as one stacked problem, this one included."""
    steps: int | None
    restarts: int
    gradient_evaluations: int | None
    training_step_seconds: float | None
    """Median wall time of one forward and backward pass of the same model and batch in the same process."""
    training_steps: float | None
    """The cost of the attack in training steps: seconds / training_step_seconds."""
    evaluation_training_steps: float | None
    """The same for one iteration of one restart: training_steps / gradient_evaluations."""
    peak_memory_mb: float | None
    """On a GPU of this attack; on a CPU the high-water mark of the process so far."""
    device: str
    precision: str
    versions: dict[str, str]
    commit: str | None
    """Short git hash of the code, with a "+" where the package had uncommitted changes; null outside git."""
    started: str
    """UTC, ISO 8601."""


_ORIGIN = "`gi run experiments/NAME.py` writes results/NAME.jsonl"


def append(path: Path, record: Record) -> None:
    """Add one line to a file of records, and wait until it is on the disk.

    What an interrupted write left of a last line is cut off first. If the line can't be written whole,
    nothing of it stays.

    Raises:
        OSError: the disk is full, or the file can't be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with open(path, "a+b", buffering=0) as file:
        end = _whole(path)
        file.truncate(end)
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(28, os.strerror(28), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _whole(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1


def rows(path: Path) -> list[Record]:
    """The rows of one file, the last of each key, in the order in which the keys first came.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than a torn last one is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no records at {path}; {_ORIGIN}")
    newest: dict[str, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            warnings.warn(
                f"{path}:{number}: the last line is torn and left out; its case runs again with the next run",
                stacklevel=2,
            )
            break
        try:
            row = json.loads(line)
            newest[row["key"]] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: this line is not a record ({error}); restore the file, or delete the line"
            ) from error
    return list(newest.values())


def read(path: Path) -> pd.DataFrame:
    """Records as a table: one row a case, the fields of Record and `study`, the file's name.

    Args:
        path: a file, or a folder of which every .jsonl is read.

    Raises:
        FileNotFoundError: there are no records at `path`.
        ValueError: a line is damaged.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no records in {path}; {_ORIGIN}")
    found = [{**row, "study": file.stem} for file in files for row in rows(file)]
    frame = pd.DataFrame(found, columns=[*Record.__annotations__, "study"])
    return frame.astype({"size": "Int64"})


def study(name: str, folder: Path = Path("../results")) -> pd.DataFrame:
    """The records of a study as `read` gives them; an empty table where it has not been run.

    Args:
        name: of its file in experiments/ and in `folder`, without the ending.
        folder: where the files of records are, by default as a chapter sees it.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of records; start in the folder `book`, or name it")
    path = Path(folder) / f"{name}.jsonl"
    return read(path) if path.exists() else pd.DataFrame(columns=[*Record.__annotations__, "study"])


_USUAL = ("attack", "model", "weights", "dataset", "threat")
_SETTINGS = ("size", "update", "batch_size", "defense", "precision", "attack_text")


def usual_groups(frame: pd.DataFrame) -> list[str]:
    """Attack, model, weights, dataset and threat, and what else differs within such a group."""
    by = list(_USUAL)
    for name in _SETTINGS:
        if (frame.groupby(by, dropna=False)[name].nunique(dropna=False) > 1).any():
            by.append(name)
    return by


def summarise(frame: pd.DataFrame, by: Sequence[str] | None = None) -> pd.DataFrame:
    """One row for each group of records; failed cases are counted in `n` and not in `ok`.

    Args:
        frame: from `read`.
        by: columns that make a group; None for `usual_groups`, which keeps unlike settings apart.

    Returns:
        The columns of `by` and: ok and n (cases, without those that do not apply), images, psnr with psnr_low and
        psnr_high (95 % bootstrap interval of the mean over images), ssim, lpips, identified, label_accuracy (means),
        seconds, steps, training_steps
        (medians over cases). A group with an image whose LPIPS is missing has no mean LPIPS.

    Raises:
        ValueError: a name in `by` is not a column, or a column of lists.
    """
    by = usual_groups(frame) if by is None else by
    unknown = [name for name in by if name not in frame.columns]
    if unknown:
        raise ValueError(f"records have no column {', '.join(unknown)}; known: {', '.join(frame.columns)}")
    lists = [name for name in by if frame[name].map(lambda value: isinstance(value, list | dict)).any()]
    if lists:
        raise ValueError(f"{', '.join(lists)} has a list in each record, which makes no group; choose other columns")
    groups = frame.groupby(list(by), dropna=False, sort=False)
    summary = [dict(zip(by, group, strict=True)) | _summary(cases) for group, cases in groups]
    return pd.DataFrame(summary, columns=[*by, *_SUMMARY])


_SUMMARY = (
    *("ok", "n", "images", "psnr", "psnr_low", "psnr_high", "ssim", "lpips", "identified", "label_accuracy"),
    *("seconds", "steps", "training_steps"),
)


def _summary(cases: pd.DataFrame) -> dict[str, float]:
    done = cases[cases["status"] == "ok"]
    scores = {name: _images(done[name]) for name in ("psnr", "ssim", "lpips", "identified")}
    low, high = bootstrap(scores["psnr"])
    medians = {name: done[name].astype(float).median() for name in ("seconds", "steps", "training_steps")}
    return {
        "ok": len(done),
        "n": int((cases["status"] != "not applicable").sum()),
        "images": len(scores["psnr"]),
        "psnr_low": low,
        "psnr_high": high,
        "label_accuracy": done["label_accuracy"].astype(float).mean(),
        **{name: values.mean() if len(values) else np.nan for name, values in scores.items()},
        **medians,
    }


def _images(lists: pd.Series) -> np.ndarray:
    """The values of all images; NaN for a case that has none."""
    return np.concatenate([[], *(values if isinstance(values, list) else [np.nan] for values in lists)]).astype(float)


def bootstrap(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron, 1979). Without values (NaN, NaN)."""
    if len(values) == 0:
        return float("nan"), float("nan")
    chosen = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.asarray(values)[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)


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
