"""Datasets: what is embedded, what a data root may hold, what is downloaded, and every error on the way."""

import csv
import errno
import hashlib
import http.client
import os
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

from gi_lib import data
from gi_lib.data.embedded import CROPS, PARTS
from gi_lib.data.images import resize
from gi_lib.types import Batch


@pytest.fixture
def real_root():
    if not os.environ.get("GI_DATA"):
        pytest.skip("needs the real datasets: set GI_DATA to a folder that has them")
    return data.root()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test downloads: torchvision's fetching, where a test doesn't replace it, is an error of the test."""

    def fetch(*args, **kwargs):
        raise AssertionError("a test tried to download")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fetch)


def cifar_arrays(n=20, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        "labels": rng.integers(0, 10, n).astype(np.int64),
    }


def write_pack(root, arrays, name="cifar10", split="test"):
    path = root / name / f"{split}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def write_idx(folder, seed=0, numbers=(12, 8), labels_below=10):
    """torchvision's MNIST layout: four idx files in `folder`; returns the test images and labels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in zip(("train", "t10k"), numbers, strict=True):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, labels_below, n, dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    return images, labels


# What is there


@pytest.mark.parametrize("name", data.NAMES)
def test_table_says_what_each_dataset_is(name):
    spec = data.DATASETS[name]
    assert all(text and "\n" not in text for text in (spec.about, spec.licence, spec.source))
    assert len(spec.mean) == len(spec.std) == spec.image_shape[0]
    assert all(0 < value < 1 for value in spec.mean + spec.std)


@pytest.mark.parametrize(("split", "number"), [("train", 1200), ("test", 597)])
def test_digits(split, number):
    digits = data.load("digits", split=split)
    assert (len(digits), digits.image_shape, digits.num_classes) == (number, (1, 8, 8), 10)
    assert digits.images.dtype == np.uint8
    assert digits.labels.dtype == np.int64
    assert set(digits.labels) == set(range(10))
    assert digits.origin == "embedded"
    assert digits.class_names == tuple("0123456789")


def test_photos_are_seven_photographs_in_turn():
    photos = data.load("photos")
    assert (len(photos), photos.image_shape, photos.num_classes) == (28, (3, 32, 32), 7)
    assert photos.labels.tolist() == list(range(7)) * 4
    assert photos.class_names == tuple(PARTS)
    assert min(image.std() for image in photos.images) > 10  # pictures, not flat patches
    assert len({image.tobytes() for image in photos.images}) == 28


@pytest.mark.parametrize("split", ["train", "test"])
def test_photos_up_to_224_pixels(split):
    photos = data.load("photos", split=split, size=224)
    assert photos.images.shape == (28, 224, 224, 3)
    smaller = np.stack([resize(image, 32) for image in photos.images])
    difference = np.abs(smaller.astype(int) - data.load("photos", split=split).images)
    assert difference.mean() < 4  # the same crops at both sizes


@pytest.mark.parametrize("name", PARTS)
def test_train_and_test_crops_share_no_pixel(name):
    import skimage.data

    photograph = getattr(skimage.data, name)()
    used = np.zeros(photograph.shape[:2], dtype=int)
    for top, left, height, width in PARTS[name].values():
        assert top + height <= photograph.shape[0]
        assert left + width <= photograph.shape[1]
        used[top : top + height, left : left + width] += 1
    assert used.max() == 1
    assert photograph.dtype == np.uint8
    assert photograph.shape[2] == 3
    height, width = PARTS[name]["test"][2:]
    assert min(round(scale * min(height, width)) for scale, _, _ in CROPS) >= 224  # never enlarged


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_mean_and_std_of_the_embedded_sets(name):
    check_mean_and_std(data.load(name, split="train"))


def check_mean_and_std(dataset):
    pixels = dataset.images.reshape(-1, dataset.image_shape[0]) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), atol=6e-5)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=0), atol=6e-5)


# Batches and hashes


