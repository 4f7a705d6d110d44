"""How far from the private batch does its gradient still tell where it is?

Noise of a given standard deviation is added to the four images of a batch, and the cosine between the gradient of what
results and the private one is taken: where it is 0 the two have nothing to do with each other, and a search from there
is not led. The batches are those of the study `batch_statistics`; the networks a public trained ResNet-20 and untrained
ones, in eval mode, and in train mode where they have batch norm. One row a network, mode and batch goes to a file of
its own, in a folder that `results.read` does not look into.

    python experiments/valley_account.py
"""

import argparse
import runpy
from datetime import UTC, datetime
from pathlib import Path

import torch

from gi_lib import ThreatModel, data, models, observe, provenance, results
from gi_lib.matching import cosine

STUDY = runpy.run_path(str(Path(__file__).parent / "batch_statistics.py"))
NOISE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
NETWORKS = {  # name -> (model, whether trained, whether in train mode)
    f"{'trained' if trained else 'untrained'} {model}, {'train' if train else 'eval'} mode": (model, trained, train)
    for model, trained, train in (
        ("resnet20", True, True),
        ("resnet20", True, False),
        ("resnet20", False, True),
        ("resnet20", False, False),
        ("resnet18", False, True),
        ("resnet18", False, False),
        ("convnet", False, True),
        ("convnet", False, False),
        ("cnn6", False, False),
        ("lenet", False, False),
        ("mlp", False, False),
    )
}


def measure(network: str, number: int, indices: tuple[int, ...]) -> dict:
    own, (name, trained, train) = data.load("cifar10"), NETWORKS[network]
    if trained:
        model = models.pretrained(f"cifar10_{name}", root=data.root(None))
    else:
        shape = {"num_classes": own.num_classes, "image_shape": own.image_shape, "mean": own.mean, "std": own.std}
        model = models.build(name, seed=number, **shape)
    batch = own.batch(sorted(indices, key=lambda i: int(own.batch([i]).labels[0])))  # slot i has label i
    rng = torch.Generator().manual_seed(number)
    obs = observe(model.train(train), batch, threat=ThreatModel(knows_labels=True), rng=rng)
    alike = []
    with torch.no_grad():
        for std in NOISE:
            moved = batch.images + std * torch.randn(batch.images.shape, generator=rng)
            alike.append(1 - cosine(obs.simulate(moved, batch.labels), obs.gradient).item())
    return {
        "network": network,
        "batch": number,
        "indices": indices,
        "noise": NOISE,
        "cosine": [round(value, 4) for value in alike],
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "device": provenance.device_name("cpu"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/accounts/valley.jsonl"), help="file to append to")
    given = parser.parse_args()
    for network in NETWORKS:
        for number, indices in enumerate(STUDY["BATCHES"][4]):
            results.append_row(given.out, measure(network, number, indices))


if __name__ == "__main__":
    main()
