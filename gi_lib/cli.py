"""The `gi` command. What a subcommand needs is imported when it runs, so that `--help` waits for nothing."""

import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import gi_lib

if TYPE_CHECKING:
    import pandas as pd

    from gi_lib.audit import Audit
    from gi_lib.bench import Case, Cell, Estimate
    from gi_lib.results import Record

FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141

MANUAL = """Gradient inversion: reconstruct private images from what federated learning shares.

\b
A first attack, on an embedded dataset, in seconds:
    gi attack dlg --model lenet --dataset digits --indices 0
A photograph, four starts at once, the label known to the attacker:
    gi attack inverting_gradients --model convnet --dataset photos --labels --restarts 4 --steps 200
A malicious server, and a client that adds noise; settings follow a colon:
    gi attack robbing_the_fed:bins=64 --model convnet --dataset photos --indices 0-7
    gi attack bias_ratio --model mlp --defense gaussian_noise:std=0.01
Your own network, or a library's; your own images; any setting of an attack:
    gi attack inverting_gradients --model torchvision:resnet18 --dataset photos --steps 50
    gi attack inverting_gradients --images holiday.jpg --set tv=.01 --set steps=300
Is my model exposed? A report of what leaks from it, and from an update that you recorded:
    gi audit mymodule:net --update round.safetensors
What there is, and what each attack needs:
    gi list
A study: a Python file with a list CASES, which is executed. What it would take; then to run
it. Stop it at any time; the same command goes on:
    gi run experiments/dlg.py --plan
    gi run experiments/dlg.py --workers 2
    gi run experiments --workers 2
Its summary, one line a group:
    gi table results/dlg.jsonl --by model,threat
Whether its records are what its cases, its data and its pictures give:
    gi check experiments/dlg.py
"""

EPILOG = """\b
Data. The datasets digits and photos are part of the package. Others are read from the data
root: --root, else the environment variable GI_DATA, else the user's cache. What is not
there is downloaded by torchvision, where it can be.

\b
Exit codes. 0: done. 1: an attack failed, a value is still missing, or a check found a
problem. 2: bad input, a missing file, a full disk, a study that another process runs.
130: interrupted by Ctrl-C; what was written stays. 141: whoever read the output closed it.
"""


