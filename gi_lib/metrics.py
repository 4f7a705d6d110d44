"""How close a reconstruction is to the truth: one definition of each metric, one value an image.

Images are [B, C, H, W] in [0, 1], on any device and of any float type; values are computed on the CPU in
float64 (LPIPS in float32) and come back as [B] float64 tensors. `evaluate` clips and matches once, and gives
every metric the same pairs; the metrics themselves compare image i with image i and clip nothing.

A number means something against its floor, the PSNR of the image's own mean colour: what an attacker could reach who
found out no more than that.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gi_lib import data
from gi_lib.types import Batch, Reconstruction, Scores

Values = Float[Tensor, "B"]
Permutation = Int[Tensor, "B"]
Found = Bool[Tensor, "B"]

PSNR_CAP = 150.0
"""The highest PSNR of one image, in dB. An exact image's is infinite and would make any mean infinite. 150 dB
is an error of 3e-8 (root mean square), half of float32's spacing below 1: more is rounding, not quality."""

RECOVERED = 6.0
"""An image counts as recovered from so many dB above its floor on: the error is then half of what it is for the
image's mean colour (root mean square), and an even mixture of two images is not enough."""

revision = 1
"""Raised when the meaning of a metric changes, so that all cases run again."""

SSIM_WINDOW = 7
LPIPS_SIDE = 32
ALEXNET_FEATURES = Path("weights", "lpips", "alexnet_features.safetensors")
# Layer of torchvision's `alexnet().features` -> the slice of the lpips package's network that holds it.
LPIPS_SLICES = {"0": 1, "3": 2, "6": 3, "8": 4, "10": 5}


def align(reconstructed: Tensor, truth: Tensor) -> Permutation:
    """The one-to-one assignment of least total MSE, [B] int64: image result[i] goes with truth i.

    Of N reconstructions min(N, B) are assigned; -1 where nothing is left for an image of the truth.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    reconstructed, truth = _comparable(reconstructed, truth)
    found = torch.full((len(truth),), -1)
    if len(reconstructed):
        cost = torch.stack([(reconstructed - image).square().flatten(1).mean(dim=1) for image in truth])
        rows, columns = linear_sum_assignment(cost.numpy())
        found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found


def floor(truth: Tensor) -> Values:
    """PSNR of each image's own mean colour, the mean over the pixels of each channel, [B] in dB."""
    _, truth = _comparable(truth, truth)
    return psnr(truth.mean((-2, -1), keepdim=True).expand_as(truth), truth)


def mse(reconstructed: Tensor, truth: Tensor) -> Values:
    """Mean over pixels and channels of (x' - x)^2, [B]. Lower is better."""
    reconstructed, truth = _pair(reconstructed, truth)
    return (reconstructed - truth).square().flatten(1).mean(dim=1)


def psnr(reconstructed: Tensor, truth: Tensor) -> Values:
    """-10 log10(MSE), the peak being 1, [B] in dB, at most PSNR_CAP. Higher is better."""
    return (-10 * torch.log10(mse(reconstructed, truth))).clamp(max=PSNR_CAP)


