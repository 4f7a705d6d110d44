"""`gi attack` and `gi audit`: one attack on one batch, and one model under all of them."""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gi_lib.cli.app import Device, Root, app, complain

if TYPE_CHECKING:
    from gi_lib.audit import Audit

DEFAULT_CLASSES = 10
"""Of a model that takes any number of classes."""
MOST_INDICES = 4096


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help="An attack of `gi list attacks`, with settings: dlg:lr=0.5,history=10.")],
    model: Annotated[
        str,
        typer.Option(help="A model of `gi list models`, torchvision:NAME, timm:NAME, or package.module:factory."),
    ] = "lenet",
    dataset: Annotated[str, typer.Option(help="A dataset of `gi list datasets`.")] = "digits",
    images: Annotated[
        Path | None,
        typer.Option(help="In place of a dataset: an image, a folder of images, or a folder with a folder a class."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the dataset: test or train.")] = "test",
    indices: Annotated[str, typer.Option(help="The images of the batch, such as 0,1 or 0-3.")] = "0",
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Tell the attacker the labels.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the attack; can be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(show_default="the paper's")] = None,
    restarts: Annotated[int | None, typer.Option(help="Starts, run as one batch.", show_default="the paper's")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the attack and the clients.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Public weights of `gi list models`, trained for those of its recipe, or name@hash of a checkpoint.",
            show_default="untrained",
        ),
    ] = None,
    train: Annotated[bool, typer.Option("--train/--eval", help="The mode of the client's model.")] = False,
    local_steps: Annotated[
        int | None, typer.Option(help="FedAvg with this many local steps, known to the attacker.")
    ] = None,
    local_lr: Annotated[float, typer.Option(help="The learning rate of those steps.")] = 0.01,
    clients: Annotated[int, typer.Option(help="Clients that share the batch; the attacker sees their mean.")] = 1,
    defense: Annotated[str | None, typer.Option(help="A defense of `gi list defenses`, with settings.")] = None,
    out: Annotated[Path, typer.Option(help="The picture: truth above, reconstruction below.")] = Path("attack.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")] = False,
    root: Root = None,
    device: Device = None,
) -> None:
    """Run one attack on one batch, print its scores, write the picture.

    The attacker is granted what the attack can't do without; the threat model is printed. LPIPS needs AlexNet's
    weights in the data root: nothing is downloaded for it here.

    \b
    gi attack dlg --model lenet --dataset digits --indices 0
    gi attack inverting_gradients --dataset photos --indices 0,1 --labels --out photos.png
    gi attack dlg --images holiday.jpg --size 16 --set lr=.5 --json
    """
    import dataclasses
    import json

    from gi_lib import Client, bench, metrics, provenance, results
    from gi_lib.attacks import ATTACKS
    from gi_lib.data import FOLDER_SIZE
    from gi_lib.defenses import DEFENSES
    from gi_lib.federated import granted

    given = dict(_setting(text, "--set") for text in set_ or ())
    given |= {k: v for k, v in {"steps": steps, "restarts": restarts}.items() if v is not None}
    chosen = from_spec(name, ATTACKS, "attack", given)
    threat = granted(chosen, labels=labels, details=local_steps is not None)
    own = dataset
    if images is not None:
        dataset, own = f"folder:{images}", "photos"
    case = bench.Case(
        chosen,
        model,
        dataset,
        parse_indices(indices),
        seed=seed,
        weights=weights,
        size=size,
        split=split,
        threat=threat,
        client=Client() if local_steps is None else Client(steps=local_steps, lr=local_lr),
        defense=None if defense is None else from_spec(defense, DEFENSES, "defense"),
        train=train,
        clients=clients,
        auxiliary=own if threat.has_auxiliary_data else None,
    )
    if case.auxiliary is not None and images is not None and size is None:
        case = dataclasses.replace(case, size=FOLDER_SIZE)
    try:
        record, picture = bench.attempt(case, root, provenance.choose_device(device))
    except bench.AttackError as error:
        raise error.__cause__ or error from None
    assert picture is not None
    truth, found = picture
    results.write_picture(out, truth, found, zoom=max(1, 128 // truth.shape[-1]))
    if as_json:
        print(json.dumps({**record, "commit": provenance.commit(), "picture": str(out)}, indent=1, allow_nan=False))
        return
    print(f"{record['attack_text']}; {bench.text(case.threat, brief=True)}, letter {record['threat_letter']}")
    print(f"on {model}, {weights or 'untrained'}; {dataset} {list(case.indices)}; {record['client']}")
    labels_found = record["label_accuracy"]
    names = {"psnr": ".2f", "floor": ".2f", "ssim": ".3f", "lpips": ".3f", "mse": ".2e"}
    mean = {name: _mean(record[name], digits) for name, digits in names.items()}  # type: ignore[literal-required]
    print(
        f"PSNR {mean['psnr']} dB, the image's mean colour {mean['floor']}; SSIM {mean['ssim']}, LPIPS {mean['lpips']},"
        f" MSE {mean['mse']}, labels {'unknown' if labels_found is None else format(labels_found, '.0%')}"
    )
    one, returned = record["chance"], record["returned"]
    assert one is not None and returned is not None
    print(
        f"recovered {record['recall']:.0%}, identified {_mean(record['identified'], '.0%')} (chance"
        f" {metrics.chance(one, returned):.1%}); returned {returned} of {record['batch_size']} images"
    )
    loss = "unknown" if record["loss"] is None else f"{record['loss']:.2e}"
    print(
        f"{record['seconds']:.1f} s on {record['device']}: {record['steps']} steps,"
        f" as long as {record['training_steps']:,.0f} training steps; matching loss {loss}"
    )
    print(f"picture: {out}")


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="package.module:factory, torchvision:NAME, timm:NAME, or one of ours.")],
    update: Annotated[
        Path | None,
        typer.Option(help="A recorded update, safetensors by parameter name: a gradient, or (before - after) / rate."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="An image or a folder for simulated clients.", show_default="embedded photographs"),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="The model's state from before the round, safetensors.", show_default="as it is built"),
    ] = None,
    classes: Annotated[int | None, typer.Option(show_default="10, or what the model gives")] = None,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Images of a client.")] = 1,
    labels: Annotated[
        str | None, typer.Option(help="Labels of the recorded update, such as 3,5, where they are known.")
    ] = None,
    train: Annotated[bool, typer.Option("--train/--eval", help="The mode of the client's model.")] = False,
    local_steps: Annotated[int, typer.Option(help="Steps of a client, known to the attacker.")] = 1,
    local_lr: Annotated[float, typer.Option(help="The learning rate of several steps.")] = 0.01,
    defense: Annotated[
        str | None, typer.Option(help="Of simulated clients: a defense of `gi list defenses`, with settings.")
    ] = None,
    clients: Annotated[int, typer.Option(help="How many clients are simulated.")] = 2,
    budget: Annotated[float, typer.Option(help="Seconds for the searches.")] = 60.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each search.", show_default="as the budget allows")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the attacks and the clients.")] = 0,
    out: Annotated[Path, typer.Option(help="The report, one HTML file; a JSON is written beside it.")] = Path(
        "audit.html"
    ),
    device: Device = None,
) -> None:
    """Is my model exposed? Attack it, and an update of it that was recorded, and write a report.

    Closed forms, label rules, counts, a server that changes the model, and searches within the budget. Without an
    update clients are simulated. The attacks never see the images; simulated ones are scored afterwards.

    \b
    gi audit mymodule:net --update round.safetensors --classes 100 --size 64
    gi audit torchvision:mobilenet_v3_small --images photos/ --batch-size 4 --budget 300
    """
    from gi_lib import audit as auditing

    if out.suffix == ".json":
        raise ValueError(
            f"--out names the page, and a JSON is written beside it: {out.with_suffix('.html')}, not {out}"
        )
    if folders := [path for path in (out, out.with_suffix(".json")) if path.is_dir()]:
        raise ValueError(
            f"--out names the page and the JSON beside it, and {folders[0]} is a folder; name another file"
        )
    try:
        found = _audited(
            model, update, images, weights, classes, (channels, size, size), labels, train, device,
            batch_size=batch_size, local_steps=local_steps, local_lr=local_lr, defense=defense, clients=clients,
            budget=budget, steps=steps, seed=seed,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if not auditing.write_failure(out, model, " ".join(str(error).split())):
            complain(f"the report of an earlier audit is kept: {out}")
        raise
    beside = auditing.write(out, found.page(), found.as_dict())
    width = shutil.get_terminal_size((100, 0)).columns
    print(f"{model}: {found.headline}")
    for text in found.care:
        complain(f"warning: {text}")
    for finding in found.findings:
        print(f"  {finding.answer:<18}{finding.question}")
        for line in textwrap.wrap(f"{finding.evidence}. {finding.sure}.", max(40, width - 20)):
            print(" " * 20 + line)
    print(f"not tried: {', '.join(what for what, _ in found.untried)}")
    print(f"report: {out}, numbers: {beside}")


def _audited(
    model: str,
    update: Path | None,
    images: Path | None,
    weights: Path | None,
    classes: int | None,
    shape: tuple[int, int, int],
    labels: str | None,
    train: bool,
    device: str | None,
    *,
    local_steps: int,
    local_lr: float,
    defense: str | None,
    seed: int,
    **more: Any,
) -> "Audit":
    """What `gi audit` was asked for."""
    import torch

    from gi_lib import Client, data, models, provenance
    from gi_lib.audit import audit as run_audit
    from gi_lib.copies import functional_copy, number_of_logits
    from gi_lib.defenses import DEFENSES

    net = models.build(model, num_classes=classes or DEFAULT_CLASSES, image_shape=shape, seed=seed)
    if classes is None:
        net.num_classes = max(2, number_of_logits(functional_copy(net), shape))
    if weights is not None:
        models.load_state(net, weights)
    own = None
    if images is not None:
        if shape[0] != 3:
            raise ValueError("images of your own are read in colour; leave --images out, or take --channels 3")
        folder = data.load(f"folder:{images}", size=shape[1])
        own = folder.batch(range(len(folder)))
        if int(own.labels.max()) >= net.num_classes:
            raise ValueError(
                f"{images} has {folder.num_classes} class folders, and the model has {net.num_classes} classes; give"
                " the folders of its classes, or say --classes"
            )
    return run_audit(
        net.train(train).to(provenance.choose_device(device)),
        shape,
        name=model,
        update=update,
        labels=None if labels is None else torch.tensor(parse_indices(labels, "--labels")),
        images=own,
        client=Client() if local_steps == 1 else Client(steps=local_steps, lr=local_lr),
        defense=None if defense is None else from_spec(defense, DEFENSES, "defense"),
        seed=seed,
        **more,
    )


def parse_indices(text: str, option: str = "--indices") -> tuple[int, ...]:
    """ "0,2-4" -> (0, 2, 3, 4)."""
    ranges = []
    for part in text.split(","):
        numbers = re.fullmatch(r"\s*(\d{1,12})(?:-(\d{1,12}))?\s*", part)
        if numbers is None:
            raise ValueError(f"{option} {text!r:.60} is not a list of whole numbers such as 0,1 or 0-3")
        ranges.append(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
    if sum(map(len, ranges)) > MOST_INDICES:
        raise ValueError(f"{option} {text!r:.60} is more than {MOST_INDICES} images; a batch of so many is no one's")
    return tuple(i for part in ranges for i in part)


def from_spec(spec: str, registry: Mapping[str, type], kind: str, more: Mapping[str, Any] | None = None) -> Any:
    """ "name:field=value,field=value" -> the dataclass of that name with these settings.

    Raises:
        ValueError: the name or a field is unknown, or a value is not of its type.
    """
    import dataclasses

    from gi_lib.types import nearest

    name, _, settings = spec.partition(":")
    if name not in registry:
        raise ValueError(nearest(name, registry, kind))
    fields = {f.name: f for f in dataclasses.fields(registry[name])}
    given = dict(more or {})
    for setting in filter(None, settings.split(",")):
        field, value = _setting(setting, spec)
        given.setdefault(field, value)
    for field in given:
        if field not in fields:
            raise ValueError(f"{nearest(field, fields, f'setting of {name}')}")
    return registry[name](**given)


def _setting(text: str, where: str) -> tuple[str, int | float | bool | None | str]:
    """ "field=value" -> the two."""
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise ValueError(f"{where!r}: settings are written field=value, such as tv=.1, got {text!r:.60}")
    return field.strip(), _value(value.strip())


def _value(text: str) -> int | float | bool | None | str:
    plain = {"True": True, "False": False, "None": None}
    if text in plain:
        return plain[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _mean(values: Sequence[float | None] | None, digits: str) -> str:
    numbers = [value for value in values or () if value is not None]
    return format(sum(numbers) / len(numbers), digits) if numbers else "missing"