class Gi(TyperGroup):
    """Turns what a user can mend into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                done = super().invoke(ctx)
                sys.stdout.flush()
                return done
            except BrokenPipeError:
                raise typer.Exit(CLOSED_PIPE) from None
            except (typer.Exit, typer.Abort):  # RuntimeErrors both
                raise
            except KeyboardInterrupt:
                _complain("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except FloatingPointError as error:
                _complain(f"the attack failed: {error}")
                raise typer.Exit(FAILED) from None
            except OSError as error:
                about = f"{error.strerror}: {error.filename}" if error.filename else error
                _complain(str(about))
                raise typer.Exit(BAD_INPUT) from None
            except (ValueError, RuntimeError, ImportError) as error:
                _complain(str(error))
                raise typer.Exit(BAD_INPUT) from None


def _complain(message: str) -> None:
    print("gi: " + " ".join(message.split()), file=sys.stderr)


def _warn(message: Warning | str, *rest: Any, **more: Any) -> None:
    print("gi: warning: " + " ".join(str(message).split()), file=sys.stderr)


app = typer.Typer(
    cls=Gi,
    help=MANUAL,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Root = Annotated[Path | None, typer.Option(help="The data root.", show_default="$GI_DATA, or the cache")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="a GPU where there is one")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gi {gi_lib.__version__}")
        raise typer.Exit


@app.callback()
def _gi(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


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
            _complain(f"the report of an earlier audit is kept: {out}")
        raise
    beside = auditing.write(out, found.page(), found.as_dict())
    width = shutil.get_terminal_size((100, 0)).columns
    print(f"{model}: {found.headline}")
    for text in found.care:
        _complain(f"warning: {text}")
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


DEFAULT_CLASSES = 10
"""Of a model that takes any number of classes."""
MOST_INDICES = 4096


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


@app.command()
def run(
    studies: Annotated[
        list[Path],
        typer.Argument(help="Python files with a list CASES each, which are executed, or a folder of them."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for NAME.jsonl and the pictures.",
            show_default="results; own_results, where results are the survey's and the study is not",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 1,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which a case is ended and counts as failed.", show_default="the study's LIMIT"
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Of all cases the one that a record names by its key or its case; may be repeated."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what is left to run and how long it takes, and end.")
    ] = False,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Run on Dask: a scheduler's address, a scheduler file, or `local`.", show_default="processes"
        ),
    ] = None,
    root: Root = None,
    device: Device = None,
) -> None:
    """Run what is missing of studies; failed cases are tried again.

    The files are executed as Python: run only studies that you trust. Each case runs in a worker process: one
    that runs out of memory, aborts or takes too long fails alone. Ctrl-C stops it: what is done is kept, and the same
    command goes on. Several studies are one queue: stage by stage, and within a stage the cheapest case first.

    \b
    gi run experiments/dlg.py --plan
    gi run experiments/dlg.py --workers 4 --limit 3600 --out /tmp/results
    gi run experiments --workers 2
    gi run experiments/dlg.py --only 5b504d39a684 --out again
    """
    from gi_lib import bench, provenance, results

    files = _study_files(studies)
    loaded = _load(files, only)
    out = out or _results_of(files)
    if not any(cases for cases, _ in loaded.values()):
        raise ValueError(
            f"{', '.join(map(str, files))} needs a list CASES of gi_lib.bench.Case with at least one entry; a study"
            " whose cases wait for the records of another is run together with that one: gi run experiments"
        )
    paths = {file: out / f"{file.stem}.jsonl" for file in files}
    several = len(files) > 1
    where = out if several else paths[files[0]]
    if plan:
        cases = [case for file in files for case in bench.missing(loaded[file][0], paths[file])]
        total = sum(len({bench.key(case) for case in cases}) for cases, _ in loaded.values())
        known = bench.by_records(_records(out)) if several else None
        _print_plan(bench.plan(cases, root, provenance.choose_device(device), known), total, workers, by_stage=several)
        return
    limits = [own for _, own in loaded.values() if own is not None]
    own_limit = max(limits) if len(limits) == len(loaded) else None
    try:
        if dask is not None:
            if limit is not None:
                raise ValueError("--limit is for this machine's processes; Dask has limits of its own")
            if own_limit is not None:
                _complain(
                    f"the study's LIMIT of {own_limit} seconds does not hold on Dask, which has limits of its own"
                )
            engine: Any = bench.cluster(dask, workers)
        else:
            engine = bench.pool(workers, own_limit if limit is None else limit)
        tried: set[str] = set()
        with engine as executor:
            while left := [
                (case, file)
                for file, (cases, _) in loaded.items()
                for case in bench.missing(cases, paths[file])
                if bench.key(case) not in tried
            ]:
                if several:
                    left = _next(left, bench.by_records(_records(out)), PORTION * workers)
                tried |= {bench.key(case) for case, _ in left}
                now = {paths[file]: [case for case, owner in left if owner == file] for _, file in left}
                bench.queue(now, executor=executor, root=root, device=device, each=_unchanged(files))
                # Records may have brought a study new cases, as those of a tuning do.
                loaded = _load(files, only)
    except KeyboardInterrupt:
        there = (path for path in paths.values() if path.exists())
        kept = sum(row["status"] == "ok" for path in there for row in results.rows(path))
        _complain(f"interrupted; {kept} finished cases are kept in {where}, the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    rows = {file: results.by_key(paths[file]) for file in files}
    wanted = dict.fromkeys((file, bench.key(case)) for file, (cases, _) in loaded.items() for case in cases)
    _report([rows[file][name] for file, name in wanted], where)


def _records(out: Path) -> "Iterator[Record]":
    from gi_lib import results

    for path in sorted(out.glob("*.jsonl")):
        yield from results.rows(path)


PORTION = 8
"""How many cases of several studies a worker is given before their files are looked into again."""


def _next(left: "list[tuple[Case, Path]]", estimate: "Estimate", most: int) -> "list[tuple[Case, Path]]":
    """Of the earliest stage the cheapest cases; what no record tells comes first, and tells the rest."""
    stage = min(case.stage for case, _ in left)
    return sorted((pair for pair in left if pair[0].stage == stage), key=lambda pair: estimate(pair[0]) or 0.0)[:most]


def _load(files: Sequence[Path], only: Sequence[str] | None) -> "dict[Path, tuple[list[Case], float | None]]":
    """CASES and LIMIT of each study; of the cases those that `only` names, by a record's key or case."""
    loaded = {file: load_study(file) for file in files}
    if not only:
        return loaded
    from gi_lib.bench.cases import identity, key

    names = {id(case): {key(case), identity(case)} for cases, _ in loaded.values() for case in cases}
    known = set().union(*names.values())
    if unknown := [name for name in only if name not in known]:
        raise ValueError(
            f"no case of {', '.join(map(str, files))} is {unknown[0]!r:.60}; take the key or the case of a record of"
            " that study. A case that the study had once is in the commit that its record names"
        )
    return {
        file: ([case for case in cases if names[id(case)] & set(only)], limit)
        for file, (cases, limit) in loaded.items()
    }


