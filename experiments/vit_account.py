"""What the gradient of a vision transformer tells about its image, and what the cosine distance makes of it.

For CIFAR-10's test images, image i with the network of seed i. Each token of `vit` has a learned position, so that the
gradient holds, with delta_p the error signal of patch x_p,

    dL/dE = sum_p delta_p x_p^T   (embedding, 192 x 48)      and      dL/dposition_p = delta_p.

Parts, one row each and network:

    tokens    how alike the delta_p are, and how uniform the attention is
    closed    x from the linear system above, also from a noisy gradient
    attack    Inverting Gradients: PSNR, and the error of the mean patch and of single patches
    shares    how much of J = dg/dz, at the true image z as the network sees it, lies on the mean patch
    jacobian  the same and the spectrum, from all columns of J

Nothing here is a Case: the rows go to a file of their own, in a folder that `results.read` does not look into.

    python experiments/vit_account.py --parts tokens closed --networks untrained sharp --images 0 1 2 3
    python experiments/vit_account.py --parts jacobian --networks untrained cnn6 lenet --size 16
    python experiments/vit_account.py --parts train tokens closed shares --networks trained

On one core of an EPYC the columns of J take .1 s each for `vit`, 352 of them for `shares` with 128 probes; 100 steps of
the attack take 16 s.
"""

import argparse
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gi_lib import Client, ThreatModel, checkpoints, data, metrics, models, observe, provenance, results
from gi_lib.attacks import InvertingGradients
from gi_lib.copies import attackers_copy
from gi_lib.data import Dataset
from gi_lib.execution import clock, second_derivatives
from gi_lib.types import Batch, Classifier, Gradient

SIDE = 4
"""Of a patch at this resolution."""

OUT = Path("results/accounts/vit.jsonl")
BUCKETS = 16384
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PARTS = ("tokens", "closed", "shares", "attack", "jacobian")
NOISES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


# ------------------------------------------------------------------------------------------------- networks


def build(name: str, dataset: Dataset, seed: int, initialise: Callable | None = None) -> Classifier:
    """`models.build` with the dataset's normalisation; `initialise` draws the dense layers and the convolution anew."""
    shape = {"num_classes": dataset.num_classes, "image_shape": dataset.image_shape}
    net = models.build(name, **shape, seed=seed, mean=dataset.mean, std=dataset.std)
    rng = torch.Generator().manual_seed(seed)
    for layer in net.modules() if initialise else ():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            initialise(layer, rng)
    return net


@torch.no_grad()
def sharpened(net: Classifier, factor: float) -> Classifier:
    """The same network, in place, with queries and keys times `factor`: attention logits grow by its square."""
    for block in net.net.blocks:
        qkv = block.attention.qkv
        kept = len(qkv.weight) * 2 // 3
        qkv.weight[:kept] *= factor
        qkv.bias[:kept] *= factor
    return net


@torch.no_grad()
def placed(net: Classifier, factor: float) -> Classifier:
    """The same network, in place, with its positions and its class token times `factor`."""
    net.net.tokens.position *= factor
    net.net.tokens.first *= factor
    return net


def train(seconds: float, dataset: str = "cifar10", seed: int = 0) -> tuple[Classifier, dict]:
    """A vit trained by AdamW (rate 5e-4, batches of 32, mirrored at random) until its CPU time is spent."""
    own = data.load(dataset, split="train")
    net, rng = build("vit", own, seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-4, weight_decay=0.05)
    begin, steps = clock("cpu"), 0
    net.train()
    while clock("cpu") - begin < seconds:
        batch = own.batch(torch.randint(len(own), (32,), generator=rng).tolist())
        images = batch.images.flip(3) if torch.rand((), generator=rng) < 0.5 else batch.images
        optimiser.zero_grad()
        F.cross_entropy(net(images), batch.labels).backward()
        for group in optimiser.param_groups:
            group["lr"] = 5e-4 * min(1, (steps + 1) / 50)
        optimiser.step()
        steps += 1
    return net.eval(), {"steps": steps, "images": 32 * steps, "rate": 5e-4, "cpu_seconds": seconds}


