"""Datasets by name: bytes and labels, and a Batch in [0, 1] of any of them.

A dataset is looked for in the data root (see `root`): first as a pack `<name>/{train,test}.npz` with the
arrays `images` (uint8 [N, H, W, C]), `labels` (int64 [N]) and, if it has them, `classes` (K names), and
imagenet as `imagenet/images` with `imagenet/labels.csv`; then in torchvision's own layout; then torchvision
downloads it there. `digits` and `photos` are embedded and need no data root. `DATASETS` says what there is.
`folder:PATH` is an image file or a folder of one's own, with a folder a class as torchvision's ImageFolder has it.
"""

import functools
import hashlib
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gi_lib.data.embedded import digits, photos
from gi_lib.data.images import ImageFiles, resize
from gi_lib.data.sources import Found, read_celeba, read_folder, read_imagenet, read_pack, read_torchvision
from gi_lib.data.specs import DATASETS, NAMES, DataError, Spec
from gi_lib.types import Batch, nearest

__all__ = ["DATASETS", "NAMES", "DataError", "Dataset", "Spec", "Surrogate", "check_name", "load", "root"]

Indices = Sequence[int] | np.ndarray | torch.Tensor

SPLITS = ("test", "train")
SMALLEST, LARGEST, LARGEST_PHOTO = 4, 1024, 224  # sizes in pixels
FOLDER, FOLDER_SIZE = "folder:", 32
"""What the name of one's own images begins with, and their side in pixels unless another is asked for."""
UNKNOWN_CLASSES = 10
"""Classes of a model for images of which nobody has said a class."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a dataset.

    Args:
        name, split: as given to `load`.
        images: uint8 [N, H, W, C], or ImageFiles, which are decoded batch by batch (imagenet).
        labels: int64 [N].
        num_classes: K.
        mean, std: of each channel, in units of [0, 1], as `models.build` takes them.
        origin: "embedded", "data root pack", "torchvision" or "folder".
        class_names: K names, or None.
    """

    name: str
    split: str
    images: np.ndarray | ImageFiles
    labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def batch(self, indices: Indices) -> Batch:
        """The images at `indices` as [B, C, H, W] float32 in [0, 1], with their labels [B] int64, on the CPU.

        Raises:
            ValueError: there are no indices, or one is outside 0 to N - 1.
            DataError: an image file can't be decoded.
        """
        images, labels = self._take(indices)
        scaled = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
        return Batch(scaled, torch.from_numpy(labels))

    def hash(self, indices: Indices) -> str:
        """12 hexadecimal digits of the SHA-256 of the images (shape and bytes) and labels at `indices`."""
        images, labels = self._take(indices)
        digest = hashlib.sha256(repr(images.shape).encode())
        digest.update(images.tobytes())
        digest.update(labels.astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    def _take(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        try:
            chosen = np.asarray(indices)
        except ValueError as error:  # lists of unequal lengths
            raise ValueError(
                f"indices must be a list of whole numbers, such as [0, 1, 2], got {indices!r:.80}"
            ) from error
        if chosen.size == 0:
            raise ValueError("no indices were given; a batch needs at least one")
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise ValueError(f"indices must be a list of whole numbers, such as [0, 1, 2], got {indices!r}")
        wrong = chosen[(chosen < 0) | (chosen >= len(self))]
        if wrong.size:
            raise ValueError(
                f"index {wrong[0]} is out of range: {self.name} {self.split} has {len(self)} images,"
                f" numbered 0 to {len(self) - 1}; choose among these (negative ones don't count from the end)"
            )
        images = self.images.decode(chosen) if isinstance(self.images, ImageFiles) else self.images[chosen]
        return images, self.labels[chosen]


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Data of the attacker's own, of the same domain as the private images, and never those.

    Args:
        dataset: by rule the train split; what is attacked comes from the test split.
        without: indices of it that are never drawn.
    """

    dataset: Dataset
    without: tuple[int, ...] = ()

    @functools.cached_property
    def hash(self) -> str:
        """Of all that can be drawn."""
        return self.dataset.hash(self._own)

    @functools.cached_property
    def _own(self) -> list[int]:
        left_out = set(self.without)
        own = [i for i in range(len(self.dataset)) if i not in left_out]
        if not own:
            raise ValueError(f"nothing of {self.dataset.name} {self.dataset.split} is left to draw")
        return own

    def draw(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """n images [n, C, H, W] in [0, 1] and their labels [n], none twice; fewer where there are no more."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"draw needs a number of images >= 1, got {n!r}")
        chosen = torch.randperm(len(self._own), generator=rng)[:n]
        batch = self.dataset.batch([self._own[i] for i in chosen.tolist()])
        return batch.images, batch.labels


def root(folder: str | Path | None = None) -> Path:
    """The data root: `folder`, else $GI_DATA, else gi_lib in the user's cache ($XDG_CACHE_HOME, or ~/.cache).

    Raises:
        FileNotFoundError: `folder` or $GI_DATA is no folder. (The cache need not exist: a download makes it.)
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gi_lib"
    given = folder or os.environ.get("GI_DATA")
    if not given:
        return cache
    path = Path(given).expanduser()
    if not path.is_dir():
        said = "given as root" if folder else "named by the environment variable GI_DATA"
        raise FileNotFoundError(
            f"the data root {path}, {said}, is not a folder; create it, correct the name, or leave it out"
            f" to use {cache}"
        )
    return path


def load(
    name: str,
    *,
    split: str = "test",
    size: int | None = None,
    root: str | Path | None = None,
    download: bool = True,
) -> Dataset:
    """Load one split of a dataset.

    Args:
        name: one of NAMES, or folder:PATH, which has one split: both names mean it.
        split: "test" (what is attacked) or "train" (what priors and checkpoints are trained on).
        size: makes every image a square of this side: the shorter side is resized to it, the centre cut out.
            None leaves the dataset's own shape, `DATASETS[name].image_shape`.
        root: the data root; see `data.root`.
        download: let torchvision download what the data root doesn't have.

    Raises:
        ValueError: an unknown name or split, or a size outside 4 to 1024 (photos: 224).
        FileNotFoundError: the data root is no folder.
        DataError: the data is missing or damaged, or its download failed.
    """
    check_name(name)
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(f"no split is called {split!r}; choose 'test' (the default) or 'train'")
    if size is not None:
        size = _checked_size(name, size)
    if name.startswith(FOLDER):
        return _of_folder(name, split, size or FOLDER_SIZE)
    spec = DATASETS[name]
    found = _find(name, split, size or spec.image_shape[1], root, download)
    images = found.images
    if size is not None and isinstance(images, np.ndarray) and images.shape[1:3] != (size, size):
        images = np.stack([resize(image, size) for image in images])
    return Dataset(
        name=name,
        split=split,
        images=images,
        labels=found.labels,
        num_classes=spec.num_classes,
        mean=spec.mean,
        std=spec.std,
        origin=found.origin,
        class_names=spec.class_names or found.class_names,
    )


def check_name(name: object) -> None:
    """ValueError unless `load` knows the name; a folder is looked at when it is loaded."""
    if not isinstance(name, str) or not (name in DATASETS or name.startswith(FOLDER)):
        raise ValueError(nearest(name, DATASETS, "dataset"))  # type: ignore[arg-type]


def _of_folder(name: str, split: str, size: int) -> Dataset:
    """Colour images that are not normalised. Without class folders all have the label 0 of UNKNOWN_CLASSES."""
    found = read_folder(Path(name.removeprefix(FOLDER)).expanduser(), size)
    classes = len(found.class_names or ())
    return Dataset(
        name=name,
        split=split,
        images=found.images,
        labels=found.labels,
        num_classes=classes if classes > 1 else UNKNOWN_CLASSES,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        origin=found.origin,
        class_names=found.class_names if classes > 1 else None,
    )


def _find(name: str, split: str, size: int, folder: str | Path | None, download: bool) -> Found:
    if name == "digits":
        return digits(split)
    if name == "photos":
        return photos(split, size)
    where = root(folder)
    pack = where / name / f"{split}.npz"
    if name == "imagenet":
        return read_imagenet(where / name, split, size)
    if pack.exists():
        return read_pack(pack, DATASETS[name])
    if name == "celeba":
        return read_celeba(where / name, split, size)
    if name == "faces":
        raise DataError(
            f"there is no {pack}, and the faces can't be downloaded; make that file from the AT&T (ORL)"
            " faces: images uint8 [N, 112, 92, 1], labels int64 [N]"
        )
    return read_torchvision(name, split, where, download)


def _checked_size(name: str, size: int) -> int:
    largest = LARGEST_PHOTO if name == "photos" else LARGEST
    if isinstance(size, bool) or not hasattr(size, "__index__") or not SMALLEST <= size <= largest:
        raise ValueError(f"size must be a whole number of pixels from {SMALLEST} to {largest} for {name}, got {size!r}")
    return operator.index(size)