def _unchanged(files: Sequence[Path]) -> Callable[[], None]:
    """ValueError, once a study's file is another than now."""
    given = {file: file.read_bytes() for file in files}

    def check() -> None:
        for file, content in given.items():
            if not file.is_file() or file.read_bytes() != content:
                raise ValueError(
                    f"{file} has changed while its cases run; what is done is kept. Start the same command again: it"
                    " goes on with the cases of the new file"
                )

    return check


def _results_of(files: Sequence[Path]) -> Path:
    """Where records of these studies go: those of a checkout's experiments into its results, others never there."""

    def checkout(folder: Path) -> bool:
        return (folder / "gi_lib" / "cli.py").is_file() and (folder / "experiments").is_dir()

    here, homes = Path.cwd(), {file.resolve().parent for file in files}
    if all(home.name == "experiments" and checkout(home.parent) for home in homes) and len(homes) == 1:
        [home] = homes
        return Path("results") if home.parent == here else home.parent / "results"
    return Path("own_results" if checkout(here) else "results")


def _study_files(given: Sequence[Path]) -> list[Path]:
    """The files themselves, and of a folder those that name CASES."""
    files = []
    for path in given:
        if path.is_dir():
            found = [file for file in sorted(path.glob("*.py")) if _names_cases(file)]
            if not found:
                raise FileNotFoundError(f"no Python file in {path} has a list CASES; name a study, or another folder")
            files += found
        else:
            files.append(path)
    return files


def _names_cases(file: Path) -> bool:
    return bool(re.search(r"^CASES\b", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))


def _report(records: "Sequence[Record]", where: Path) -> None:
    counts = {status: sum(row["status"] == status for row in records) for status in ("ok", "not applicable", "failed")}
    said = ", ".join(f"{n} {status}" for status, n in counts.items() if n or status == "ok")
    print(f"{said}, of {len(records)} cases; records: {where}")
    for row in records:
        if row["status"] == "failed":
            _complain(f"failed: {row['attack']} on {row['model']}, {row['dataset']} {row['indices']}: {row['error']}")
    if counts["failed"]:
        raise typer.Exit(FAILED)


