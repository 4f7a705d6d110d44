"""Metrics against independent implementations: scikit-image, brute force, and the lpips package itself."""

import errno
import itertools
import os
import sys
import urllib.error
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skimage.metrics
import torch
import torchvision
from scipy.ndimage import gaussian_filter
from torch.nn.functional import interpolate

from gi_lib import data, metrics
from gi_lib.types import Batch, Reconstruction


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """No download, and no network or warning remembered from another test."""

    def fetch(*args, **kwargs):
        raise AssertionError("a test tried to download")

    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", fetch)
    metrics._network.cache_clear()
    metrics._warn_missing.cache_clear()


@pytest.fixture
def real_root():
    if not os.environ.get("GI_DATA"):
        pytest.skip("needs LPIPS's real weights: set GI_DATA to a folder that has them")
    return data.root()


@pytest.fixture(scope="session")
def features():
    """Random AlexNet features by torchvision's names; they stand in for the real ones."""
    rng = torch.Generator().manual_seed(0)
    layers = ((0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3), (10, 256, 256, 3))
    state = {}
    for layer, rows, columns, side in layers:
        scale = (2 / (columns * side**2)) ** 0.5
        state[f"features.{layer}.weight"] = torch.randn(rows, columns, side, side, generator=rng) * scale
        state[f"features.{layer}.bias"] = torch.randn(rows, generator=rng) * 0.1
    return state


@pytest.fixture(scope="session")
def random_root(tmp_path_factory, features):
    pytest.importorskip("lpips", reason="needs the lpips package: pip install lpips")
    root = tmp_path_factory.mktemp("root")
    return write_features(root, features)


def write_features(root, state):
    path = root / metrics.ALEXNET_FEATURES
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path)
    return root


