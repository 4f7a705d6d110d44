"""Reading a data root: packs, imagenet, torchvision's layout, and torchvision's download."""

import csv
import errno
import http.client
import os
import tempfile
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gi_lib.data.images import ImageFiles
from gi_lib.data.specs import DATASETS, DataError, Spec

# What damaged bytes raise in numpy.load. TypeError: a lone array in place of a pack.
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


class Found(NamedTuple):
    """images uint8 [N, H, W, C], labels int64 [N], where they come from, and K class names or None."""

    images: np.ndarray | ImageFiles
    labels: np.ndarray
    origin: Literal["embedded", "data root pack", "torchvision", "folder"]
    class_names: tuple[str, ...] | None = None


def read_pack(path: Path, spec: Spec) -> Found:
    """Read an npz pack; DataError unless it is whole and holds what `spec` says."""
    try:
        with np.load(path, allow_pickle=False) as pack:
            images, labels = pack["images"], pack["labels"]
            names = tuple(str(name) for name in pack["classes"]) if "classes" in pack else None
    except UNREADABLE as error:
        raise DataError(
            f"{path} can't be read ({type(error).__name__}: {error}); it is truncated or altered: copy it"
            " afresh, or delete it, and what torchvision can download is downloaded"
        ) from error
    _check(images, labels, names, spec, path)
    return Found(images, labels, "data root pack", names)


def read_folder(path: Path, size: int) -> Found:
    """One image file, a folder of them, or a folder with a folder a class as torchvision's ImageFolder takes it."""
    from torchvision.datasets import folder  # slow to import, and only needed here

    if path.is_file():
        paths, labels, names = [path], [0], None
    elif path.is_dir():
        kinds = folder.IMG_EXTENSIONS
        own = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds and file.is_file())
        if own:
            paths, labels, names = own, [0] * len(own), None
        else:
            try:
                classes, numbers = folder.find_classes(str(path))
                found = folder.make_dataset(str(path), numbers, extensions=kinds)
            except FileNotFoundError as error:
                raise DataError(
                    f"{path} has no images, and no folder a class with images ({error}); put them there as"
                    f" {', '.join(kinds[:3])}, or name another folder"
                ) from error
            paths, labels, names = [Path(file) for file, _ in found], [label for _, label in found], tuple(classes)
    else:
        raise DataError(f"there is no image and no folder at {path}; correct the path")
    return Found(ImageFiles(tuple(paths), size), np.asarray(labels, dtype=np.int64), "folder", names)


def read_torchvision(name: str, split: str, where: Path, download: bool) -> Found:
    """Read torchvision's own files in `where`, downloaded if need be."""
    from torchvision import datasets  # slow to import, and not needed for packs

    cls = {
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "svhn": datasets.SVHN,
    }[name]
    source = _read(cls, name, split, where)
    if source is None and download:
        _download(cls, split, name, where)
        source = _read(cls, name, split, where)
    if source is None:
        raise DataError(
            f"there is no {name}, or no whole one, in {where}; put {name}/{split}.npz or torchvision's files"
            " there, or allow the download (download=True)"
        )
    targets = source.labels if name == "svhn" else source.targets
    images, labels = np.asarray(source.data), np.asarray(targets, dtype=np.int64)
    images = images[..., None] if images.ndim == 3 else images
    images = images.transpose(0, 2, 3, 1) if name == "svhn" else images
    names = None if name == "svhn" else tuple(source.classes)
    _check(images, labels, names, DATASETS[name], where)
    return Found(images, labels, "torchvision", names)


def read_imagenet(folder: Path, split: str, size: int) -> Found:
    """The photographs of a pack (images and labels.csv), or the class folders in `folder`/val and /train."""
    from torchvision.datasets import ImageFolder
    from torchvision.models import AlexNet_Weights

    names = tuple(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])  # the 1,000 classes in their usual order
    if (folder / "labels.csv").exists():
        if split == "train":
            raise DataError(f"{folder} has no train split; its photographs are all for testing: split='test'")
        return _photographs(folder, size, names)
    classes = folder / ("val" if split == "test" else "train")
    if not classes.is_dir():
        raise DataError(
            f"no imagenet {split} images in {folder.parent}, and torchvision can't download ImageNet; get it"
            f" from image-net.org and put its class folders (n01440764, ...) in {classes}, or put some"
            f" photographs in {folder / 'images'} with a {folder / 'labels.csv'} (columns: file, class_index)"
        )
    number = sum(path.is_dir() for path in classes.iterdir())
    if number != len(names):  # a label is the place of its folder among all of them
        raise DataError(
            f"{classes} has {number} class folders, ImageNet has {len(names)}, and labels can't be told from"
            " a part of them; put all of them there, or name the images in labels.csv"
        )
    files = ImageFolder(classes, allow_empty=True)
    if not files.samples:
        raise DataError(f"the class folders in {classes} hold no images; put the photographs there")
    paths = tuple(Path(path) for path, _ in files.samples)
    return Found(ImageFiles(paths, size), np.array(files.targets, dtype=np.int64), "torchvision", names)