def _print_plan(cells: "Sequence[Cell]", total: int, workers: int, *, by_stage: bool) -> None:
    """Cell by cell; of several studies stage by stage."""
    if by_stage:
        for stage in sorted({cell.stage for cell in cells}):
            part = [cell for cell in cells if cell.stage == stage]
            print(f"stage {stage}: {sum(cell.cases for cell in part)} cases, {_hours(part):.2f} hours")
    for cell in cells:
        if cell.reason is not None:
            print(f"{cell.cases:5d} do not run  {cell.name}: {' '.join(cell.reason.split())}")
        elif not by_stage:
            print(f"{cell.cases:5d} x {cell.seconds:8.1f} s  {cell.name}")
    left = sum(cell.cases for cell in cells)
    runs, hours = sum(cell.cases for cell in cells if cell.reason is None), _hours(cells)
    print(
        f"{total - left} of {total} cases are done; {runs} run, {left - runs} do not;"
        f" about {hours:.2g} hours of one process, {hours / workers:.2g} with {workers}"
    )


def _hours(cells: "Sequence[Cell]") -> float:
    return sum(cell.cases * cell.seconds for cell in cells if cell.seconds is not None) / 3600


def load_study(path: Path) -> "tuple[list[Case], float | None]":
    """CASES of a Python file, and its LIMIT in seconds, if it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be run, or has no CASES.
    """
    import runpy

    from gi_lib.bench import Case

    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("experiments").glob("*.py")))
        raise FileNotFoundError(f"there is no study at {path}{known and '; known: ' + known}")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)  # where the study's own modules lie
    try:
        found = runpy.run_path(str(path))
        cases = list(found.get("CASES") or ())
    except Exception as error:
        raise ValueError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    if "CASES" not in found or not all(isinstance(case, Case) for case in cases):
        raise ValueError(f"{path} needs a list CASES of gi_lib.bench.Case with at least one entry")
    limit = found.get("LIMIT")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
        raise ValueError(f"{path}: LIMIT is a number of seconds > 0, or None, got {limit!r:.60}")
    return cases, limit


@app.command()
def check(
    study: Annotated[Path, typer.Argument(help="A Python file with a list CASES; it is executed.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of NAME.jsonl and the pictures.", show_default="as `gi run`")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="How many cases are run again, spread over the cells.")] = 3,
    seed: Annotated[int, typer.Option(help="Draws another sample.")] = 0,
    cheapest: Annotated[
        bool, typer.Option("--cheapest", help="Of each cell the cheapest case, the cheapest cells first.")
    ] = False,
    tolerance: Annotated[float, typer.Option(min=0, help="dB between a record and its rerun elsewhere.")] = 0.5,
    root: Root = None,
    device: Device = None,
) -> None:
    """Check the records of a study against its cases, data and pictures, and run a sample again.

    Each case needs a record of the present revision. Hash, floor, chance, PSNR and identification are told again from
    the data and the saved picture, for every record. A rerun must give the same digits with the same versions on the
    same device; elsewhere float32 is rounded otherwise, and its PSNR may differ by the tolerance. The file is
    executed as Python: check only studies that you trust. Exits with 1 where there is a problem.

    \b
    gi check experiments/dlg.py
    gi check experiments/dlg.py --sample 10 --seed 7 --tolerance 1
    """
    from gi_lib import bench

    cases, _ = load_study(study)
    report = bench.check(
        cases,
        (out or _results_of([study])) / f"{study.stem}.jsonl",
        sample=sample,
        seed=seed,
        cheapest=cheapest,
        tolerance=tolerance,
        root=root,
        device=device,
    )
    for problem in report.problems:
        _complain(problem)
    print(
        f"{report.present} of {report.cases} cases have a record of this revision; {report.compared} compared with"
        f" data and picture; {report.reruns} run again, {report.identical} with the same digits;"
        f" {len(report.problems)} problem{'s' if len(report.problems) != 1 else ''}"
    )
    if report.problems:
        raise typer.Exit(FAILED)


