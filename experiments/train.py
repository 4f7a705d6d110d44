"""Train the survey's networks on train splits, each by its recipe, and keep them as checkpoints.

    python experiments/train.py lenet mnist
    python experiments/train.py missing

The first trains one network, where it is not there or comes from other images; the second all that are not there of
those that have been trained before, and `all` those as well for which nobody has had the hours. What is printed,
name@hash and the accuracy on the test split, is written into results/trained_networks/training.jsonl, with the minutes
of one processor core. A recipe is that of `gi_lib.training`, which is what `Case(weights="trained")` takes; one that
is changed by an option gives a name@hash for `Case(weights=...)` and for `gi attack --weights`.
"""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from gi_lib import checkpoints, data, execution, provenance, results, training

LOG = Path(__file__).parents[1] / "results" / "trained_networks" / "training.jsonl"


def trained(recipe: training.Recipe, root: Path | None, folder: Path, device: str, log: Path) -> None:
    """Train a network where it is not there, and write down what came of it."""
    own, test = (data.load(recipe.dataset, split=split, root=root) for split in ("train", "test"))
    started, start = datetime.now(UTC), execution.clock(device)
    reference, now = training.train(recipe, own, folder, device)
    minutes = (execution.clock(device) - start) / 60
    accuracy = training.accuracy(training.kept(recipe, reference, own, folder), test)
    print(f"{reference}  {accuracy:.1%} of {len(test)} test images{'' if now else ', found again'}", flush=True)
    if not now:
        return
    row = {
        "recipe": {name: value for name, value in dataclasses.asdict(recipe).items() if name != "accuracy"},
        "recipe_hash": recipe.hash,
        "checkpoint": reference,
        "bytes": (folder / f"{reference}.safetensors").stat().st_size,
        "accuracy": accuracy,
        "test_images": len(test),
        "train_images": len(own),
        "data_hash": own.hash(range(len(own))),
        "minutes": round(minutes, 2),
        "device": provenance.device_name(device),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "started": started.isoformat(timespec="seconds"),
    }
    results.append_row(log, row)


def main(
    model: Annotated[str, typer.Argument(help="A model of `gi list models`; or `missing`, or `all`.")],
    dataset: Annotated[str | None, typer.Argument(help="A dataset of `gi list datasets`.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default="the recipe's")] = None,
    root: Annotated[Path | None, typer.Option(help="The data root.", show_default="$GI_DATA, or the cache")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = checkpoints.FOLDER,
    device: Annotated[str | None, typer.Option(show_default="a GPU where there is one")] = None,
    log: Annotated[Path, typer.Option(help="Where it is written down.")] = LOG,
) -> None:
    """Train one of the survey's networks, or those that are missing, and print the checkpoints."""
    if model in ("missing", "all"):
        if dataset is not None or epochs is not None or seed is not None:
            raise typer.BadParameter(f"{model} trains by the recipes as they are; leave the rest out, or name a model")
        known = [recipe for recipe in training.RECIPES.values() if model == "all" or recipe.accuracy is not None]
        chosen = [recipe for recipe in known if checkpoints.made(recipe.name, recipe.hash, out) is None]
    elif dataset is None:
        raise typer.BadParameter("name the dataset as well, such as `lenet mnist`")
    else:
        own = training.RECIPES.get((model, dataset)) or training.Recipe(model, dataset, epochs=20)
        changes = {"epochs": epochs, "seed": seed}
        chosen = [dataclasses.replace(own, **{name: value for name, value in changes.items() if value is not None})]
    for recipe in chosen:
        trained(recipe, root, out, provenance.choose_device(device), log)


if __name__ == "__main__":
    typer.run(main)