@torch.no_grad()
def accuracy(net: Classifier, dataset: Dataset, first: int = 1000) -> float:
    """On the first test images."""
    batch = dataset.batch(range(min(first, len(dataset))))
    guesses = torch.cat([net(part).argmax(1) for part in batch.images.split(100)])
    return (guesses == batch.labels).double().mean().item()


NETWORKS: dict[str, Callable[[Dataset, int], Classifier]] = {
    "untrained": lambda d, seed: build("vit", d, seed),
    "sharp": lambda d, seed: sharpened(build("vit", d, seed), 8),
    "wide": lambda d, seed: build("vit", d, seed, models.torch_default),
    "no positions": lambda d, seed: placed(build("vit", d, seed), 0),
    "large positions": lambda d, seed: placed(build("vit", d, seed), 10),
    "lenet": lambda d, seed: build("lenet", d, seed),
    "cnn6": lambda d, seed: build("cnn6", d, seed),
}
"""Name -> (dataset, seed) -> network. `trained` comes from a checkpoint."""


# ------------------------------------------------------------------------------------------------- patches


def cut(images: Tensor) -> Tensor:
    """[B, C, H, W] -> its patches [B, N, 16 C], in the order in which the network's convolution reads them."""
    return F.unfold(images, SIDE, stride=SIDE).transpose(1, 2)


def joined(patches: Tensor, side: int) -> Tensor:
    """The inverse: [B, N, 16 C] -> [B, C, side, side]."""
    return F.fold(patches.transpose(1, 2), (side, side), SIDE, stride=SIDE)


def tiled(images: Tensor) -> Tensor:
    """Each image with all its patches replaced by their mean."""
    patches = cut(images)
    return joined(patches.mean(1, keepdim=True).expand_as(patches), images.shape[-1])


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


# ------------------------------------------------------------------------------------------------- the parts


def closed_form(gradient: Gradient, net: Classifier, side: int) -> Tensor:
    """The image [1, C, side, side] from dL/dE = sum_p delta_p x_p^T and delta_p = dL/dposition_p, by least squares."""
    delta = gradient["net.tokens.position"][0, 1:].double()
    G = gradient["net.patches.weight"].flatten(1).double()
    x = torch.linalg.lstsq(delta.T, G, driver="gelsd").solution
    image = joined(x[None], side) * net.std.view(-1, 1, 1).double() + net.mean.view(-1, 1, 1).double()
    return image.clamp(0, 1)


def noisy(gradient: Gradient, relative: float, rng: torch.Generator) -> Gradient:
    """The gradient plus Gaussian noise whose expected norm is `relative` times that of the whole gradient."""
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient.values()))
    std = relative * norm / math.sqrt(sum(g.numel() for g in gradient.values()))
    return {name: g + std * torch.randn(g.shape, generator=rng, dtype=g.dtype) for name, g in gradient.items()}


def closed(net: Classifier, batch: Batch, seed: int) -> dict:
    gradient = observe(net, batch, rng=torch.Generator().manual_seed(seed)).gradient
    truth, rows = batch.images.double(), []
    for relative in NOISES:
        sent = noisy(gradient, relative, torch.Generator().manual_seed(seed)) if relative else gradient
        found = closed_form(sent, net, truth.shape[-1])
        error = (cut(found).mean(1) - cut(truth).mean(1)).square().mean().sqrt().item()
        rows.append({"noise": relative, "psnr": metrics.psnr(found, truth).item(), "mean_patch_error": error})
    return {"closed": rows}