def pair(b=3, c=3, h=32, w=32, seed=0, noise=0.2):
    """(reconstructed, truth), the first being the second with noise."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.rand(b, c, h, w, generator=rng)
    return (truth + noise * torch.randn(truth.shape, generator=rng)).clamp(0, 1), truth


def reconstruction(images, labels=None):
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return Reconstruction(images=images, labels=labels, loss=0.0, trace=torch.zeros(1, 1))


def batch(images, labels=None):
    return Batch(images, torch.zeros(len(images), dtype=torch.int64) if labels is None else labels)


# Alignment


@pytest.mark.parametrize("b", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_align_is_the_best_of_all_permutations(b, seed):
    rng = torch.Generator().manual_seed(seed)
    guess, truth = torch.rand(2, b, 1, 4, 4, generator=rng, dtype=torch.float64)
    totals = {
        order: sum(((guess[j] - truth[i]) ** 2).mean().item() for i, j in enumerate(order))
        for order in itertools.permutations(range(b))
    }
    permutation = metrics.align(guess, truth)
    assert permutation.dtype == torch.int64
    assert tuple(permutation.tolist()) == min(totals, key=totals.get)


def test_align_undoes_a_shuffle():
    noisy, truth = pair(b=8)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    assert torch.equal(order[metrics.align(noisy[order], truth)], torch.arange(8))


def test_align_is_one_to_one_where_two_are_nearest_to_the_same():
    truth = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    guess = torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)  # both nearest to truth 0
    assert metrics.align(guess, truth).tolist() == [0, 1]
    assert metrics.align(guess.flip(0), truth).tolist() == [1, 0]


def test_align_equal_images():
    same = torch.full((3, 1, 4, 4), 0.5)
    assert sorted(metrics.align(same, same).tolist()) == [0, 1, 2]


# MSE, PSNR, SSIM


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (1, 112, 92)])
def test_mse_psnr_and_ssim_agree_with_scikit_image(shape):
    reconstructed, truth = pair(4, *shape)
    expected = {"mse": [], "psnr": [], "ssim": []}
    for a, b in zip(reconstructed, truth, strict=True):
        a, b = (image.permute(1, 2, 0).double().numpy() for image in (a, b))
        expected["mse"].append(skimage.metrics.mean_squared_error(b, a))
        expected["psnr"].append(skimage.metrics.peak_signal_noise_ratio(b, a, data_range=1))
        expected["ssim"].append(skimage.metrics.structural_similarity(b, a, data_range=1, channel_axis=-1))
    for name, values in expected.items():
        result = getattr(metrics, name)(reconstructed, truth)
        assert result.dtype == torch.float64
        assert result.shape == (4,)
        np.testing.assert_allclose(result.numpy(), values, rtol=1e-10)


@pytest.mark.parametrize(("side", "window"), [(6, 5), (5, 5), (4, 3), (3, 3)])
def test_ssim_of_images_smaller_than_its_window(side, window):
    reconstructed, truth = pair(2, 1, side, 9)
    expected = [
        skimage.metrics.structural_similarity(b[0].numpy(), a[0].numpy(), data_range=1, win_size=window)
        for a, b in zip(reconstructed.double(), truth.double(), strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(reconstructed, truth).numpy(), expected, rtol=1e-10)


def test_ssim_of_images_too_small_for_any_window():
    with pytest.raises(ValueError, match="SSIM needs 3 pixels a side or more"):
        metrics.ssim(*pair(2, 1, 2, 9))


def test_psnr_is_capped_image_by_image():
    truth = torch.full((4, 1, 8, 8), 0.5, dtype=torch.float64)
    error = torch.tensor([0, 1e-9, 1e-7, 0.1], dtype=torch.float64).reshape(4, 1, 1, 1)
    values = metrics.psnr(truth + error, truth)
    np.testing.assert_allclose(values.numpy(), [metrics.PSNR_CAP, metrics.PSNR_CAP, 140, 20], rtol=1e-6)


def test_psnr_resolves_the_smallest_float32_error():
    truth = torch.full((1, 1, 1, 1), 0.75)
    next_up = torch.nextafter(truth, torch.ones(1))
    assert metrics.psnr(next_up, truth).item() == pytest.approx(20 * np.log10(2**24), abs=1e-6)
    assert metrics.psnr(next_up, truth).item() < metrics.PSNR_CAP


def test_equal_images():
    _, truth = pair()
    assert metrics.mse(truth, truth).tolist() == [0] * 3
    assert metrics.psnr(truth, truth).tolist() == [metrics.PSNR_CAP] * 3
    assert metrics.ssim(truth, truth).tolist() == pytest.approx([1] * 3)


@pytest.mark.parametrize("metric", [metrics.align, metrics.mse, metrics.psnr, metrics.ssim, metrics.lpips])
def test_images_that_cannot_be_compared(metric):
    good, truth = pair()
    if metric is metrics.align:
        assert (metric(good[:2], truth) >= 0).sum() == 2 and len(metric(good, truth[:2])) == 2
        assert metric(good[:0], truth).tolist() == [-1, -1, -1]
    else:
        with pytest.raises(ValueError, match=r"of one shape, got \[2, 3, 32, 32\] against \[3, 3, 32, 32\]"):
            metric(good[:2], truth)
    with pytest.raises(ValueError, match=r"of one s(ize|hape), got \[3, 3, 32, 31\] against \[3, 3, 32, 32\]"):
        metric(good[..., 1:], truth)
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\]"):
        metric(good[0], truth[0])
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\]"):
        metric(good[:0], truth[:0])
    for value in (float("nan"), float("inf")):
        broken = good.clone()
        broken[1, 0, 0, 0] = value
        with pytest.raises(ValueError, match="1 of 3 images of the reconstruction have NaN or infinite pixels"):
            metric(broken, truth)
        with pytest.raises(ValueError, match="1 of 3 images of the truth have NaN or infinite pixels"):
            metric(good, broken)


def test_metrics_take_gradients_strides_and_half_precision():
    reconstructed, truth = pair()
    leaf = reconstructed.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2).requires_grad_()
    assert torch.equal(metrics.ssim(leaf, truth), metrics.ssim(reconstructed, truth))
    assert not metrics.mse(leaf, truth).requires_grad
    half = reconstructed.half()
    assert torch.equal(metrics.psnr(half, truth), metrics.psnr(half.double(), truth.double()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_metrics_take_tensors_of_any_device(random_root):
    reconstructed, truth = pair()
    here = metrics.evaluate(reconstruction(reconstructed), batch(truth), root=random_root)
    there = metrics.evaluate(reconstruction(reconstructed.cuda()), batch(truth.cuda()), root=random_root)
    for name in ("mse", "psnr", "ssim", "lpips", "permutation"):
        assert torch.equal(getattr(here, name), getattr(there, name))


# Labels


@pytest.mark.parametrize(
    ("predicted", "truth", "share"),
    [
        ([1, 2, 3], [3, 1, 2], 1.0),
        ([1, 1, 1], [1, 2, 3], 1 / 3),
        ([1, 2, 3], [1, 1, 1], 1 / 3),
        ([1, 1, 2, 2], [1, 2, 2, 2], 3 / 4),
        ([0], [1], 0.0),
    ],
)
def test_label_accuracy_compares_multisets(predicted, truth, share):
    assert metrics.label_accuracy(torch.tensor(predicted), torch.tensor(truth)) == share


@pytest.mark.parametrize("predicted", [[1, 2, 3], torch.zeros(3, 10), torch.zeros(3)], ids=str)
def test_label_accuracy_of_what_are_no_labels(predicted):
    with pytest.raises(ValueError, match=r"labels must be a list of whole numbers \[N\]"):
        metrics.label_accuracy(predicted, torch.tensor([1, 2, 3]))


# evaluate


def test_evaluate_gives_every_metric_the_same_pairs(random_root):
    noisy, truth = pair(b=4)
    order = torch.tensor([2, 0, 3, 1])
    labels = torch.tensor([5, 6, 7, 7])
    scores = metrics.evaluate(
        reconstruction(noisy[order], torch.tensor([7, 6, 1, 7])), batch(truth, labels), root=random_root
    )
    assert torch.equal(order[scores.matched], torch.arange(4))
    assert torch.equal(scores.floor, metrics.floor(truth)) and scores.returned == 4
    for name in ("mse", "psnr", "ssim"):
        assert torch.equal(getattr(scores, name), getattr(metrics, name)(noisy, truth))
    assert torch.equal(scores.lpips, metrics.lpips(noisy, truth, root=random_root))
    assert scores.label_accuracy == 3 / 4
    assert "mean over 4 of 4 images; recovered" in str(scores)


def test_evaluate_clips_rounding_once_and_changes_nothing(random_root):
    noisy, truth = pair()
    wild = noisy * (1 + 2e-6) - 1e-6
    before = wild.clone()
    scores = metrics.evaluate(reconstruction(wild), batch(truth), root=random_root)
    clipped = metrics.evaluate(reconstruction(wild.clamp(0, 1)), batch(truth), root=random_root)
    assert torch.equal(wild, before) and wild.min() < 0
    for name in ("mse", "psnr", "ssim", "lpips", "matched"):
        assert torch.equal(getattr(scores, name), getattr(clipped, name))


def test_a_reconstruction_outside_the_range_or_that_diverged_is_refused():
    noisy, _ = pair()
    for wild, message in (
        (noisy + 1, r"images in \[0, 1\], got 1 to 2; clamp them"),
        (noisy * torch.nan, "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruction(wild)


def test_fewer_images_than_there_are_leave_the_rest_missed(random_root):
    """No decibels for it, but the recall counts it."""
    _, truth = pair(b=4)
    rec = replace(reconstruction(truth[[2, 0]]), labels=None)
    scores = metrics.evaluate(rec, batch(truth), root=random_root)
    assert scores.matched.tolist() == [1, -1, 0, -1]
    for values in (scores.psnr, scores.ssim, scores.lpips, scores.mse):
        assert values.isnan().tolist() == [False, True, False, True]
    assert scores.psnr[0] == metrics.PSNR_CAP and scores.recovered.tolist() == [True, False, True, False]
    assert (scores.recall, scores.precision, scores.label_accuracy, scores.returned) == (0.5, 1.0, None, 2)
    assert "labels unknown (mean over 2 of 4 images; recovered 2, returned 2)" in str(scores)


def test_more_images_than_there_are_lower_the_precision(random_root):
    noisy, truth = pair(b=4)
    scores = metrics.evaluate(reconstruction(torch.cat([noisy, truth])), batch(truth[:3]), root=random_root)
    assert scores.matched.tolist() == [4, 5, 6] and scores.returned == 8
    assert (scores.recall, scores.precision) == (1.0, 3 / 8)


def test_nothing_returned_is_all_missed(random_root):
    _, truth = pair()
    none = replace(reconstruction(truth), images=truth[:0], labels=None)
    scores = metrics.evaluate(none, batch(truth), root=random_root)
    assert scores.psnr.isnan().all() and (scores.recall, scores.precision, scores.returned) == (0.0, None, 0)
    assert "PSNR missing dB" in str(scores)


@pytest.mark.parametrize(("shape", "missing"), [((2, 8, 8), "lpips"), ((3, 2, 8), "ssim"), ((5, 1, 1), "ssim")])
def test_a_metric_that_does_not_apply_is_none_and_the_others_are_there(random_root, shape, missing):
    noisy, truth = pair(2, *shape)
    scores = metrics.evaluate(reconstruction(noisy), batch(truth), root=random_root)
    assert getattr(scores, missing) is None and scores.psnr.isfinite().all()
    assert (scores.ssim is None) == (min(shape[1:]) < 3) and (scores.lpips is None) == (shape[0] not in (1, 3))


def test_the_floor_is_the_mean_colour_and_recovered_is_half_its_error():
    _, truth = pair()
    mean = truth.mean((2, 3), keepdim=True).expand_as(truth)
    torch.testing.assert_close(metrics.floor(truth), metrics.psnr(mean, truth))
    for share, recovered in ((0.49, True), (0.51, False)):
        near = truth + share * (mean - truth)
        assert metrics.evaluate(reconstruction(near), batch(truth), download=False).recovered.all() == recovered
    mixture = (truth + truth.roll(1, 0)) / 2
    assert not metrics.evaluate(reconstruction(mixture), batch(truth), download=False).recovered.any()


def test_candidates_of_another_shape_are_refused():
    noisy, truth = pair()
    for candidates in (truth[..., 1:], truth[0], truth[:0], truth[:, :1]):
        with pytest.raises(ValueError, match="candidates must be images .* as large as those of the truth"):
            metrics.identified(noisy, truth, candidates)


# LPIPS


def package_lpips(monkeypatch, state):
    """The lpips package's own network, which it builds from a torchvision AlexNet that has `state`."""
    package = pytest.importorskip("lpips")
    alexnet = torchvision.models.alexnet(weights=None)
    alexnet.features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    monkeypatch.setattr(package.pretrained_networks.tv, "alexnet", lambda pretrained: alexnet)
    return package.LPIPS(net="alex", verbose=False)