def read_celeba(folder: Path, split: str, size: int) -> Found:
    """torchvision's layout of CelebA: img_align_celeba, list_attr_celeba.txt and list_eval_partition.txt."""
    try:
        attributes = (folder / "list_attr_celeba.txt").read_text(encoding="utf-8").splitlines()
        parts = dict(
            line.split() for line in (folder / "list_eval_partition.txt").read_text(encoding="utf-8").splitlines()
        )
        smiling = attributes[1].split().index("Smiling")
        labels = {row[0]: row[1 + smiling] == "1" for row in map(str.split, attributes[2:])}
    except FileNotFoundError as error:
        raise DataError(
            f"there is no {error.filename}, and CelebA can't be downloaded; put img_align_celeba,"
            f" list_attr_celeba.txt and list_eval_partition.txt in {folder}"
        ) from error
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"CelebA's lists in {folder} can't be read ({error}); copy them afresh") from error
    wanted = {"train": "0", "test": "2"}[split]
    names = sorted(name for name, part in parts.items() if part == wanted and name in labels)
    paths = tuple(folder / "img_align_celeba" / name for name in names)
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{missing[0]} is missing" if missing else f"no image is in the {split} split"
        raise DataError(f"CelebA in {folder} is not whole: {what}; copy it afresh")
    return Found(ImageFiles(paths, size), np.array([labels[name] for name in names], dtype=np.int64), "torchvision")


def _check(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...] | None, spec: Spec, path: Path) -> None:
    """DataError unless the arrays are what the images and labels of this dataset must be."""
    channels, height, width = spec.image_shape
    problem = None
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
        expected = f"uint8 [N, {height}, {width}, {channels}]"
        problem = f"images are {images.dtype} {list(images.shape)}, not {expected}"
    elif labels.dtype != np.int64 or labels.ndim != 1:
        problem = f"labels are {labels.dtype} {list(labels.shape)}, not int64 [N]"
    elif len(images) != len(labels) or len(labels) == 0:
        problem = f"there are {len(images)} images and {len(labels)} labels"
    elif labels.min() < 0 or labels.max() >= spec.num_classes:
        problem = f"labels run from {labels.min()} to {labels.max()}, not within 0 to {spec.num_classes - 1}"
    elif names is not None and len(names) != spec.num_classes:
        problem = f"there are {len(names)} class names for {spec.num_classes} classes"
    if problem:
        raise DataError(f"{path} does not hold what its name says: {problem}; copy it afresh, or delete it")


def _read(cls: type, name: str, split: str, where: Path) -> Any:
    """torchvision's dataset object, or None where it finds no whole dataset."""
    try:
        return cls(where, download=False, **_split(cls, split))
    except (*UNREADABLE, AssertionError) as error:
        if isinstance(error, RuntimeError) and "not found" in str(error):  # torchvision's word for absence
            return None
        raise DataError(
            f"torchvision's files of {name} in {where} are damaged ({type(error).__name__}: {error}); delete"
            " them, and they are downloaded again"
        ) from error


def _split(cls: type, split: str) -> dict[str, Any]:
    """torchvision's way to name a split."""
    return {"split": split} if cls.__name__ == "SVHN" else {"train": split == "train"}


def _download(cls: type, split: str, name: str, where: Path) -> None:
    """Download into a folder beside, then move: an interrupted download is never taken for a dataset."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=where) as staging:
            cls(staging, download=True, **_split(cls, split))
            for file in [path for path in Path(staging).rglob("*") if path.is_file()]:
                target = where / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # URLError is an OSError
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT):
            why, remedy = "the disk is full", "free some space (or choose another data root)"
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            why, remedy = "the folder can't be written", "choose another data root"
        else:
            why, remedy = "the download failed", "check the network"
        said = " ".join(str(error).split())  # torchvision's text may run over several lines
        raise DataError(
            f"{name} is not in {where} and could not be fetched: {why} ({said}); {remedy} and try again, or"
            " use an embedded dataset (digits, photos)"
        ) from error


def _photographs(folder: Path, size: int, names: tuple[str, ...]) -> Found:
    try:
        with open(folder / "labels.csv", newline="", encoding="utf-8") as table:
            reader = csv.DictReader(table)
            rows = [(folder / "images" / row["file"], int(row["class_index"])) for row in reader]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{folder / 'labels.csv'} can't be read ({type(error).__name__}: {error}); it needs a header line"
            " with the columns file and class_index, and a row for each image"
        ) from error
    inside = os.path.normpath(folder / "images")  # a link inside it may lead anywhere: it is the user's own
    outside = [str(path) for path, _ in rows if not Path(os.path.normpath(path)).is_relative_to(inside)]
    missing = [path.name for path, _ in rows if not path.is_file()]
    wrong = [label for _, label in rows if not 0 <= label < len(names)]
    problem = None
    if not rows:
        problem = "names no images"
    elif outside:
        problem = f"names a file outside the folder images: {outside[0]}"
    elif missing:
        problem = f"names an image that isn't in images: {missing[0]}"
    elif wrong:
        problem = f"has a class_index outside 0 to {len(names) - 1}: {wrong[0]}"
    if problem:
        raise DataError(f"{folder / 'labels.csv'} {problem}; copy it and the images afresh")
    paths, labels = zip(*rows, strict=True)
    return Found(ImageFiles(paths, size), np.array(labels, dtype=np.int64), "data root pack", names)
