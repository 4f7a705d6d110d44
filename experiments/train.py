"""Train a model on the train split of a dataset, and keep it as a checkpoint.

    python experiments/train.py lenet mnist --epochs 20

prints name@hash, which `Case(weights=...)` and `gi attack --weights` take, and the accuracy on the test split. What
was trained once is found again by its recipe: model, data, epochs and seed. SGD with momentum 0.9 and weight decay
5e-4 on batches of 128, its rate falling from 0.05 to 0 as half a cosine.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from gi_lib import checkpoints, data, models, progress
from gi_lib.types import Classifier

REVISION = 1
BATCH, RATE = 128, 0.05


def train(model: Classifier, images: torch.Tensor, labels: torch.Tensor, epochs: int, rng: torch.Generator) -> None:
    """Change the model in place; it stays in eval mode."""
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    size = len(images) // BATCH * BATCH or len(images)  # whole batches: one image alone has no batch norm
    steps = epochs * -(-size // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    with progress.bar(total=steps, desc="train", unit="step") as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=rng)[:size].split(BATCH):
                optimiser.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimiser.step()
                schedule.step()
                bar.update()
    model.eval()


def main(
    model: Annotated[str, typer.Argument(help="A model of `gi list models`.")],
    dataset: Annotated[str, typer.Argument(help="A dataset of `gi list datasets`.")],
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    root: Annotated[Path | None, typer.Option(help="The data root.", show_default="$GI_DATA, or the cache")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = checkpoints.FOLDER,
) -> None:
    """Train a model on the train split of a dataset, and print the checkpoint that a case names."""
    own, other = (data.load(dataset, split=split, root=root) for split in ("train", "test"))
    shape = {"num_classes": own.num_classes, "image_shape": own.image_shape}
    net = models.build(model, **shape, seed=seed, mean=own.mean, std=own.std)
    everything = own.batch(range(len(own)))

    def make() -> checkpoints.Tensors:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # dropout
            train(net, everything.images, everything.labels, epochs, torch.Generator().manual_seed(seed))
        return net.state_dict()

    entry = models.MODELS.get(model)
    recipe = (
        f"train#{REVISION}",
        f"{model}#{entry and entry.revision}",
        own.hash(range(len(own))),
        str(epochs),
        str(seed),
    )
    tensors, reference = checkpoints.cached(f"{model}_{dataset}", recipe, make, out)
    net.load_state_dict(tensors)
    test = other.batch(range(len(other)))
    with torch.no_grad():
        guesses = torch.cat([net(part).argmax(1) for part in test.images.split(500)])
    print(f"{reference}  {(guesses == test.labels).double().mean():.1%} of {len(test)} test images")


if __name__ == "__main__":
    typer.run(main)