def package_values(network, reconstructed, truth):
    with torch.no_grad():
        return network(2 * reconstructed - 1, 2 * truth - 1).flatten().double()


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 48), (1, 32, 32), (3, 28, 28), (1, 8, 8), (1, 20, 30)])
def test_lpips_equals_the_package(random_root, features, monkeypatch, shape):
    reconstructed, truth = pair(2, *shape)
    value = metrics.lpips(reconstructed, truth, root=random_root)
    size = {(28, 28): (32, 32), (8, 8): (32, 32), (20, 30): (32, 48)}.get(shape[1:], shape[1:])
    prepared = [
        interpolate(image.repeat(1, 3 // shape[0], 1, 1), size=size, mode="bilinear", align_corners=False)
        for image in (reconstructed, truth)
    ]
    expected = package_values(package_lpips(monkeypatch, features), *prepared)
    assert value.dtype == torch.float64
    assert (expected > 0).all()
    np.testing.assert_allclose(value.numpy(), expected.numpy(), rtol=1e-5)


def blurred(images, sigma):
    return torch.from_numpy(gaussian_filter(images.numpy(), sigma=(0, 0, sigma, sigma)))


@pytest.mark.parametrize("weights", ["random_root", "real_root"])
def test_lpips_is_zero_on_equal_images_and_grows_with_blur(weights, request):
    root = request.getfixturevalue(weights)
    images = data.load("photos", size=64).batch(range(7)).images
    assert metrics.lpips(images, images, root=root).tolist() == [0] * 7
    values = [metrics.lpips(blurred(images, sigma), images, root=root) for sigma in (0.5, 1, 2, 4)]
    for less, more in itertools.pairwise(values):
        assert (less < more).all()


def test_lpips_with_the_real_weights_equals_the_package(real_root, monkeypatch):
    reconstructed = data.load("photos").batch([0, 1]).images
    truth = data.load("photos").batch([7, 8]).images
    state = safetensors.torch.load_file(real_root / metrics.ALEXNET_FEATURES)
    expected = package_values(package_lpips(monkeypatch, state), reconstructed, truth)
    np.testing.assert_allclose(metrics.lpips(reconstructed, truth).numpy(), expected.numpy(), rtol=1e-5)


def test_lpips_has_no_side_effects(random_root, capfd):
    before, filters = torch.get_rng_state(), list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.lpips(*pair(), root=random_root)
    assert torch.equal(torch.get_rng_state(), before)
    assert warnings.filters == filters
    assert capfd.readouterr() == ("", "")


def test_lpips_of_two_channels():
    with pytest.raises(ValueError, match="LPIPS needs 1 or 3 channels, got 2"):
        metrics.lpips(*pair(c=2))


# LPIPS that can't be had is missing: never a number from a random network


def missing(root, **kwargs):
    """The one warning that a missing LPIPS gives."""
    with pytest.warns(UserWarning, match="LPIPS is missing") as record:
        for _ in range(3):
            assert metrics.lpips(*pair(), root=root, **kwargs) is None
    assert len(record) == 1
    assert "`gi score` fills the values in later" in str(record[0].message)
    return str(record[0].message)


def test_lpips_without_weights_or_download(tmp_path):
    assert f"there is no {tmp_path / metrics.ALEXNET_FEATURES}" in missing(tmp_path)
    scores = metrics.evaluate(reconstruction(pair()[0]), batch(pair()[1]), root=tmp_path)
    assert scores.lpips is None
    assert "LPIPS missing" in str(scores)


def test_lpips_with_a_data_root_that_is_not_there(tmp_path):
    assert "nowhere, given as root, is not a folder" in missing(tmp_path / "nowhere")


def test_lpips_without_the_package(random_root, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "the lpips package is not installed (pip install lpips)" in missing(random_root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: alter(path, lambda s: s.pop("features.3.bias")), "does not hold AlexNet's features"),
        (
            lambda path: alter(path, lambda s: s.update({"features.4.bias": s["features.3.bias"]})),
            "does not hold",
        ),
        (lambda path: alter(path, lambda s: s.update({"features.3.bias": torch.zeros(1)})), "does not hold"),
        (lambda path: alter(path, lambda s: s.update({"features.odd": torch.zeros(1)})), "does not hold"),
    ],
)
def test_lpips_with_damaged_weights(tmp_path, features, damage, message):
    pytest.importorskip("lpips")
    damage(write_features(tmp_path, features) / metrics.ALEXNET_FEATURES)
    assert message in missing(tmp_path)


def alter(path, change):
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file({key: tensor.clone() for key, tensor in state.items()}, path)


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("Name or service not known"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError('invalid hash value (expected "7be5be79")'),
    ],
)
def test_lpips_whose_download_fails_is_asked_for_once(tmp_path, monkeypatch, failure):
    pytest.importorskip("lpips")
    calls = []

    def fetch(self, **kwargs):
        calls.append(kwargs)
        raise failure

    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", fetch)
    assert "could not be downloaded" in missing(tmp_path, download=True)
    assert len(calls) == 1
    assert calls[0]["weights_only"]


