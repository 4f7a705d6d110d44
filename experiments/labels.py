"""What label rules find in batches of 1 to 4,096: which classes are there, how many images each has.

Nothing is optimised, so that this is no study of Cases: one row for a setting and a rule goes to a file of its own, in
a folder that `results.read` does not look into. What is there of a setting is not run again.

    python experiments/labels.py [--out results/labels/rules.jsonl] [--only authors]

The private batches come from the train split, as in the study of iLRG's authors, and the attacker's own images from
the test split. Batch i of an untrained network meets the weights of seed i. All layers but the last are frozen: rules
read no other, and the gradient costs a forward pass. Three scores a batch, beside those of "all classes are there" and
of an even guess:

* presence, the share of the K classes of which it is right whether they are there ("LeAcc"),
* counts, the share of the K classes whose number is right ("LnAcc"),
* recall, the share of the B labels that are found, as a multiset: sum_k min(n_k, n'_k) / B.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gi_lib import Batch, Client, ThreatModel, data, labels, models, observe, provenance, receive, results, training
from gi_lib.types import Classifier, NotApplicableError, Observation

OUT = Path(__file__).parents[1] / "results" / "labels" / "rules.jsonl"
ACTIVATIONS = {"ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU, "SiLU": nn.SiLU}
AT_ONCE = 256
ONE = ("iDLG", "iDLG, row sum")
OWN = ("LLG+", "zero-shot, own images", "RLU", "zero-shot, weights, own images")
DIRICHLET = 0.3
"""The parameter of the Dirichlet distribution that a batch's mixture of classes is drawn from."""


def ilrg_rounded(obs: Observation) -> Tensor:
    """iLRG's counts as its authors score them: each rounded for itself, and those above B set to 0."""
    n = labels.ILRG().raw(obs).clamp(min=0).round()
    return labels.of_counts(torch.where(n > (obs.batch_size or 0), 0, n).long())


def rlg_unchecked(obs: Observation) -> Tensor:
    """RLG's linear programmes, also where the rank says that they can't tell classes apart."""
    return labels.separable(labels.span(labels.last_layer(obs)[0]))


def even(obs: Observation) -> Tensor:
    """No rule, but what it must beat: as many of each class as of every other."""
    K, size = obs.num_classes, obs.batch_size or 0
    return labels.of_counts(labels.apportion(torch.full((K,), size / K), size))


EXTRA: dict[str, Callable[[Observation], Tensor]] = {
    "even guess": even,
    "iLRG, rounded": ilrg_rounded,
    "RLG, unchecked": rlg_unchecked,
}
RULES = {name: rule for name, rule in labels.RULES.items() if name != "known"} | labels.PRESENCE
USUAL = ("even guess", *(name for name in RULES if name not in (*ONE, "column minimum", OWN[-1])))
LARGE = tuple(name for name in USUAL if name not in (*OWN, "LLBG", "RLG"))


@dataclass(frozen=True)
class Setting:
    """One kind of batch and of network.

    Args:
        part: which question it belongs to.
        model: a key of models.MODELS; or widths of the hidden layers of a dense network, such as "300-300".
        batch: B.
        drawn: "random" images; "distinct" labels; or a "dirichlet" mixture of classes.
        normalised: whether the input is, by the dataset.
        trained: epochs of SGD on a dense network; None is untrained.
        checkpoint: whether the network is the one that the project keeps, trained.
        steps, local_batch, lr: of a client that takes several.
    """

    part: str
    model: str
    dataset: str
    batch: int
    drawn: str = "random"
    activation: str = "ReLU"
    normalised: bool = True
    trained: float | None = None
    checkpoint: bool = False
    steps: int = 1
    local_batch: int | None = None
    lr: float = 1.0
    size: int | None = None
    classes: int | None = None
    batches: int = 20
    rules: tuple[str, ...] = dataclasses.field(default=USUAL, metadata={"display": True})