def tokens(net: Classifier, batch: Batch, seed: int) -> dict:
    """The attention's entropy over that of uniform attention, and the error signals delta_p of the patches."""
    entropies, largest, hooks = [], [], []

    def ran(layer, inputs, output):
        q, k, _ = layer.qkv(inputs[0]).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)[0].double()
        entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1) / math.log(weights.shape[-1])
        entropies.append(entropy.mean().item())
        largest.append((weights.amax(-1) * weights.shape[-1]).mean().item())

    embedded: list[Tensor] = []
    hooks = [block.attention.register_forward_hook(ran) for block in net.net.blocks]
    hooks.append(net.net.tokens.register_forward_hook(lambda layer, inputs, output: embedded.append(output[0, 1:])))
    with torch.no_grad():
        net(batch.images)
    for hook in hooks:
        hook.remove()
    gradient = observe(net, batch, rng=torch.Generator().manual_seed(seed)).gradient
    delta = gradient["net.tokens.position"][0, 1:].double()
    s = torch.linalg.svdvals(delta)
    common = delta.mean(0)
    sizes, spread = delta.norm(dim=1), embedded[0].double().std(1)
    total = sum(g.double().square().sum().item() for g in gradient.values())
    share = {
        "position of patches": delta.square().sum().item(),
        "embedding": gradient["net.patches.weight"].double().square().sum().item(),
    }
    return {
        "attention_entropy": entropies,
        "attention_largest": largest,
        "signal_cosine": torch.cosine_similarity(delta, common[None], dim=1).mean().item(),
        "signal_first_share": (s[0].square() / s.square().sum()).item(),
        "signal_singular": (s / s[0]).tolist(),
        "signal_size_spread": (sizes.std() / sizes.mean()).item(),
        "size_against_token_std": correlation(sizes.log(), spread.log()),
        "share_of_energy": {name: value / total for name, value in share.items()},
    }


def attack(net: Classifier, batch: Batch, seed: int, steps: int, picture: Path) -> dict:
    """Inverting Gradients with alpha .1 and rate .1, labels known; true and rebuilt image go to `picture`."""
    obs = observe(net, batch, threat=ThreatModel(knows_labels=True), rng=torch.Generator().manual_seed(seed))
    with second_derivatives():
        found = InvertingGradients(steps=steps, tv=0.1, lr=0.1, frames=10)(obs, torch.Generator().manual_seed(seed))
    truth = batch.images
    best = max(metrics.psnr(frame, truth).item() for frame in found.frames)
    grey = torch.full_like(truth, 0.5)
    mean_colour = truth.mean((-2, -1), keepdim=True).expand_as(truth)

    picture.parent.mkdir(parents=True, exist_ok=True)
    results.bitmap([truth, found.images]).save(picture, "PNG", optimize=True)

    def error(images: Tensor) -> float:
        return (cut(images).mean(1) - cut(truth).mean(1)).square().mean().sqrt().item()

    return {
        "steps": steps,
        "psnr": metrics.psnr(found.images, truth).item(),
        "psnr_best_frame": best,
        "frame_steps": found.frame_steps,
        "frame_psnr": [metrics.psnr(frame, truth).item() for frame in found.frames],
        "floor": metrics.floor(truth).item(),
        "psnr_tiled": metrics.psnr(tiled(truth), truth).item(),
        "matching_loss": found.loss,
        "matching_loss_grey": _distance(obs, grey),
        "matching_loss_tiled": _distance(obs, tiled(truth)),
        "mean_patch_error": error(found.images),
        "mean_patch_error_grey": error(grey),
        "mean_patch_error_mean_colour": error(mean_colour),
        "patch_brightness_correlation": correlation(cut(found.images).mean(2), cut(truth).mean(2)),
    }


def _distance(obs, images: Tensor) -> float:
    from gi_lib.matching import cosine

    with torch.no_grad():
        return cosine(obs.simulate(images, obs.labels), obs.gradient).item()


GROUPS = ("embedding", "positions", "rest")