def test_lpips_by_download_equals_lpips_from_the_data_root(tmp_path, random_root, features, monkeypatch):
    whole = features | {"classifier.6.bias": torch.zeros(1000)}
    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", lambda self, **kwargs: whole)
    values = metrics.lpips(*pair(), root=tmp_path, download=True)
    assert torch.equal(values, metrics.lpips(*pair(), root=random_root))
    assert list(Path(tmp_path).iterdir()) == []


def test_an_image_is_identified_when_no_candidate_is_nearer(rng):
    pool = torch.rand(20, 1, 6, 6, generator=rng)
    near, far = (pool[3] + 0.01).clamp(0, 1), pool[7]
    found = metrics.identified(torch.stack([near, far, pool[5]]), pool[[3, 4, 5]], pool)
    assert found.tolist() == [True, False, True]


def test_evaluate_identifies_what_it_matched(rng):
    pool = torch.rand(20, 1, 6, 6, generator=rng)
    rebuilt = torch.stack([pool[7], (pool[3] + 0.01).clamp(0, 1)])
    truth = Batch(pool[[3, 4, 7]], torch.tensor([0, 1, 2]))
    scores = metrics.evaluate(Reconstruction(rebuilt, None, 0.0), truth, candidates=pool)
    assert scores.identified.tolist() == [True, False, True] and scores.matched.tolist() == [1, -1, 0]
    assert metrics.evaluate(Reconstruction(rebuilt, None, 0.0), truth).identified is None
    nothing = metrics.evaluate(Reconstruction(rebuilt[:0], None, 0.0), truth, candidates=pool)
    assert nothing.identified.tolist() == [False] * 3


