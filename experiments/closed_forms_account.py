"""R-GAP beyond what a case can name: the paper's CNN6 with one logit, and the ranks of CNN6's equations.

    logistic   CNN6 with a head of one logit, untrained, on ten images of CIFAR-10, the label told: "right" is the class
               that the network gives, so that the last layer's equation has two roots, "wrong" the other, which the
               public code attacks. One row an image and label, with how many times the other root's image is as bright.
    rank       [K; W; P] of each layer of CNN6 with ten classes at 32 px on one image: counted and numeric.

Image i meets the network drawn from seed i. The rows go to a file of their own, in a folder that `results.read` does
not look into; a row that is there is not computed again.

    python experiments/closed_forms_account.py [--images 10] [--parts logistic rank]
"""

import argparse
import dataclasses
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from gi_lib import Batch, ThreatModel, data, evaluate, metrics, models, observe, provenance, results
from gi_lib.attacks import RGAP, rgap
from gi_lib.models import networks, rank

PARTS = ("logistic", "rank")


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


def ranks(dataset: data.Dataset, image: int):
    model = models.build("cnn6", num_classes=dataset.num_classes, image_shape=dataset.image_shape, seed=image).double()
    batch = dataset.batch([image])
    for row in rank.numeric(model, batch.images[0], int(batch.labels)):
        found = dataclasses.asdict(row)
        yield {"part": "rank", "image": image, **found, "condition": found["condition"]}


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
    for part, image in [("rank", 0)] * ("rank" in given.parts) + [
        ("logistic", i) for i in range(given.images) if "logistic" in given.parts
    ]:
        if (part, image) in done:
            continue
        for row in list((ranks if part == "rank" else logistic)(dataset, image)):
            results.append_row(given.out, {**row, **made_by, "at": datetime.now(UTC).isoformat(timespec="seconds")})
            print(row, flush=True)


if __name__ == "__main__":
    main()