def jacobian(net: Classifier, batch: Batch, seed: int, chunk: int, dtype: torch.dtype) -> dict:
    """The columns of J one by one, in forward mode over a gradient; of the large rest a sketch is kept.

    Rows of the embedding and of the positions are kept whole. All others are thrown into BUCKETS buckets, each with a
    random sign. Norms of columns, and so all shares of energy, are of J itself; spectra are of the sketch.
    """
    net = attackers_copy(net.to(dtype), tuple(batch.images.shape[1:]), 1)
    client, y = Client(), batch.labels
    mean, std = (v.view(1, -1, 1, 1) for v in (net.mean, net.std))
    z = ((batch.images.to(dtype) - mean) / std).detach()
    shape, n = z.shape, z.numel()
    names = [name for name, _ in net.named_parameters()]
    first = names[0].removesuffix("weight")
    place = {name: GROUPS[0] for name in names if name.startswith(first)}
    place |= {name: GROUPS[1] for name in names if "tokens" in name}

    def groups(z: Tensor) -> tuple[Tensor, ...]:
        g = client(net, z.reshape(shape) * std + mean, y)
        kept = {group: [g[name].flatten() for name in names if place.get(name, "rest") == group] for group in GROUPS}
        return tuple(torch.cat(parts) if parts else z.new_zeros(1) for parts in kept.values())

    with second_derivatives():
        at = [a.detach() for a in groups(z.flatten())]
        rest = at[2].numel()
        rng = torch.Generator().manual_seed(seed)
        bucket = torch.randint(BUCKETS, (rest,), generator=rng)
        sign = (torch.randint(2, (rest,), generator=rng) * 2 - 1).to(dtype)
        rows = at[0].numel() + at[1].numel() + BUCKETS
        J = torch.empty(n, rows, dtype=dtype)  # transposed: a row is a pixel
        energy, along = torch.empty(n, 3, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
        eye = torch.eye(n, dtype=dtype)

        def push(direction: Tensor) -> tuple[Tensor, ...]:
            return torch.func.jvp(groups, (z.flatten(),), (direction,))[1]

        begin = clock("cpu")
        for i in range(0, n, chunk):
            moved = [m.detach() for m in torch.func.vmap(push)(eye[i : i + chunk])]
            here = slice(i, i + len(moved[0]))
            for k, m in enumerate(moved):
                energy[here, k] = torch.linalg.vector_norm(m, dim=1).double().square()
            along[here] = sum((m.double() @ a.double() for m, a in zip(moved, at, strict=True)))
            sketch = moved[0].new_zeros(len(moved[0]), BUCKETS).index_add_(1, bucket, moved[2] * sign)
            J[here] = torch.cat([moved[0], moved[1], sketch], 1)
        seconds = clock("cpu") - begin

    size = sum(a.double().square().sum().item() for a in at)
    order = cut(torch.arange(n, dtype=torch.float64).reshape(shape))[0].long()  # [64, 48]: the pixels of each patch
    J, energy, along = J[order.flatten()], energy[order.flatten()], along[order.flatten()]
    patches, inside = order.shape
    ends = (at[0].numel(), at[0].numel() + at[1].numel())
    positions = _gram(J[:, ends[0] : ends[1]])
    whole = _gram(J[:, : ends[0]]) + positions + _gram(J[:, ends[1] :])
    grams = {"all": whole} | ({"all but positions": whole - positions} if hasattr(net.net, "tokens") else {})
    seen = whole - torch.outer(along, along) / size  # the cosine does not see a change along g
    mean = spread_over(torch.ones(patches), inside)
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "parameters": sum(a.numel() for a in at),
        "pixels": n,
        "gradient_norm": math.sqrt(size),
        "energy": energy.sum(0).tolist(),
        "groups": GROUPS,
        "sketched_over_exact_energy": (whole.trace() / energy.sum()).item(),
        "patch_gain": energy.sum(1).reshape(patches, inside).sum(1).sqrt().tolist(),
        "spectra": {name: _described(gram, mean) for name, gram in grams.items()},
    }
    blocks = seen.reshape(patches, inside, patches, inside).diagonal(dim1=1, dim2=3).sum(-1)
    values, vectors = torch.linalg.eigh(blocks)
    weights = vectors[:, -1] * vectors[:, -1].sum().sign()
    token = _token_std(net, batch.images.to(dtype)) if hasattr(net.net, "patches") else None
    row |= {
        "patch_weights": weights.tolist(),
        "patch_weights_share": (values[-1] / values.sum()).item(),
        "patch_weights_cosine_to_equal": (weights.sum() / math.sqrt(patches)).item(),
        "gain_against_token_std": None
        if token is None
        else correlation(torch.tensor(row["patch_gain"]).log(), token.log()),
    }
    # what an error of size 1 (in standard deviations of the input) at every entry costs in cosine distance
    H = seen / size
    inner = mean.T @ H @ mean
    row["cost_of_unit_error"] = {
        "mean patch": (0.5 * patches * inner.trace()).item(),
        "rest": (0.5 * (H.trace() - inner.trace()) * patches / (patches - 1)).item(),
    }
    return row


def spread_over(weights: Tensor, inside: int) -> Tensor:
    """An orthonormal basis [patches * inside, inside] of images whose patch p is weights[p] times one common patch."""
    weights = weights.double() / weights.double().norm()
    return torch.kron(weights[:, None], torch.eye(inside, dtype=torch.float64))