def ssim(reconstructed: Tensor, truth: Tensor) -> Values:
    """Structural similarity (Wang et al. 2004) as scikit-image defines it, channels averaged, [B] in [-1, 1].

    The window is scikit-image's default, 7x7 and uniform; a smaller image takes the largest odd window that
    fits it.

    Raises:
        ValueError: an image has a side under 3 pixels.
    """
    from skimage.metrics import structural_similarity  # slow to import

    reconstructed, truth = _pair(reconstructed, truth)
    side = min(truth.shape[-2:])
    if side < 3:
        raise ValueError(f"SSIM needs 3 pixels a side or more, got images {list(truth.shape)}; enlarge them")
    window = min(SSIM_WINDOW, side - 1 + side % 2)
    values = [
        structural_similarity(a, b, data_range=1.0, channel_axis=0, win_size=window)
        for a, b in zip(reconstructed.numpy(), truth.numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def lpips(
    reconstructed: Tensor, truth: Tensor, *, root: str | Path | None = None, download: bool = False
) -> Values | None:
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924), AlexNet v0.1, [B]. Lower is better.

    The network is the `lpips` package's, with the package's own linear weights. AlexNet's weights come from
    `<root>/weights/lpips/alexnet_features.safetensors`, else from torchvision's download, where `download` asks for
    it. Grey images are repeated to three channels; images with a side under 32 pixels are enlarged, bilinearly, until
    it has 32.

    Returns:
        The distances, or None, with one warning in a process, where the package or the weights can't be had.
        The network is never a random one.

    Raises:
        ValueError: images that have neither 1 nor 3 channels.
    """
    pair = _pair(reconstructed, truth)
    if truth.shape[1] not in (1, 3):
        raise ValueError(f"LPIPS needs 1 or 3 channels, got {truth.shape[1]}; choose three of them")
    network = _network_at(root, download)
    if isinstance(network, str):
        _warn_missing(network)
        return None
    with torch.no_grad():
        return network(*map(_perceivable, pair), normalize=True).flatten().double()


def identified(reconstructed: Tensor, truth: Tensor, candidates: Tensor) -> Found:
    """Whether no candidate [N, C, H, W] is nearer to a reconstruction than its true image, by MSE.

    The share of images for which it is, is the image identification precision of Yin et al. (CVPR 2021), who
    compare features of a network in place of pixels.
    """
    reconstructed, truth = _pair(reconstructed, truth)
    if (
        not isinstance(candidates, Tensor)
        or candidates.is_complex()
        or candidates.ndim != 4
        or candidates.shape[1:] != truth.shape[1:]
        or len(candidates) == 0
    ):
        raise ValueError(
            f"candidates must be images [N, {', '.join(map(str, truth.shape[1:]))}], as large as those of the truth,"
            f" got {list(getattr(candidates, 'shape', ()))}; load them at the same size"
        )
    own, others = mse(reconstructed, truth), candidates.detach().cpu().double().flatten(1)
    nearest = torch.cdist(reconstructed.flatten(1), others, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    nearest = nearest.square() / others.shape[1]
    return own <= nearest * (1 + 1e-9)  # the true image is a candidate too, whose sum may be rounded otherwise


def found(images: Tensor, matched: Permutation, truth: Tensor, candidates: Tensor) -> Found:
    """Whether each image of the truth is identified by the one of `images` that `align` gave it; no missed one is."""
    hit = matched >= 0
    values = torch.zeros(len(truth), dtype=torch.bool)
    if hit.any():
        values[hit] = identified(images[matched[hit]].clamp(0, 1), truth[hit], candidates)
    return values


def chance(of_one: float, returned: int) -> float:
    """How often a private image is identified at most, where pictures that tell nothing of it are returned.

    Each picture has one nearest candidate, and each of N candidates is the private image as often as any other. R
    pictures have at most R nearest ones, so the image is among them with probability min(1, R / N) at most. Identified
    is one of them only if it is matched with such a picture. Pictures that are all alike come to 1 / N; eight of noise
    among 100 candidates to about .07.

    Args:
        of_one: 1 / N, for N candidates, of which the image is one.
        returned: R, not the batch size: an attack may return more pictures or fewer.
    """
    return min(1.0, of_one * returned)


def label_accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Share of the true labels that were found, order aside: |predicted and truth, as multisets| / B."""
    for labels in (predicted, truth):
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            said = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be a list of whole numbers [N], got {said}; take the argmax of soft labels")
    if len(truth) == 0:
        raise ValueError("there are no true labels to find")
    found = Counter(predicted.tolist()) & Counter(truth.tolist())
    return found.total() / len(truth)


def evaluate(
    reconstruction: Reconstruction,
    batch: Batch,
    *,
    candidates: Tensor | None = None,
    root: str | Path | None = None,
    download: bool = False,
) -> Scores:
    """Score a reconstruction against the true batch.

    The reconstruction is clipped to [0, 1] once and matched one to one with the truth by least MSE, and every
    metric uses these pairs: entry i of each score belongs to image i of `batch`. Where fewer images were returned
    than there are, the rest is missed, and has no value. A metric that does not apply to the images is None.

    Args:
        candidates: [N, C, H, W], among which each reconstruction must find its own image to count as identified.
        root: where LPIPS looks for its weights; see `data.root`.
        download: let torchvision download AlexNet for LPIPS, where the data root has no weights.

    Raises:
        ValueError: the images have other shapes, or a pixel of the reconstruction is NaN or infinite.
    """
    images, truth = _comparable(reconstruction.images, batch.images)
    images = images.clamp(0, 1)
    matched = align(images, truth)
    hit = matched >= 0
    pair = images[matched[hit]], truth[hit]

    def spread(metric: Callable[..., Values | None], **settings: Any) -> Values | None:
        """[B], NaN where an image is missed; None where the metric can't be had."""
        values = metric(*pair, **settings) if hit.any() else torch.empty(0, dtype=torch.float64)
        if values is None:
            return None
        return torch.full((len(truth),), torch.nan, dtype=torch.float64).masked_scatter(hit, values)

    own, decibels, squares = floor(truth), spread(psnr), spread(mse)
    assert decibels is not None and squares is not None
    return Scores(
        mse=squares,
        psnr=decibels,
        floor=own,
        ssim=spread(ssim) if min(truth.shape[-2:]) >= 3 else None,
        lpips=spread(lpips, root=root, download=download) if truth.shape[1] in (1, 3) else None,
        recovered=decibels >= own + RECOVERED,  # NaN is not
        returned=len(images),
        label_accuracy=None if reconstruction.labels is None else label_accuracy(reconstruction.labels, batch.labels),
        matched=matched,
        identified=None if candidates is None else found(images, matched, truth, candidates),
    )


def _comparable(reconstructed: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU: [N, C, H, W] and [B, C, H, W], N may be 0."""
    for name, images in (("reconstruction", reconstructed), ("truth", truth)):
        if not isinstance(images, Tensor) or images.ndim != 4 or images.is_complex():
            said = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be [B, C, H, W], tensors of numbers; the {name} is {said}")
    if truth.numel() == 0 or reconstructed.shape[1:] != truth.shape[1:]:
        raise ValueError(
            f"images must be [B, C, H, W] and of one size, got {list(reconstructed.shape)} against"
            f" {list(truth.shape)}; the attack must return images as large as those of the batch"
        )
    for name, images in (("reconstruction", reconstructed), ("truth", truth)):
        broken = ~torch.isfinite(images).flatten(1).all(dim=1)
        if broken.any():
            raise ValueError(
                f"{int(broken.sum())} of {len(images)} images of the {name} have NaN or infinite"
                " pixels and can't be scored; if the attack diverged, lower its learning rate or give it more"
                " restarts"
            )
    return reconstructed.detach().cpu().double(), truth.detach().cpu().double()


def _pair(reconstructed: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """As `_comparable`, and as many of one as of the other."""
    if isinstance(reconstructed, Tensor) and isinstance(truth, Tensor) and reconstructed.shape != truth.shape:
        raise ValueError(
            f"images must be [B, C, H, W] and of one shape, got {list(reconstructed.shape)} against"
            f" {list(truth.shape)}; compare image i with image i"
        )
    return _comparable(reconstructed, truth)


def _perceivable(images: Tensor) -> Tensor:
    """[B, 3, H, W] float32, both sides 32 or more."""
    images = images.float().expand(-1, 3, -1, -1)
    scale = LPIPS_SIDE / min(images.shape[-2:])
    if scale <= 1:
        return images
    size = [round(scale * side) for side in images.shape[-2:]]
    return nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _network_at(root: str | Path | None, download: bool) -> nn.Module | str:
    """The network, or why there is none."""
    try:
        file = data.root(root) / ALEXNET_FEATURES
    except FileNotFoundError as error:
        return str(error)
    if file.is_file():
        return _network(file)
    if not download:
        return f"there is no {file}, and the download is off"
    return _network(None)


@functools.cache
def _network(file: Path | None) -> nn.Module | str:
    """LPIPS with AlexNet from `file`, else from a download, or why there is none; built once a process."""
    try:
        import lpips as package  # not needed by anything else
    except ImportError:
        return "the lpips package is not installed (pip install lpips)"
    try:
        state = safetensors.torch.load_file(file) if file else _downloaded_alexnet()
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # URLError is an OSError
        where = f"{file} is damaged" if file else "AlexNet's weights could not be downloaded"
        return f"{where} ({error})"
    # The package builds a random AlexNet before ours goes in, so shield the caller's random state; and it
    # uses an argument that torchvision has deprecated.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    try:
        network.net.load_state_dict(
            {_slice_name(key): tensor for key, tensor in state.items() if key.startswith("features.")}
        )
    except (KeyError, ValueError, RuntimeError) as error:
        return f"{file or 'the download'} does not hold AlexNet's features ({error})"
    return network.eval().requires_grad_(False)


def _slice_name(key: str) -> str:
    """torchvision's name of an AlexNet weight -> the lpips package's: features.3.bias -> slice2.3.bias."""
    _, layer, kind = key.split(".")
    return f"slice{LPIPS_SLICES[layer]}.{layer}.{kind}"


def _downloaded_alexnet() -> dict[str, Tensor]:
    from torchvision.models import AlexNet_Weights

    weights = AlexNet_Weights.IMAGENET1K_V1
    return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))


@functools.cache
def _warn_missing(why: str) -> None:
    warnings.warn(
        f"LPIPS is missing: {why}. It needs the lpips package, and AlexNet's features at {ALEXNET_FEATURES}"
        " in the data root or by download; `gi score` fills the values in later",
        stacklevel=3,
    )
