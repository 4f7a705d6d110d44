"""Why an untrained ResNet-50 stays under the floor: its depth, or batch norm with running statistics of 0 and 1?

Inverting Gradients at one budget on the network as it is built; on the same with running statistics of 256 images of
the train split; on one of half the blocks; and on that with such statistics. For each also the share of the squared
gradient that each stage of the network sends, and the standard deviation of the logits. CIFAR-10, image i with network
seed i. One row a network and image goes to a file of its own, in a folder that `results.read` does not look into.

    python experiments/resnet50_account.py [--images 2] [--steps 100]
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from gi_lib import ThreatModel, data, evaluate, metrics, models, observe, provenance, results
from gi_lib.attacks import InvertingGradients
from gi_lib.models import he_fan_out

BLOCKS = {"resnet50": [3, 4, 6, 3], "half the blocks": [2, 2, 2, 2]}
TV, LR = 0.1, 0.3


def network(blocks: list[int], own: data.Dataset, seed: int):
    """As `models.build` makes a resnet50, with these blocks; in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    net = ResNet(Bottleneck, blocks, num_classes=own.num_classes)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            he_fan_out(layer, rng)
    return models.wrap(net, mean=own.mean, std=own.std, num_classes=own.num_classes).eval()


def calibrate(model, images: torch.Tensor) -> None:
    """Give every batch norm the running statistics of these images."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(images)
    model.eval()


def measure(name: str, calibrated: bool, image: int, steps: int) -> dict:
    own, train = data.load("cifar10"), data.load("cifar10", split="train")
    model = network(BLOCKS[name], own, image)
    if calibrated:
        calibrate(model, train.batch(range(256)).images)
    batch = own.batch([image])
    obs = observe(model, batch, threat=ThreatModel(knows_labels=True), rng=torch.Generator())
    squares: dict[str, float] = {}
    for parameter, g in obs.gradient.items():
        stage = parameter.split(".")[1]
        squares[stage] = squares.get(stage, 0.0) + g.double().square().sum().item()
    with torch.no_grad():
        logits = model(batch.images).std().item()
    rec = InvertingGradients(steps=steps, tv=TV, lr=LR)(obs, torch.Generator().manual_seed(image))
    scores = evaluate(rec, batch)
    candidates = own.batch(range(500)).images
    return {
        "network": name,
        "blocks": sum(BLOCKS[name]),
        "running_statistics": "of 256 images" if calibrated else "0 and 1",
        "image": image,
        "steps": steps,
        "tv": TV,
        "lr": LR,
        "gradient_shares": {stage: value / sum(squares.values()) for stage, value in squares.items()},
        "logits_std": logits,
        "psnr": scores.psnr.item(),
        "floor": scores.floor.item(),
        "identified": metrics.identified(rec.images.clamp(0, 1), batch.images, candidates).item(),
        "loss": rec.loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/accounts/resnet50.jsonl"), help="file to append to")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for image in range(given.images):
        for name in BLOCKS:
            for calibrated in (False, True):
                begun = datetime.now(UTC).isoformat(timespec="seconds")
                row = measure(name, calibrated, image, given.steps)
                row |= {
                    "versions": provenance.versions(),
                    "commit": provenance.commit(),
                    "device": provenance.device_name("cpu"),
                    "started": begun,
                }
                results.append_row(given.out, row)
                shares = {stage: round(value, 4) for stage, value in row["gradient_shares"].items()}
                print(
                    name, row["running_statistics"], image, f"{row['psnr'] - row['floor']:+.1f} dB", row["identified"]
                )
                print("   ", shares, f"logits {row['logits_std']:.3g}", f"distance {row['loss']:.3g}", flush=True)


if __name__ == "__main__":
    main()