def shares(net: Classifier, batch: Batch, seed: int, chunk: int, probes: int) -> dict:
    """The energy |J v|^2 of a few kinds of direction v of unit length, in place of all of J.

    The mean over the 48 of the mean patch, over the 48 of the patches weighted by 1 / their token's spread, and over
    `probes` random ones: of all images, and of those whose mean patch is zero.
    """
    net = attackers_copy(net, tuple(batch.images.shape[1:]), 1)
    mean, std = (v.view(1, -1, 1, 1) for v in (net.mean, net.std))
    z, side = (batch.images - mean) / std, batch.images.shape[-1]
    token, rng = _token_std(net, batch.images), torch.Generator().manual_seed(seed)
    patches, inside = cut(z).shape[1:]
    kinds = {
        "mean patch": spread_over(torch.ones(patches), inside).T,
        "weighted patch": spread_over(1 / token, inside).T,
        "any": torch.randn(probes, patches * inside, generator=rng).double(),
    }
    free = torch.randn(probes, patches, inside, generator=rng).double()
    kinds["no mean patch"] = (free - free.mean(1, keepdim=True)).flatten(1)
    names = [name for name, _ in net.named_parameters()]

    def gradient(z: Tensor) -> tuple[Tensor, ...]:
        g = Client()(net, z * std + mean, batch.labels)
        return tuple(g[name] for name in names)

    def push(direction: Tensor) -> Tensor:
        at, moved = torch.func.jvp(gradient, (z,), (direction,))
        along = sum((a * m).sum() for a, m in zip(at, moved, strict=True))
        energy = sum(m.square().sum() for m in moved)
        return torch.stack([energy, energy - along.square() / sum(a.square().sum() for a in at)])

    found = {}
    with second_derivatives():
        size = sum(g.square().sum() for g in gradient(z)).item()
        for kind, directions in kinds.items():
            unit = directions / directions.norm(dim=1, keepdim=True)
            images = joined(unit.reshape(-1, patches, inside), side).float()[:, None]
            moved = [torch.func.vmap(push)(part).detach().double() for part in images.split(chunk)]
            found[kind] = torch.cat(moved)
    energy = {kind: values[:, 0].mean().item() for kind, values in found.items()}
    # the cosine distance of a small change v is 1/2 (|J v|^2 - <g, J v>^2 / |g|^2) / |g|^2
    cost = {kind: 0.5 * values[:, 1].mean().item() / size for kind, values in found.items()}
    n, rest = patches * inside, (patches - 1) * inside
    total = inside * energy["mean patch"] + rest * energy["no mean patch"]
    return {
        "energy_of_unit": energy,
        "cosine_distance_of_unit": cost,
        "probes": probes,
        "share_of_mean_patch": inside * energy["mean patch"] / total,
        "share_of_weighted_patch": inside * energy["weighted patch"] / total,
        "total_again": n * energy["any"] / total,
        "pixels": n,
    }


def _gram(part: Tensor, rows: int = 4096) -> Tensor:
    """part part^T in double precision, block by block."""
    total = torch.zeros(len(part), len(part), dtype=torch.float64)
    for block in part.split(rows, dim=1):
        total += block.double() @ block.double().T
    return total


