"""What a blind guess gives: three baselines for the survey's images, with no gradient at all.

The image's mean colour, which is the floor; the mean of its class in the train split; the best of 500 other images of
the split that is attacked, which an attacker could not choose. One row a dataset goes to a file of its own, in a folder
that `results.read` does not look into.

    python experiments/baselines.py [--out results/baselines/baselines.jsonl]
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from gi_lib import data, metrics, provenance, results
from gi_lib.bench import protocol
from gi_lib.bench.measure import CANDIDATES

IMAGES = range(8)


def baselines(name: str, size: int | None) -> dict:
    dataset = data.load(name, size=size)
    batch = dataset.batch(IMAGES)
    candidates = dataset.batch(range(min(len(dataset), CANDIDATES + 1))).images
    best = []
    for i, image in enumerate(batch.images):
        others = torch.cat([candidates[:i], candidates[i + 1 :]])[:CANDIDATES]
        best.append(metrics.psnr(others, image.expand_as(others)).max().item())
    return {
        "dataset": name,
        "size": size,
        "indices": list(IMAGES),
        "data_hash": dataset.hash(IMAGES),
        "mean_colour": metrics.floor(batch.images).tolist(),
        "class_mean": None if size else metrics.psnr(class_means(name)[batch.labels], batch.images).tolist(),
        "best_of_others": best,
        "others": min(len(dataset) - 1, CANDIDATES),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def class_means(name: str) -> torch.Tensor:
    """[K, C, H, W], of the train split; the sample of ImageNet, which alone is taken at another size, has none."""
    train = data.load(name, split="train")
    everything = train.batch(range(len(train)))
    return torch.stack([everything.images[everything.labels == k].mean(0) for k in range(train.num_classes)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/baselines/baselines.jsonl"), help="file to append to")
    given = parser.parse_args()
    for name, size in protocol.DATASETS.items():
        row = baselines(name, size)
        results.append_row(given.out, row)
        print(name, [round(v, 1) for v in row["mean_colour"]], [round(v, 1) for v in row["best_of_others"]])
