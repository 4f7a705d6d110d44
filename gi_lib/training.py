"""How the survey's networks are trained: a recipe for each model and dataset, and what was made by it.

    recipe = training.recipe("lenet", "mnist")
    training.train(recipe, data.load("mnist", split="train"))    # minutes; found again from then on

A recipe is known by its hash. It is what `Case(weights="trained")` rests on, and enters the case's key; the bytes that
were used enter its record.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gi_lib import checkpoints, data, models, progress
from gi_lib.types import Classifier, differing, nearest, real, whole

revision = 1
"""Raised when the same recipe gives another network."""

AUGMENTATIONS = ("none", "crop", "flip and crop")
PAD = 4
"""Pixels by which a crop may be off the centre."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW with PyTorch's defaults, its rate rising for a tenth of the steps, then falling
    to 0 as half a cosine.

    Args:
        model: a key of models.MODELS.
        dataset: a key of data.DATASETS; its train split is used, at its own size.
        epochs: passes over it.
        batch: images a step.
        rate: the highest learning rate.
        augmentation: "none", "crop" (moved by up to 4 pixels, zeros around), or "flip and crop".
        seed: of the first weights, the order of the images, the augmentation and dropout.
        accuracy: on the test split, as it was measured once; None where nobody has trained it yet.

    Raises:
        ValueError: a name is unknown, or a number is out of range.
    """

    model: str
    dataset: str
    epochs: int
    batch: int = 128
    rate: float = 1e-3
    augmentation: str = "none"
    seed: int = 0
    accuracy: float | None = field(default=None, metadata={"display": True})

    def __post_init__(self):
        for name, known, kind in (
            (self.model, models.MODELS, "model"),
            (self.dataset, data.DATASETS, "dataset"),
            (self.augmentation, AUGMENTATIONS, "augmentation"),
        ):
            if name not in known:
                raise ValueError(nearest(name, known, kind))
        whole(self, "epochs", "batch")
        whole(self, "seed", least=0)
        real(self, "rate", above=0.0)

    @property
    def name(self) -> str:
        """Of its checkpoint."""
        return f"{self.model}_{self.dataset}"

    @property
    def hash(self) -> str:
        """8 hexadecimal digits of the SHA-256 of its fields and of the revisions of its model and of the training."""
        revisions = f"training#{revision} {self.model}#{models.MODELS[self.model].revision}"
        return hashlib.sha256(f"{differing(self)} {revisions}".encode()).hexdigest()[:8]


_MIRRORED = "flip and crop"

RECIPES = {
    (recipe.model, recipe.dataset): recipe
    for recipe in (
        # One to three minutes of a core; lenet's sigmoids, drawn wide, learn at ten times the usual rate
        Recipe("mlp", "mnist", 6, accuracy=0.9745),
        Recipe("mlp", "cifar10", 10, accuracy=0.47),
        Recipe("mlp", "cifar100", 20, accuracy=0.135),
        Recipe("lenet", "mnist", 20, rate=1e-2, accuracy=0.9805),
        Recipe("lenet", "cifar10", 20, rate=1e-2, accuracy=0.5295),
        Recipe("lenet", "cifar100", 40, rate=1e-2, accuracy=0.143),
        Recipe("cnn6", "mnist", 6, rate=2e-3, accuracy=0.9845),
        Recipe("cnn6", "cifar10", 10, rate=2e-3, augmentation=_MIRRORED, accuracy=0.559),
        Recipe("cnn6", "cifar100", 20, rate=2e-3, augmentation=_MIRRORED, accuracy=0.2165),
        # Under ten minutes of a core on mnist, under an hour on the others; resnet18 takes three times that, convnet 8
        Recipe("vgg11", "mnist", 1, batch=64, rate=3e-4),
        Recipe("vgg11", "cifar10", 5, batch=64, rate=3e-4, augmentation=_MIRRORED),
        Recipe("vgg11", "cifar100", 10, batch=64, rate=3e-4, augmentation=_MIRRORED),
        Recipe("vit", "mnist", 1, batch=64, rate=5e-4),
        Recipe("vit", "cifar10", 5, batch=64, rate=5e-4, augmentation=_MIRRORED),
        Recipe("vit", "cifar100", 10, batch=64, rate=5e-4, augmentation=_MIRRORED),
        Recipe("resnet50", "mnist", 1, batch=64),
        Recipe("resnet50", "cifar10", 5, batch=64, augmentation=_MIRRORED),
        Recipe("resnet50", "cifar100", 10, batch=64, augmentation=_MIRRORED),
        Recipe("resnet18", "mnist", 1, batch=64),
        Recipe("resnet18", "cifar10", 5, batch=64, augmentation=_MIRRORED),
        Recipe("resnet18", "cifar100", 10, batch=64, augmentation=_MIRRORED),
        Recipe("convnet", "mnist", 1, batch=64),
        Recipe("convnet", "cifar10", 5, batch=64, augmentation=_MIRRORED),
        Recipe("convnet", "cifar100", 10, batch=64, augmentation=_MIRRORED),
    )
}
"""(model, dataset) -> its recipe. Imagenet's sample has no train split."""