class Form(StrEnum):
    text = "text"
    csv = "csv"
    json = "json"
    md = "md"


@app.command()
def table(
    path: Annotated[Path, typer.Argument(help="A file of records, or a folder of them.")] = Path("results"),
    by: Annotated[
        str | None,
        typer.Option(
            help="Columns of the records that make a group; unless named: attack, model, weights, dataset, threat,"
            " and what else differs within such a group."
        ),
    ] = None,
    form: Annotated[
        Form, typer.Option("--format", help="text fits the terminal; the others have every column.")
    ] = Form.text,
) -> None:
    """Summarise records, one line a group.

    Shows ok of n cases; means over images of PSNR, with its 95 % interval, of decibels above the floor, SSIM and
    LPIPS; the share identified and of labels found; medians of seconds, steps, and the cost in training steps. The
    text leaves out what a terminal has no room for, and says so.

    \b
    gi table results/dlg.jsonl
    gi table results --by attack,threat_letter,defense
    """
    from gi_lib import results

    columns = None if by is None else [name.strip() for name in by.split(",")]
    frame = results.read(path)
    columns = results.usual_groups(frame) if columns is None else columns
    summary = results.summarise(frame, columns)
    if form == Form.text:
        for line in _fitting(summary, columns, shutil.get_terminal_size((120, 0)).columns):
            print(line)
    elif form == Form.csv:
        print(summary.to_csv(index=False), end="")
    elif form == Form.json:
        print(summary.to_json(orient="records", indent=1, force_ascii=False))
    else:
        for line in _markdown(summary):
            print(line)


def _fitting(summary: "pd.DataFrame", by: Sequence[str], width: int) -> Iterator[str]:
    """Lines of at most `width`: first what all groups share, then a table of what there is room for."""
    shared = [name for name in by[1:] if summary[name].nunique(dropna=False) == 1]
    if shared:
        said = "all: " + ", ".join(f"{name} {_cell(summary[name].iloc[0])}" for name in shared)
        yield from textwrap.wrap(said, width, subsequent_indent="     ")
    names = [name for name in by if name not in shared]
    columns = {name: [_cell(value) for value in summary[name]] for name in names}
    most = {name: max(map(len, [name, *values])) for name, values in columns.items()}
    while sum(most.values()) > max(8 * len(names), width - 34) - 2 * len(names):  # the numbers need the rest
        most[max(most, key=lambda name: most[name])] -= 1
    columns = {name: [_cut(value, most[name]) for value in values] for name, values in columns.items()}
    columns["ok"] = [f"{row.ok}/{row.n}" for row in summary.itertuples()]
    for name, digits in NUMBERS.items():
        columns[name] = [_cell(value, digits) for value in summary[name]]
        if name in ("psnr", "above"):
            bounds = zip(summary[f"{name}_low"], summary[f"{name}_high"], strict=True)
            columns[f"{name} 95 %"] = [f"{_cell(low, digits)} to {_cell(high, digits)}" for low, high in bounds]
    widths = {name: max(map(len, [name, *values])) for name, values in columns.items()}
    shown, room = [*names, "ok"], width - sum(widths[name] + 2 for name in [*names, "ok"])
    for name in ("identified", "above", "psnr", *(name for name in columns if name not in shown)):
        if name not in shown and room >= widths[name] + 2:
            shown.append(name)
            room -= widths[name] + 2
    shown = [name for name in columns if name in shown]
    for row in (shown, *zip(*(columns[name] for name in shown), strict=True)):
        cells = (
            value.ljust(widths[name]) if name in names else value.rjust(widths[name])
            for name, value in zip(shown, row, strict=True)
        )
        yield "  ".join(cells).rstrip()
    if left := [name for name in columns if name not in shown]:
        said = f"no room for {', '.join(left)}; a wider terminal, fewer columns by --by, or --format csv shows them"
        yield from textwrap.wrap(said, width)