def _described(gram: Tensor, mean: Tensor) -> dict:
    """The spectrum of J from J^T J, and its share on the mean patch `mean` [n, 48]."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    s, k = values.sqrt(), mean.shape[1]
    angles = torch.linalg.svdvals(vectors[:, :k].T @ mean).clamp(max=1)
    share = values.cumsum(0) / values.sum()
    steps = torch.logspace(0, math.log10(len(s)), 60).sub(1).round().long().clamp(max=len(s) - 1).tolist()
    chosen = sorted({*steps, k - 1, k, len(s) - 1})
    return {
        "index": chosen,
        "singular": s[chosen].tolist(),
        "rank_at": {str(t): (s > t * s[0]).sum().item() for t in THRESHOLDS},
        "participation": (values.sum().square() / values.square().sum()).item(),
        "share_of_best": {str(r): share[r - 1].item() for r in (1, k, 4 * k, 16 * k) if r <= len(s)},
        "share_of_mean_patch": ((mean.T @ gram @ mean).trace() / gram.trace()).item(),
        "principal_cosines": angles.tolist(),
        "overlap_with_mean_patch": angles.square().mean().item(),
    }


@torch.no_grad()
def _token_std(net: Classifier, images: Tensor) -> Tensor:
    """How far the entries of each embedded patch spread, which the first layer norm divides by, [N]."""
    z = (images - net.mean.view(1, -1, 1, 1)) / net.std.view(1, -1, 1, 1)
    return net.net.tokens(net.net.patches(z))[0, 1:].double().std(1)


# ------------------------------------------------------------------------------------------------- rows


def network(name: str, dataset: Dataset, seed: int, checkpoint: str | None, folder: Path) -> Classifier:
    if name != "trained":
        return NETWORKS[name](dataset, seed)
    net = build("vit", dataset, 0)
    net.load_state_dict(checkpoints.load(checkpoint, folder))
    return net


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["tokens", "closed"], choices=["train", *PARTS])
    parser.add_argument("--networks", nargs="+", default=["untrained"], choices=[*NETWORKS, "trained"])
    parser.add_argument("--images", nargs="+", type=int, default=[0], help="test images; each is its network's seed")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--size", type=int, help="side of the images, scaled; their own where it is left out")
    parser.add_argument("--steps", type=int, default=300, help="of the attack")
    parser.add_argument("--chunk", type=int, default=32, help="directions of J at a time")
    parser.add_argument("--probes", type=int, default=48, help="random directions of each kind in `shares`")
    parser.add_argument("--double", action="store_true", help="J in float64")
    parser.add_argument("--seconds", type=float, default=480, help="CPU seconds of training")
    parser.add_argument("--checkpoint", help="name@hash of the trained vit, as the part `train` prints it")
    parser.add_argument("--folder", type=Path, default=checkpoints.FOLDER, help="of checkpoints")
    parser.add_argument("--out", type=Path, default=OUT, help="file to append to")
    given = parser.parse_args(arguments)
    dataset = data.load(given.dataset, size=given.size)
    assert len(dataset) > max(given.images), f"{given.dataset} has {len(dataset)} test images"
    about = {"dataset": given.dataset, "split": dataset.split, "size": dataset.image_shape[-1]}
    if "train" in given.parts:
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        net, facts = train(given.seconds, given.dataset)
        reference = checkpoints.save("vit_account", net.state_dict(), given.folder)
        facts |= {"checkpoint": reference, "accuracy": accuracy(net, dataset), "accuracy_images": 1000}
        _keep(given.out, {"part": "train", "network": "trained", **about, **facts}, begun)
        given.checkpoint = reference
    for name in given.networks:
        for i in given.images:
            batch = dataset.batch([i])
            for part in (p for p in given.parts if p != "train"):
                if part in ("tokens", "closed", "shares") and name in ("lenet", "cnn6"):
                    continue
                begun = datetime.now(UTC).isoformat(timespec="seconds")
                net = network(name, dataset, i, given.checkpoint, given.folder)
                if part == "attack":
                    picture = given.out.with_suffix("") / f"{name.replace(' ', '_')}_{i}.png"
                    found = attack(net, batch, i, given.steps, picture)
                elif part == "shares":
                    found = shares(net, batch, i, given.chunk, given.probes)
                elif part == "jacobian":
                    found = jacobian(net, batch, i, given.chunk, torch.float64 if given.double else torch.float32)
                else:
                    found = {"closed": closed, "tokens": tokens}[part](net, batch, i)
                row = {"part": part, "network": name, **about, "image": i, "seed": i, "hash": dataset.hash([i])}
                row |= {"checkpoint": given.checkpoint if name == "trained" else None}
                _keep(given.out, row | found, begun)


def _keep(out: Path, row: dict, begun: str) -> None:
    made = {
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "device": provenance.device_name("cpu"),
        "precision": provenance.precision("cpu"),
        "started": begun,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:  # results.append takes records of cases alone
        file.write(json.dumps(row | made, allow_nan=False) + "\n")
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float | str)}
    print(", ".join(f"{key} {value}" for key, value in numbers.items()), flush=True)


if __name__ == "__main__":
    main()