def plan() -> list[Setting]:
    """All settings, those of the published tables first."""
    both = (*USUAL, "iLRG, rounded", "RLG, unchecked")
    found = [
        Setting("authors", model, "mnist", batch, normalised=normalised, batches=50, rules=both)
        for batch in (24, 64, 128)
        for model in ("300-300", "300")
        for normalised in (True, False)
    ]
    found += [Setting("depth", "300-300-300", "mnist", 64, batches=50, rules=("iLRG", "iLRG, rounded", "zero-shot"))]
    found += [Setting("untrained", "300-300", "mnist", b, normalised=False, batches=50) for b in (8, 256)]
    found += [
        Setting("training", "300-300", "mnist", batch, drawn, trained=epochs)
        for epochs in (0.3, 1.0, 3.0)
        for batch, drawn in ((24, "random"), (64, "random"), (64, "dirichlet"))
    ]
    found += [
        Setting("rlg", "300-300", "cifar100", batch, batches=5, rules=("RLG, unchecked", "negative bias"))
        for batch in (24, 72, 120)
    ]
    found += [
        Setting("activation", "300-300", "cifar100", 24, activation=activation, batches=10)
        for activation in ACTIVATIONS
    ]
    found += [
        Setting("batch", "300-300", "mnist", batch, drawn, rules=USUAL if batch > 1 else (*ONE, *USUAL))
        for drawn in ("random", "dirichlet", "distinct")
        for batch in (1, 4, 10, 24, 64, 256, 1024, 4096)
        if not (drawn == "distinct" and batch > 10) and not (drawn != "random" and batch == 1)
    ]
    found += [
        Setting("distinct", "300-300", "cifar100", batch, "distinct", batches=5, rules=(*USUAL, "column minimum"))
        for batch in (8, 24, 64)
    ]
    found += [
        Setting("steps", "300-300", "mnist", 50, trained=epochs, steps=25, local_batch=10, lr=lr)
        for epochs in (None, 1.0)
        for lr in (0.01, 0.1)
    ]
    found += [
        Setting("checkpoints", model, dataset, 24, checkpoint=True, rules=(*LARGE, *OWN))
        for model in ("lenet", "cnn6")
        for dataset in ("mnist", "cifar10", "cifar100")
    ]
    few = ("iLRG", "zero-shot", "bias greedy", "LLG", "negative column")
    found += [Setting("large", "resnet50", "imagenet", 4096, size=64, classes=1000, batches=1, rules=few)]
    found += [
        Setting("models", model, dataset, 24, batches=5 if model in ("mlp", "lenet", "cnn6") else 2, rules=LARGE)
        for model in ("mlp", "lenet", "cnn6", "vit", "vgg11", "resnet50", "resnet18", "convnet")
        for dataset in ("mnist", "cifar10", "cifar100")
    ]
    return found


def dense(widths: str, activation: str, dataset: data.Dataset, normalised: bool, seed: int) -> Classifier:
    """A dense network with PyTorch's initialisation."""
    sizes = [torch.Size(dataset.image_shape).numel(), *map(int, widths.split("-"))]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), ACTIVATIONS[activation]())]
    net, rng = nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], dataset.num_classes)), torch.Generator()
    rng.manual_seed(seed)
    for layer in net:
        if isinstance(layer, nn.Linear):
            models.torch_default(layer, rng)
    how = {"mean": dataset.mean, "std": dataset.std} if normalised else {}
    return models.wrap(net, **how, num_classes=dataset.num_classes).eval()


@functools.cache
def loaded(name: str, split: str, size: int | None) -> data.Dataset:
    return data.load(name, split=split, size=size)


@functools.lru_cache(maxsize=1)
def network(setting: Setting, seed: int) -> tuple[Classifier, float | None]:
    """The network, and its accuracy on the test split where it is trained."""
    own = loaded(setting.dataset, "test" if setting.classes else "train", setting.size)
    if setting.checkpoint:
        recipe = training.recipe(setting.model, setting.dataset)
        reference, folder = training.find(recipe)
        model = training.kept(recipe, reference, own, folder)
        return model, training.accuracy(model, loaded(setting.dataset, "test", setting.size))
    if setting.model in models.MODELS:
        how = {"mean": own.mean, "std": own.std} if models.normalised(setting.model) else {}
        shape, classes = own.image_shape, setting.classes or own.num_classes
        return models.build(setting.model, num_classes=classes, image_shape=shape, seed=seed, **how), None
    model = dense(setting.model, setting.activation, own, setting.normalised, seed)
    if setting.trained is None:
        return model, None
    rng = torch.Generator().manual_seed(seed)
    descent = torch.optim.SGD(model.parameters(), 0.1, weight_decay=5e-4)  # as iLRG's authors train
    order = torch.cat([torch.randperm(len(own), generator=rng) for _ in range(int(setting.trained) + 1)])
    for part in order[: int(setting.trained * len(own))].split(128):
        batch = own.batch(part.tolist())
        descent.zero_grad()
        nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
        descent.step()
    return model, training.accuracy(model, loaded(setting.dataset, "test", setting.size))


def drawn(setting: Setting, rng: torch.Generator) -> Batch:
    """A private batch."""
    if setting.classes:
        return cropped(setting, rng)
    own = loaded(setting.dataset, "train", setting.size)
    y = torch.from_numpy(own.labels)
    if setting.drawn == "random":
        return own.batch(torch.randperm(len(own), generator=rng)[: setting.batch].tolist())
    if setting.drawn == "distinct":
        wanted = torch.randperm(own.num_classes, generator=rng)[: setting.batch]
    else:
        parts = torch._standard_gamma(torch.full((own.num_classes,), DIRICHLET), generator=rng)
        wanted = torch.multinomial(parts / parts.sum(), setting.batch, replacement=True, generator=rng)
    chosen = []
    for k in wanted.tolist():
        of = (y == k).nonzero().flatten()
        chosen.append(int(of[torch.randint(len(of), (1,), generator=rng)]))
    return own.batch(chosen)