def test_batch_is_bytes_over_255_in_the_order_asked_for(tmp_path):
    arrays = cifar_arrays()
    write_pack(tmp_path, arrays)
    dataset = data.load("cifar10", root=tmp_path)
    batch = dataset.batch([3, 0, 3])
    assert isinstance(batch, Batch)
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (3, 3, 32, 32)
    expected = arrays["images"][[3, 0, 3]].astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
    assert np.array_equal(batch.images.numpy(), expected)
    assert batch.labels.tolist() == arrays["labels"][[3, 0, 3]].tolist()


@pytest.mark.parametrize("indices", [(1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])])
def test_indices_of_any_sequence_type(indices):
    assert data.load("digits").batch(indices).labels.tolist() == data.load("digits").labels[[1, 2]].tolist()


def test_batch_does_not_share_memory_with_the_dataset():
    digits = data.load("digits")
    before = digits.hash([0])
    digits.batch([0]).images.zero_()
    digits.batch([0]).labels.zero_()
    assert digits.hash([0]) == before


def test_hash_names_the_bytes_and_the_labels(tmp_path):
    arrays = cifar_arrays()
    write_pack(tmp_path, arrays)
    dataset = data.load("cifar10", root=tmp_path)
    images, labels = arrays["images"][[4, 7]], arrays["labels"][[4, 7]]
    text = b"(2, 32, 32, 3)" + images.tobytes() + labels.astype("<i8").tobytes()
    assert dataset.hash([4, 7]) == hashlib.sha256(text).hexdigest()[:12]
    assert len({dataset.hash(indices) for indices in ([4, 7], [7, 4], [4], [4, 4])}) == 4
    arrays["labels"][4] = (arrays["labels"][4] + 1) % 10
    write_pack(tmp_path, arrays)
    assert data.load("cifar10", root=tmp_path).hash([4, 7]) != dataset.hash([4, 7])


def test_hash_of_the_embedded_digits_never_changes():
    assert data.load("digits").hash(range(597)) == "6259575009d8"


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "no indices"),
        ([597], r"index 597 is out of range: digits test has 597 images, numbered 0 to 596"),
        ([0, -1], r"index -1 is out of range"),
        ([0.5], "whole numbers"),
        ([True], "whole numbers"),
        (3, "whole numbers"),
        ([[0, 1]], "whole numbers"),
        (["0"], "whole numbers"),
    ],
)
def test_wrong_indices(indices, message):
    digits = data.load("digits")
    with pytest.raises(ValueError, match=message):
        digits.batch(indices)
    with pytest.raises(ValueError, match=message):
        digits.hash(indices)


# Sizes


@pytest.mark.parametrize("shape", [(112, 92, 1), (256, 341, 3), (60, 90, 3)])
@pytest.mark.parametrize("size", [32, 64])
def test_resize_agrees_with_torch(shape, size):
    """Against torch's own antialiased bilinear filter, then the centre cut out by hand."""
    rng = np.random.default_rng(0)
    height, width, channels = shape
    coarse = torch.tensor(rng.random((1, channels, height // 8, width // 8)), dtype=torch.float32)
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    scale = size / min(height, width)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float(),
        size=(round(height * scale), round(width * scale)),
        mode="bilinear",
        antialias=True,
    )[0]
    top, left = (expected.shape[1] - size) // 2, (expected.shape[2] - size) // 2
    expected = expected[:, top : top + size, left : left + size].permute(1, 2, 0).numpy()
    result = resize(pixels, size)
    assert result.shape == (size, size, channels)
    assert np.abs(result - expected).max() <= 1.01  # Pillow rounds twice, once each axis


def test_size_resizes_every_image(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 112, 92, 1), dtype=np.uint8)
    write_pack(tmp_path, {"images": images, "labels": np.arange(3)}, name="faces")
    assert data.load("faces", root=tmp_path).image_shape == (1, 112, 92)
    faces = data.load("faces", root=tmp_path, size=32)
    assert faces.image_shape == (1, 32, 32)
    assert np.array_equal(faces.images[1], resize(images[1], 32))
    assert data.load("digits", size=32).image_shape == (1, 32, 32)
    assert np.array_equal(data.load("digits", size=8).images, data.load("digits").images)


@pytest.mark.parametrize("size", [0, 3, -32, 1025, 32.0, "32", True])
def test_wrong_size(size):
    with pytest.raises(ValueError, match="size must be a whole number of pixels from 4 to 1024 for digits"):
        data.load("digits", size=size)


def test_photos_are_not_enlarged():
    with pytest.raises(ValueError, match="from 4 to 224 for photos, got 256"):
        data.load("photos", size=256)


# Names and roots


@pytest.mark.parametrize(("name", "near"), [("cifar", "cifar10"), ("MNIST", "mnist"), ("digit", "digits")])
def test_unknown_dataset_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"no dataset is called '{name}'.*{near}"):
        data.load(name)