def recipe(model: str, dataset: str) -> Recipe:
    """The recipe of a model and a dataset.

    Raises:
        ValueError: they have none.
    """
    if (model, dataset) not in RECIPES:
        raise ValueError(
            f"there is no recipe that trains {model!r} on {dataset!r}; recipes are there for"
            f" {_names(pair[0] for pair in RECIPES)} on {_names(pair[1] for pair in RECIPES)}; `python"
            " experiments/train.py MODEL DATASET --epochs 20` trains others, and prints the name@hash that a case takes"
        )
    return RECIPES[model, dataset]


def _names(some: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(some))


def untrained(recipe: Recipe, dataset: data.Dataset) -> Classifier:
    """The network at its first weights, in eval mode, normalised as studies normalise it."""
    own = {"mean": dataset.mean, "std": dataset.std} if models.normalised(recipe.model) else {}
    shape = {"num_classes": dataset.num_classes, "image_shape": dataset.image_shape}
    return models.build(recipe.model, **shape, **own, seed=recipe.seed)  # type: ignore[arg-type]


def fit(recipe: Recipe, dataset: data.Dataset, device: str = "cpu") -> Classifier:
    """Train a network anew.

    Args:
        recipe: how.
        dataset: the train split that the recipe names.
        device: where.

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: it is another dataset, or its test split.
    """
    if (dataset.name, dataset.split) != (recipe.dataset, "train"):
        raise ValueError(
            f"{recipe.name} is trained on the train split of {recipe.dataset}, got the {dataset.split} split of"
            f" {dataset.name}; load it with split='train'"
        )
    model = untrained(recipe, dataset).to(device).train()
    rng = torch.Generator().manual_seed(recipe.seed)
    size = len(dataset) // recipe.batch * recipe.batch or len(dataset)  # whole batches: one image has no batch norm
    steps = recipe.epochs * -(-size // recipe.batch)
    optimiser = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.rate, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    with progress.bar(total=steps, desc=recipe.name, unit="step") as bar, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # dropout
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(dataset), generator=rng)[:size].split(recipe.batch):
                batch = dataset.batch(chosen)
                images = augmented(batch.images, recipe.augmentation, rng)
                optimiser.zero_grad()
                F.cross_entropy(model(images.to(device)), batch.labels.to(device)).backward()
                optimiser.step()
                schedule.step()
                bar.update()
    return model.eval()


def augmented(images: Tensor, how: str, rng: torch.Generator) -> Tensor:
    """The images [B, C, H, W], each moved by up to 4 pixels either way with zeros around it, and half of them flipped.

    Args:
        images: in [0, 1].
        how: one of AUGMENTATIONS.
        rng: on the CPU, as the images are.
    """
    if how == "none":
        return images
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=rng)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    if how == "flip and crop":
        columns = torch.where(torch.rand(n, 1, generator=rng) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).permute(0, 2, 3, 1)
    moved = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def train(
    recipe: Recipe, dataset: data.Dataset, folder: Path = checkpoints.FOLDER, device: str = "cpu"
) -> tuple[str, bool]:
    """Train a network where `folder` has none of this recipe and these images, and keep it there.

    Its parameters are kept in float16, its buffers as they are.

    Returns:
        Its reference, `name@hash` of the bytes, and whether it was trained now.

    Raises:
        ValueError: it is another dataset than the recipe's, or its test split; or the training diverged.
    """
    images = dataset.hash(range(len(dataset)))
    reference = checkpoints.made(recipe.name, recipe.hash, folder)
    if reference is not None and checkpoints.origin(reference, folder) == images:
        return reference, False
    model = fit(recipe, dataset, device)
    tensors = model.state_dict() | {name: p.half() for name, p in model.named_parameters()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"the training of {recipe.name} diverged; lower the recipe's rate")
    reference = checkpoints.save(recipe.name, tensors, folder, origin=images)
    checkpoints.point(recipe.name, recipe.hash, reference, folder)
    return reference, True


def find(recipe: Recipe, folders: Iterable[Path] = (checkpoints.FOLDER,)) -> tuple[str, Path]:
    """The reference of what was made by a recipe, and the first of the folders that has it.

    Raises:
        FileNotFoundError: none has it.
    """
    folders = list(folders)
    for folder in folders:
        if reference := checkpoints.made(recipe.name, recipe.hash, folder):
            return reference, folder
    raise FileNotFoundError(
        f"there is no trained {recipe.model} for {recipe.dataset} (recipe {recipe.hash}) in"
        f" {_names(map(str, folders))}; `python experiments/train.py {recipe.model} {recipe.dataset}` makes it"
    )


def accuracy(model: Classifier, dataset: data.Dataset) -> float:
    """The share of a dataset's images that the model, in eval mode, puts into their class."""
    device, hits = model.mean.device, 0
    with torch.no_grad():
        for chosen in torch.arange(len(dataset)).split(500):
            batch = dataset.batch(chosen)
            hits += int((model(batch.images.to(device)).argmax(1).cpu() == batch.labels).sum())
    return hits / len(dataset)


def kept(recipe: Recipe, reference: str, dataset: data.Dataset, folder: Path = checkpoints.FOLDER) -> Classifier:
    """A network as it was kept, in eval mode and float32."""
    model = untrained(recipe, dataset)
    model.load_state_dict(checkpoints.load(reference, folder))
    return model