@pytest.mark.parametrize(("size", "returned"), [(1, 1), (8, 8), (8, 3), (4, 16)])
def test_chance_bounds_what_pictures_of_nothing_identify(rng, size, returned):
    """Noise, which is about as diverse as pictures get: the bound holds, and is no more than a third too high."""
    pool, rounds = torch.rand(100, 3, 8, 8, generator=rng), 4000 // size
    hits = 0
    for _ in range(rounds):
        truth = pool[torch.randperm(100, generator=rng)[:size]]
        noise = torch.rand(returned, 3, 8, 8, generator=rng)
        hits += int(metrics.found(noise, metrics.align(noise, truth), truth, pool).sum())
    share, bound = hits / (rounds * size), metrics.chance(1 / 100, returned)
    error = 3 * (bound / (rounds * size)) ** 0.5
    assert 0.6 * bound - error < share < bound + error


def test_chance_of_pictures_that_are_all_alike_is_that_of_one(rng):
    pool = torch.rand(40, 3, 4, 4, generator=rng)
    hits = 0
    for _ in range(400):
        truth, grey = pool[torch.randperm(40, generator=rng)[:8]], torch.full((8, 3, 4, 4), 0.5)
        hits += int(metrics.found(grey, metrics.align(grey, truth), truth, pool).sum())
    assert 0.015 < hits / 3200 <= 0.035  # one in 40
    assert metrics.chance(1 / 40, 8) == 0.2 and metrics.chance(1 / 40, 50) == 1.0 and metrics.chance(1 / 40, 0) == 0.0