def test_unknown_split():
    with pytest.raises(ValueError, match="no split is called 'validation'.*'test'.*'train'"):
        data.load("digits", split="validation")


def test_root_is_the_argument_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    for folder in ("given", "variable"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("GI_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.root(tmp_path / "given") == tmp_path / "given"
    assert data.root() == tmp_path / "variable"
    monkeypatch.delenv("GI_DATA")
    assert data.root() == tmp_path / "cache" / "gi_lib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.root() == tmp_path / ".cache" / "gi_lib"


def test_root_that_is_no_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere, given as root, is not a folder; create it"):
        data.load("cifar10", root=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    monkeypatch.setenv("GI_DATA", str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match="file, named by the environment variable GI_DATA, is not"):
        data.load("cifar10")
    data.load("digits")  # embedded data needs no root


# Packs


def test_pack(tmp_path):
    arrays = cifar_arrays() | {"classes": np.array([f"class {i}" for i in range(10)])}
    write_pack(tmp_path, arrays)
    write_pack(tmp_path, cifar_arrays(n=5, seed=1), split="train")
    dataset = data.load("cifar10", root=tmp_path)
    assert np.array_equal(dataset.images, arrays["images"])
    assert np.array_equal(dataset.labels, arrays["labels"])
    assert (dataset.name, dataset.split, dataset.origin) == ("cifar10", "test", "data root pack")
    assert dataset.class_names[9] == "class 9"
    assert len(data.load("cifar10", split="train", root=tmp_path)) == 5
    assert data.load("cifar10", split="train", root=tmp_path).class_names is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_pack(tmp_path, share):
    path = write_pack(tmp_path, cifar_arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(data.DataError, match=r"test\.npz can't be read .*truncated or altered: copy it"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path, compressed):
    arrays = cifar_arrays(n=2)
    path = write_pack(tmp_path, arrays)
    if compressed:
        np.savez_compressed(path, **arrays)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # The ends hold the headers and the index, where damage is the most varied.
    places = {*range(90), *range(len(whole) - 180, len(whole)), *rng.integers(0, len(whole), 50).tolist()}
    errors = 0
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            dataset = data.load("cifar10", root=tmp_path)
        except data.DataError:
            errors += 1
        else:
            assert np.array_equal(dataset.images, arrays["images"])
            assert np.array_equal(dataset.labels, arrays["labels"])
    assert errors > len(places) / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("images"), "images is not a file"),
        (lambda a: a.pop("labels"), "labels is not a file"),
        (lambda a: a.update(labels=np.array([None] * 20)), "Object arrays cannot be loaded"),  # a pickle
        (lambda a: a.update(images=a["images"] / 255), r"images are float64 .* not uint8 \[N, 32, 32, 3\]"),
        (lambda a: a.update(images=a["images"].transpose(0, 3, 1, 2)), r"images are uint8 \[20, 3, 32, 32\]"),
        (lambda a: a.update(images=a["images"][..., 0]), r"images are uint8 \[20, 32, 32\]"),
        (lambda a: a.update(labels=a["labels"].astype(np.int32)), "labels are int32"),
        (lambda a: a.update(labels=np.eye(10, dtype=np.int64)), r"labels are int64 \[10, 10\]"),
        (lambda a: a.update(labels=a["labels"][:-1]), "20 images and 19 labels"),
        (lambda a: a.update(images=a["images"][:0], labels=a["labels"][:0]), "0 images and 0 labels"),
        (lambda a: a.update(labels=a["labels"] + 5), "not within 0 to 9"),
        (lambda a: a.update(labels=a["labels"] - 1), "not within 0 to 9"),
        (lambda a: a.update(classes=np.array(["one", "two"])), "2 class names for 10 classes"),
    ],
)
def test_altered_pack(tmp_path, change, message):
    arrays = cifar_arrays() | {"labels": np.arange(20, dtype=np.int64) % 10}
    change(arrays)
    write_pack(tmp_path, arrays)
    with pytest.raises(data.DataError, match=message):
        data.load("cifar10", root=tmp_path)


def test_a_lone_array_is_no_pack(tmp_path):
    path = write_pack(tmp_path, cifar_arrays())
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(data.DataError, match="can't be read"):
        data.load("cifar10", root=tmp_path)


def test_faces_say_how_to_get_them(tmp_path):
    with pytest.raises(data.DataError, match=r"faces.test\.npz, and the faces can't be downloaded; make"):
        data.load("faces", root=tmp_path)


# torchvision's layout and downloads


def test_mnist_in_torchvisions_layout(tmp_path):
    images, labels = write_idx(tmp_path / "MNIST" / "raw")
    mnist = data.load("mnist", root=tmp_path, download=False)
    assert np.array_equal(mnist.images, images[..., None])
    assert np.array_equal(mnist.labels, labels)
    assert mnist.labels.dtype == np.int64
    assert (mnist.origin, mnist.class_names[7]) == ("torchvision", "7")
    assert len(data.load("mnist", split="train", root=tmp_path)) == 12
    assert mnist.batch([0, 1]).images.shape == (2, 1, 28, 28)


def test_fashion_mnist_in_torchvisions_layout(tmp_path):
    images, _ = write_idx(tmp_path / "FashionMNIST" / "raw")
    fashion = data.load("fashion_mnist", root=tmp_path, download=False)
    assert np.array_equal(fashion.images, images[..., None])
    assert (fashion.origin, fashion.class_names[9]) == ("torchvision", "Ankle boot")


def test_svhn_in_torchvisions_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)  # of the real file
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [3], [9]])})
    svhn = data.load("svhn", root=tmp_path, download=False)
    assert np.array_equal(svhn.images, pixels.transpose(3, 0, 1, 2))
    assert (svhn.labels.tolist(), svhn.class_names[0], svhn.origin) == ([1, 0, 3, 9], "0", "torchvision")


