"""How often the sign rule of iDLG finds the label: 1,000 random LeNets on one image each, for three datasets.

The count that Zhao et al. (2020) report for MNIST, CIFAR-100 and LFW; the faces here are AT&T's, in place of LFW's, at
32 pixels. Nothing is optimised, so that this is no study of Cases: one row a dataset goes to a file of its own, in a
folder that `results.read` does not look into.

    python experiments/idlg_labels.py [--out results/labels/idlg.jsonl]
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from gi_lib import data, labels, models, observe, provenance, results

DATASETS = (("mnist", None), ("cifar100", None), ("faces", 32))
NETWORKS = 1000


def count(name: str, size: int | None, networks: int) -> dict:
    """The row of one dataset: LeNet i has the weights of seed i, and sees image i, round again after the last."""
    dataset, rng = data.load(name, size=size), torch.Generator().manual_seed(0)
    started, correct = datetime.now(UTC).isoformat(timespec="seconds"), 0
    for i in tqdm(range(networks), desc=name, unit="network", disable=None):
        batch = dataset.batch([i % len(dataset)])
        model = models.build("lenet", num_classes=dataset.num_classes, image_shape=dataset.image_shape, seed=i)
        correct += labels.idlg(observe(model, batch, rng=rng)).item() == batch.labels.item()
    return {
        "dataset": name,
        "split": dataset.split,
        "size": size,
        "networks": networks,
        "correct": correct,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "device": provenance.device_name("cpu"),
        "precision": provenance.precision("cpu"),
        "started": started,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/labels/idlg.jsonl"), help="file to append to")
    parser.add_argument("--networks", type=int, default=NETWORKS, help="LeNets for each dataset")
    given = parser.parse_args()
    for name, size in DATASETS:
        row = count(name, size, given.networks)
        results.append_row(given.out, row)
        print(f"{name}: {row['correct']} of {row['networks']} labels right")
