"""R-GAP and COPA beyond what a case can name: CNN6 with one logit, its ranks, and a network short of equations.

    logistic   CNN6 with a head of one logit, untrained, on ten images of CIFAR-10, the label told: "right" is the class
               that the network gives, so that the last layer's equation has two roots, "wrong" the other, which the
               public code attacks. One row an image and label, with how many times the other root's image is as bright.
    rank       [K; W; P] of each layer of CNN6 with ten classes at 32 px on one image: counted and numeric.
    copa       three convolutions of 12, 5 and 20 channels on the middle 16 x 16 pixels, ten classes, whose second layer
               has fewer equations than unknowns, with Tanh and with LeakyReLU: R-GAP, COPA at 200 and at 2,000
               iterations, and DLG. One row an image, activation and attack.

Image i meets the network drawn from seed i. The rows go to a file of their own, in a folder that `results.read` does
not look into; a row that is there is not computed again.

    python experiments/closed_forms_account.py [--images 10] [--parts rank copa logistic]
"""

import argparse
import dataclasses
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from gi_lib import Batch, ThreatModel, data, evaluate, metrics, models, observe, provenance, results
from gi_lib.attacks import COPA, DLG, RGAP, rgap
from gi_lib.bench import protocol
from gi_lib.models import networks, rank

PARTS = ("rank", "copa", "logistic")


def one_logit(seed: int, dataset: data.Dataset):
    """CNN6 with one logit, weights as `models.build` draws them, in float64 and in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    net = networks.cnn6(1, dataset.image_shape)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            models.torch_default(layer, rng)
    return models.wrap(net, num_classes=2).double().eval()


def logistic(dataset: data.Dataset, image: int):
    model = one_logit(image, dataset)
    pixels = dataset.batch([image]).images
    with torch.no_grad():
        u = model(pixels.double())[0].diff().item()
    right = int(u > 0)
    for name, label in (("right", right), ("wrong", 1 - right)):
        batch = Batch(pixels, torch.tensor([label]))
        obs = observe(model, batch, threat=ThreatModel(knows_labels=True), rng=torch.Generator())
        start = time.process_time()
        rec = RGAP()(obs, torch.Generator())
        seconds = time.process_time() - start
        margin = abs(u) if name == "right" else -abs(u)
        roots = rgap.margins(-margin * torch.tensor(-margin).sigmoid().item())
        yield {
            "part": "logistic",
            "image": image,
            "label": name,
            "psnr": evaluate(rec, batch, download=False).psnr.item(),
            "certified": rec.notes["certified"],
            "residual": rec.notes["residual"],
            "roots": rec.notes["roots"],
            "margin": margin,
            "brightness": max((v / margin for v in roots), key=lambda ratio: abs(ratio - 1)),
            "cpu_seconds": seconds,
        }


def short(seed: int, activation: type[torch.nn.Module], num_classes: int):
    """Three convolutions for 16 x 16 pixels and a dense layer without biases, the second of five channels."""
    slope = (0.2,) if activation is torch.nn.LeakyReLU else ()
    layers: list[torch.nn.Module] = []
    for c, out, kernel, stride, padding in [(3, 12, 4, 2, 2), (12, 5, 3, 2, 1), (5, 20, 3, 1, 1)]:
        layers += [torch.nn.Conv2d(c, out, kernel, stride, padding, bias=False), activation(*slope)]
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(500, num_classes, bias=False))
    rng = torch.Generator().manual_seed(seed)
    for layer in net[::2]:
        if not isinstance(layer, torch.nn.Flatten):
            models.torch_default(layer, rng)
    models.torch_default(net[-1], rng)
    return models.wrap(net, num_classes=num_classes).double().eval()


def copa(dataset: data.Dataset, image: int):
    whole = dataset.batch([image])
    edge = (whole.images.shape[-1] - 16) // 2
    batch = Batch(whole.images[:, :, edge : edge + 16, edge : edge + 16], whole.labels)
    budget = protocol.budget("lenet", 1)
    for activation in (torch.nn.Tanh, torch.nn.LeakyReLU):
        model = short(image, activation, dataset.num_classes)
        obs = observe(model, batch, rng=torch.Generator())
        for attack in (RGAP(), COPA(), COPA(iterations=2000), protocol.at_budget(DLG(), budget)):
            start = time.process_time()
            rec = attack(obs, torch.Generator().manual_seed(image))
            seconds = time.process_time() - start
            scores = evaluate(rec, batch, download=False)
            yield {
                "part": "copa",
                "image": image,
                "activation": activation.__name__,
                "attack": type(attack).__name__,
                "iterations": getattr(attack, "iterations", None),
                "gradient_evaluations": rec.gradient_evaluations,
                "index": rank.index(rank.count(model, (3, 16, 16))),
                "psnr": scores.psnr.item(),
                "floor": scores.floor.item(),
                "cpu_seconds": seconds,
            }


def ranks(dataset: data.Dataset, image: int):
    model = models.build("cnn6", num_classes=dataset.num_classes, image_shape=dataset.image_shape, seed=image).double()
    batch = dataset.batch([image])
    for row in rank.numeric(model, batch.images[0], int(batch.labels)):
        full = row.rank == row.unknowns
        yield {"part": "rank", "image": image, **dataclasses.asdict(row), "condition": row.condition if full else None}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dataset", default="cifar10")
    folder = Path(__file__).parents[1] / "results" / "accounts"
    parser.add_argument("--out", type=Path, default=folder / "closed_forms.jsonl")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dataset = data.load(given.dataset)
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out.is_file() else []
    done = {(row["part"], row["image"]) for row in map(json.loads, lines)}
    versions = {"versions": provenance.versions(), "commit": provenance.commit()}
    made_by = {
        "dataset": given.dataset,
        "device": provenance.device_name("cpu"),
        "metrics": metrics.revision,
        **versions,
    }
    makers = {"rank": ranks, "copa": copa, "logistic": logistic}
    for part in given.parts:
        for image in range(1 if part == "rank" else given.images):
            for row in () if (part, image) in done else list(makers[part](dataset, image)):
                at = datetime.now(UTC).isoformat(timespec="seconds")
                results.append_row(given.out, {**row, **made_by, "at": at})
                print(row, flush=True)


if __name__ == "__main__":
    main()