def write_celeba(folder, images=3):
    (folder / "img_align_celeba").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(images):
        pixels = rng.integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / f"{i}.jpg")
    rows = ["0.jpg  1 -1", "1.jpg -1  1", "2.jpg -1 -1"]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["3", "Bald Smiling", *rows]) + "\n")
    (folder / "list_eval_partition.txt").write_text("0.jpg 0\n1.jpg 2\n2.jpg 2\n")


def test_celeba_in_a_pack(tmp_path):
    (tmp_path / "celeba").mkdir()
    images = np.zeros((2, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "celeba" / "test.npz", images=images, labels=np.array([0, 1]))
    assert data.load("celeba", root=tmp_path).labels.tolist() == [0, 1]


def test_celeba_in_torchvisions_layout(tmp_path):
    write_celeba(tmp_path / "celeba")
    celeba = data.load("celeba", root=tmp_path)
    assert (celeba.image_shape, celeba.labels.tolist(), celeba.origin) == ((3, 64, 64), [1, 0], "torchvision")
    assert [celeba.class_names[k] for k in celeba.labels] == ["smiling", "not smiling"]
    assert data.load("celeba", root=tmp_path, split="train", size=32).batch([0]).images.shape == (1, 3, 32, 32)


def test_celeba_that_is_not_whole(tmp_path):
    with pytest.raises(data.DataError, match="list_attr_celeba.txt, and CelebA can't be downloaded; put"):
        data.load("celeba", root=tmp_path)
    write_celeba(tmp_path / "celeba", images=2)
    with pytest.raises(data.DataError, match=r"not whole: .*2\.jpg is missing; copy it afresh"):
        data.load("celeba", root=tmp_path)
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text("3\nBald Young\n")
    with pytest.raises(data.DataError, match="lists in .* can't be read .*; copy them afresh"):
        data.load("celeba", root=tmp_path)


def test_a_pack_goes_before_torchvisions_layout(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    pack = {"images": np.zeros((3, 28, 28, 1), dtype=np.uint8), "labels": np.arange(3)}
    write_pack(tmp_path, pack, name="mnist")
    assert data.load("mnist", root=tmp_path).origin == "data root pack"


@pytest.mark.parametrize("length", [0, 10, 1000])
def test_damaged_files_of_torchvision(tmp_path, length):
    write_idx(tmp_path / "MNIST" / "raw")
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(data.DataError, match="torchvision's files of mnist .* are damaged .*; delete them"):
        data.load("mnist", root=tmp_path)


def test_altered_files_of_torchvision(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", labels_below=200)
    with pytest.raises(data.DataError, match="not within 0 to 9"):
        data.load("mnist", root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_no_data_and_no_download(tmp_path, name):
    with pytest.raises(data.DataError, match=f"there is no {name}.*put {name}/test.npz.*download=True"):
        data.load(name, root=tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []


def test_download_goes_to_the_data_root_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GI_DATA", raising=False)
    calls = []

    def fetch(url, download_root, filename=None, md5=None):
        calls.append(filename)
        Path(download_root, filename).write_bytes(b"the archive, which torchvision leaves there")
        if len(calls) == 4:
            write_idx(Path(download_root))

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    mnist = data.load("mnist")
    assert (mnist.origin, len(mnist), len(calls)) == ("torchvision", 8, 4)
    root = tmp_path / "cache" / "gi_lib"
    assert [path.name for path in root.iterdir()] == ["MNIST"]  # nothing is left beside it
    assert data.load("mnist").hash([0]) == mnist.hash([0])
    assert len(data.load("mnist", split="train")) == 12
    assert len(calls) == 4


FAILURES = [
    (urllib.error.URLError("Name or service not known"), "the download failed .*; check the network"),
    (TimeoutError("timed out"), "the download failed .*; check the network"),
    (http.client.IncompleteRead(b""), "the download failed .*; check the network"),
    (RuntimeError("File not found or corrupted."), "the download failed .*; check the network"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full .*; free some space"),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk is full .*; free some space"),
    (
        PermissionError(errno.EACCES, "Permission denied"),
        "the folder can't be written .*; choose another data root",
    ),
]


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize(("failure", "message"), FAILURES)
def test_failed_download(tmp_path, monkeypatch, name, failure, message):
    def fetch(url, download_root, filename=None, md5=None):
        Path(download_root, filename).write_bytes(b"half an arch")
        raise failure

    module = torchvision.datasets.mnist if name == "mnist" else torchvision.datasets.cifar
    monkeypatch.setattr(module, "download_and_extract_archive", fetch)
    with pytest.raises(data.DataError, match=f"{name} is not in .* could not be fetched: {message}"):
        data.load(name, root=tmp_path)
    assert list(tmp_path.iterdir()) == []  # no half dataset is left


def test_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def fetch(url, download_root, filename=None, md5=None):
        write_idx(Path(download_root))
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


# imagenet


def write_photographs(folder, labels=(0, 5, 999), sizes=((300, 256), (256, 341), (256, 256))):
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    with open(folder / "labels.csv", "w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["file", "class_index", "name"])
        writer.writerows([f"{i}.png", label, "something"] for i, label in enumerate(labels))


def test_imagenet_pack(tmp_path):
    write_photographs(tmp_path / "imagenet")
    imagenet = data.load("imagenet", root=tmp_path)
    assert (len(imagenet), imagenet.image_shape, imagenet.num_classes) == (3, (3, 224, 224), 1000)
    assert imagenet.labels.tolist() == [0, 5, 999]
    assert imagenet.class_names[0] == "tench"
    batch = imagenet.batch([2, 1])
    assert batch.images.shape == (2, 3, 224, 224)
    with Image.open(tmp_path / "imagenet" / "images" / "1.png") as image:
        expected = resize(np.asarray(image), 224).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(batch.images[1].numpy(), expected)
    assert data.load("imagenet", root=tmp_path, size=64).batch([0]).images.shape == (1, 3, 64, 64)
    assert imagenet.hash([1]) != data.load("imagenet", root=tmp_path, size=64).hash([1])


def test_imagenet_decodes_only_what_is_asked_for(tmp_path):
    write_photographs(tmp_path / "imagenet")
    path = tmp_path / "imagenet" / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:1000])
    imagenet = data.load("imagenet", root=tmp_path)
    imagenet.batch([0, 2])
    with pytest.raises(data.DataError, match=r"1\.png can't be decoded"):
        imagenet.batch([0, 1])


def test_grey_files_of_imagenet_become_rgb(tmp_path):
    write_photographs(tmp_path / "imagenet")
    Image.fromarray(np.full((256, 300), 51, dtype=np.uint8)).save(tmp_path / "imagenet" / "images" / "0.png")
    images = data.load("imagenet", root=tmp_path).batch([0]).images
    assert images.shape == (1, 3, 224, 224)
    assert torch.allclose(images, torch.tensor(0.2))


def test_imagenet_pack_has_no_train_split(tmp_path):
    write_photographs(tmp_path / "imagenet")
    with pytest.raises(data.DataError, match="has no train split.*split='test'"):
        data.load("imagenet", root=tmp_path, split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,class\n0.png,0\n",
            r"labels\.csv can't be read \(KeyError: 'class_index'\); it needs a header",
        ),
        ("file,class_index\n0.png,tench\n", "can't be read"),
        ("file,class_index\n0.png\n", "can't be read"),
        ("file,class_index\n", "names no images"),
        ("file,class_index\nother.png,1\n", r"names an image that isn't in images: other\.png"),
        ("file,class_index\n../../secret.png,1\n", "names a file outside the folder images: .*secret"),
        ("file,class_index\n/etc/passwd,1\n", "names a file outside the folder images: /etc/passwd"),
        ("file,class_index\n0.png,1000\n", "class_index outside 0 to 999: 1000"),
        ("file,class_index\n0.png,-1\n", "class_index outside 0 to 999: -1"),
    ],
)
def test_wrong_labels_of_imagenet(tmp_path, text, message):
    write_photographs(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "labels.csv").write_text(text)
    with pytest.raises(data.DataError, match=message):
        data.load("imagenet", root=tmp_path)


def test_an_image_that_would_grow_to_gigabytes_is_refused(tmp_path):
    """100 bytes of PNG can hold a strip of 100,000 pixels, or claim to."""
    write_photographs(tmp_path / "imagenet")
    images = tmp_path / "imagenet" / "images"
    Image.new("1", (100_000, 1)).save(images / "0.png")
    Image.new("1", (20_000, 20_000)).save(images / "1.png")
    assert (images / "0.png").stat().st_size < 200
    imagenet = data.load("imagenet", root=tmp_path)
    with pytest.raises(
        data.DataError, match="is 100000 x 1 pixels, too long a strip for a square of 224; leave it out"
    ):
        imagenet.batch([0])
    with pytest.raises(data.DataError, match=r"1\.png can't be decoded \(Image size .* exceeds limit"):
        imagenet.batch([1])
    imagenet.batch([2])


def test_a_link_to_an_image_elsewhere_is_followed(tmp_path):
    write_photographs(tmp_path / "imagenet")
    path = tmp_path / "imagenet" / "images" / "0.png"
    path.rename(tmp_path / "elsewhere.png")
    path.symlink_to(tmp_path / "elsewhere.png")
    assert len(data.load("imagenet", root=tmp_path).batch([0])) == 1


# Data of an attacker's own


def test_surrogates_are_drawn_once_each_and_never_what_is_left_out():
    digits = data.load("digits", split="train")
    surrogate = data.Surrogate(digits, without=(0, 7))
    images, labels = surrogate.draw(2000, torch.Generator().manual_seed(0))
    assert len(images) == len(labels) == len(digits) - 2
    assert len({image.numpy().tobytes() for image in images}) > 1100  # some digits occur twice in the data
    left_out = digits.batch([0, 7]).images
    assert not any((images == image).flatten(1).all(1).any() for image in left_out)
    few, again, other = (surrogate.draw(5, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(few, again) and not torch.equal(few, other)
    assert surrogate.hash != data.Surrogate(digits).hash
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="draw needs a number of images >= 1"):
            surrogate.draw(wrong, torch.Generator())
    with pytest.raises(ValueError, match="nothing of digits train is left to draw"):
        data.Surrogate(digits, without=tuple(range(1200))).draw(1, torch.Generator())


@pytest.mark.parametrize(("split", "folder"), [("test", "val"), ("train", "train")])
def test_imagenet_in_torchvisions_layout(tmp_path, split, folder):
    classes = tmp_path / "imagenet" / folder
    for i in range(1000):
        (classes / f"n{i:08d}").mkdir(parents=True)
    colour = np.full((256, 300, 3), (255, 0, 51), dtype=np.uint8)
    for i in (7, 993):
        Image.fromarray(colour).save(classes / f"n{i:08d}" / "a.JPEG", format="png")
    imagenet = data.load("imagenet", root=tmp_path, split=split)
    assert imagenet.labels.tolist() == [7, 993]
    assert (imagenet.origin, imagenet.class_names[7]) == ("torchvision", "cock")
    expected = torch.tensor([1, 0, 0.2])[:, None, None].expand(3, 224, 224)
    assert torch.allclose(imagenet.batch([1]).images[0], expected)


def test_imagenet_that_is_not_there_or_not_whole(tmp_path):
    with pytest.raises(data.DataError, match=r"torchvision can't download ImageNet; get it from image-net\.org"):
        data.load("imagenet", root=tmp_path)
    (tmp_path / "imagenet" / "val" / "n01440764").mkdir(parents=True)
    with pytest.raises(data.DataError, match="has 1 class folders, ImageNet has 1000"):
        data.load("imagenet", root=tmp_path)
    for i in range(999):
        (tmp_path / "imagenet" / "val" / f"n{i}").mkdir()
    with pytest.raises(data.DataError, match="hold no images"):
        data.load("imagenet", root=tmp_path)


# The real data


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("mnist", (20000, 2000)),
        ("cifar10", (20000, 2000)),
        ("cifar100", (6000, 2000)),
        ("faces", (280, 120)),
    ],
)
def test_real_packs(real_root, name, numbers):
    train, test = (data.load(name, split=split, root=real_root) for split in ("train", "test"))
    assert train.origin == test.origin == "data root pack"
    assert (len(train), len(test)) == numbers
    assert set(test.labels) == set(range(test.num_classes))
    assert test.image_shape == data.DATASETS[name].image_shape
    assert test.class_names is None or len(test.class_names) == test.num_classes
    check_mean_and_std(train)
    test.batch([0, len(test) - 1])


def test_real_imagenet(real_root):
    imagenet = data.load("imagenet", root=real_root)
    assert (len(imagenet), imagenet.origin) == (200, "data root pack")
    assert imagenet.batch([0, 199]).images.shape == (2, 3, 224, 224)
    with open(real_root / "imagenet" / "labels.csv", newline="") as table:
        names = [row["name"] for row in csv.DictReader(table)]
    assert names == [imagenet.class_names[label] for label in imagenet.labels]


# Images of one's own


def test_a_folder_an_image_and_class_folders_of_ones_own(tmp_path):
    for name, value in (("cats/b.png", 10), ("cats/a.jpg", 20), ("dogs/c.png", 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((12, 20, 3), value, np.uint8)).save(tmp_path / name)
    whole = data.load(f"folder:{tmp_path}", size=8)
    assert (whole.num_classes, whole.class_names, whole.image_shape) == (2, ("cats", "dogs"), (3, 8, 8))
    batch = whole.batch(range(3))
    assert batch.labels.tolist() == [0, 0, 1]
    assert (batch.images * 255).round()[:, 0, 0, 0].tolist() == [20, 10, 30]
    flat = data.load(f"folder:{tmp_path / 'cats'}")
    assert (len(flat), flat.num_classes, flat.image_shape) == (2, 10, (3, 32, 32))
    single = data.load(f"folder:{tmp_path / 'dogs' / 'c.png'}", size=8, split="train")
    assert single.batch([0]).labels.tolist() == [0] and single.origin == "folder"
    (tmp_path / "empty").mkdir()
    for path, message in (("empty", "has no images, and no folder a class"), ("none", "no image and no folder at")):
        with pytest.raises(data.DataError, match=message):
            data.load(f"folder:{tmp_path / path}")