def cropped(setting: Setting, rng: torch.Generator) -> Batch:
    """Crops of the sample of ImageNet, which has one photograph a class and 200 classes of the 1,000: class k has crops
    of photograph k mod 200, three quarters as wide, mirrored or not."""
    own = loaded(setting.dataset, "test", setting.size)
    photos = own.batch(range(len(own))).images
    y = torch.randint(setting.classes or 1, (setting.batch,), generator=rng)
    side = photos.shape[-1]
    small = 3 * side // 4
    x = torch.empty(setting.batch, *photos.shape[1:])
    for i, k in enumerate((y % len(photos)).tolist()):
        top, left, mirrored = torch.randint(side - small + 1, (3,), generator=rng).tolist()
        crop = photos[k, :, top : top + small, left : left + small]
        crop = nn.functional.interpolate(crop[None], size=side, mode="bilinear", antialias=True)[0].clamp(0, 1)
        x[i] = crop.flip(-1) if mirrored % 2 else crop
    return Batch(x, y)


def observed(setting: Setting, model: Classifier, batch: Batch, rng: torch.Generator) -> Observation:
    """What the attacker sees: the gradient of the last layer, or of all where the client takes several steps. A batch
    that fills the memory goes through the model in parts, whose mean gradient is the batch's."""
    own = None if setting.classes else data.Surrogate(loaded(setting.dataset, "test", setting.size))
    threat = ThreatModel(knows_training_details=setting.steps > 1, has_auxiliary_data=own is not None)
    if setting.steps == 1:
        model.requires_grad_(False)
        [m for m in model.modules() if isinstance(m, nn.Linear)][-1].requires_grad_(True)
    if not setting.classes:
        client = Client(steps=setting.steps, local_batch=setting.local_batch, lr=setting.lr)
        return observe(model, batch, client=client, threat=threat, auxiliary=own, rng=rng)
    sent: dict[str, Tensor] = {}
    for x, y in zip(batch.images.split(AT_ONCE), batch.labels.split(AT_ONCE), strict=True):
        for name, g in Client()(model, x, y).items():
            sent[name] = sent.get(name, 0) + g.detach() * (len(y) / len(batch))
    shape = tuple(batch.images.shape[1:])
    return receive(model, sent, image_shape=shape, batch_size=len(batch), auxiliary=own)


def scores(found: Tensor, truth: Tensor) -> tuple[float, float | None, float | None]:
    """Presence, counts and recall; a rule of presence has the first alone."""
    if found.dtype == torch.bool:
        return (found == (truth > 0)).double().mean().item(), None, None
    n = labels.counts(found, len(truth))
    return (
        ((n > 0) == (truth > 0)).double().mean().item(),
        (n == truth).double().mean().item(),
        (torch.minimum(n, truth).sum() / truth.sum()).item(),
    )


def rows(setting: Setting) -> Iterator[dict]:
    """One row a rule."""
    started, begun = datetime.now(UTC).isoformat(timespec="seconds"), time.process_time()
    rng = torch.Generator().manual_seed(12)  # the seed of iLRG's study
    of: dict[str, dict] = {name: {"status": "ok", "error": None, "scores": []} for name in setting.rules}
    everything, accuracy = [], None
    for i in tqdm(range(setting.batches), desc=f"{setting.part} {setting.model} {setting.dataset} {setting.batch}"):
        seed = 0 if setting.trained or setting.checkpoint else i
        model, accuracy = network(setting, seed)
        batch = drawn(setting, rng)
        obs = observed(setting, model, batch, rng)
        truth = labels.counts(batch.labels, obs.num_classes)
        everything.append((truth > 0).double().mean().item())
        for name, row in of.items():
            rule = (RULES | EXTRA)[name]
            if setting.part == "models" and hasattr(rule, "images"):
                rule = dataclasses.replace(rule, images=32)
            try:
                row["scores"].append(scores(rule(obs), truth))
            except NotApplicableError as error:
                row |= {"status": "not applicable", "error": str(error)}
    settings = {name: value for name, value in dataclasses.asdict(setting).items() if name != "rules"}
    for name, row in of.items():
        done = list(zip(*row.pop("scores"), strict=True)) or [()] * 3
        three = {
            key: None if None in values else [round(v, 4) for v in values]
            for key, values in zip(("presence", "counts", "recall"), done, strict=True)
        }
        yield {
            **settings,
            "rule": name,
            **row,
            **three,
            "all_present": [round(v, 4) for v in everything],
            "accuracy": accuracy,
            "seconds": round(time.process_time() - begun, 2),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "device": provenance.device_name("cpu"),
            "precision": provenance.precision("cpu"),
            "started": started,
        }


def named(row: dict) -> tuple:
    return tuple(row.get(f.name) for f in dataclasses.fields(Setting) if f.name != "rules")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="file to append to")
    parser.add_argument("--only", help="settings of this part alone")
    parser.add_argument("--most", type=int, help="so many settings, and no more")
    given = parser.parse_args()
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out.exists() else []
    done = {(named(row), row["rule"]) for row in map(json.loads, lines)}
    left = [
        dataclasses.replace(s, rules=rules)
        for s in plan()
        if given.only in (None, s.part)
        and (rules := tuple(name for name in s.rules if (named(dataclasses.asdict(s)), name) not in done))
    ]
    for setting in left[: given.most]:
        for row in list(rows(setting)):
            results.append_row(given.out, row)


if __name__ == "__main__":
    main()