NUMBERS = {
    "identified": ".0%",
    "chance": ".1%",
    "above": "+.1f",
    "psnr": ".1f",
    "ssim": ".3f",
    "lpips": ".3f",
    "label_accuracy": ".0%",
    "recall": ".0%",
    "seconds": ".3g",
    "steps": ",.0f",
    "training_steps": ",.0f",
    "gradient_evaluations": ",.0f",
    "images": ",.0f",
}
"""Columns of a summary as `gi table` prints them."""


def _cell(value: object, digits: str = "") -> str:
    missing = value is None or value != value
    return "-" if missing else format(value, digits) if digits else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _markdown(summary: "pd.DataFrame") -> Iterator[str]:
    yield "| " + " | ".join(summary.columns) + " |"
    yield "| " + " | ".join("---" for _ in summary.columns) + " |"
    for row in summary.itertuples(index=False):
        cells = (_cell(value, ".4g" if isinstance(value, float) else "") for value in row)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@app.command()
def score(
    path: Annotated[Path, typer.Argument(help="A file of records, or a folder of them.")] = Path("results"),
    root: Root = None,
) -> None:
    """Fill in missing LPIPS from the saved pictures.

    A run that can't have LPIPS leaves it empty. This needs the package lpips, and AlexNet's weights in the
    data root or by download.
    """
    from gi_lib import bench

    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    left = 0
    for file in files:
        filled, missing = bench.score(file, root)
        left += missing
        print(f"{file}: {filled} filled in, {missing} still missing")
    if left:
        raise typer.Exit(FAILED)


class Kind(StrEnum):
    attacks = "attacks"
    models = "models"
    datasets = "datasets"
    defenses = "defenses"


@app.command("list")
def list_(kind: Annotated[Kind | None, typer.Argument(show_default="all four")] = None) -> None:
    """List attacks, models, datasets and defenses, with what each needs."""
    width = max(60, shutil.get_terminal_size((100, 0)).columns)
    for wanted in [kind] if kind else list(Kind):
        if not kind:
            print(f"{wanted.value}:")
        for name, about in LISTS[wanted]():
            indent = f"  {name:<22}"
            for line in about:
                print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=" " * 24))
                indent = " " * 24


Entries = Iterator[tuple[str, list[str]]]


def _first_line(thing: object) -> str:
    import inspect

    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _attacks() -> Entries:
    from gi_lib.attacks import ATTACKS

    for name, cls in ATTACKS.items():
        yield name, [_first_line(sys.modules[cls.__module__]), f"needs {cls.needs}"]


def _models() -> Entries:
    from gi_lib import models

    for name, entry in models.MODELS.items():
        about = [entry.about.partition("\n")[0], _first_line(entry.initialise)]
        for weights, w in models.WEIGHTS.items():
            if w.model == name:
                about.append(f"--weights {weights}: {w.source}; needs weights/{w.file} in the data root")
        yield name, about
    yield "torchvision:NAME", ["a classifier of torchvision, untrained, with its normalisation"]
    yield "timm:NAME", ["a classifier of timm, which must be installed"]
    yield "module:factory", ["your own: factory(num_classes, image_shape) -> torch.nn.Module"]


def _datasets() -> Entries:
    from gi_lib import data

    for name, spec in data.DATASETS.items():
        yield name, [spec.about, f"from {spec.source}; licence: {spec.licence}"]


def _defenses() -> Entries:
    from gi_lib.defenses import DEFENSES

    for name, cls in DEFENSES.items():
        yield name, [_first_line(cls)]


LISTS = {Kind.attacks: _attacks, Kind.models: _models, Kind.datasets: _datasets, Kind.defenses: _defenses}


def main() -> None:
    """What the installed `gi` runs."""
    sys.path.append("")  # a user's own models and attacks lie where the command is given
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no letter for a name shows a question mark
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read it has enough; Python would complain once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
