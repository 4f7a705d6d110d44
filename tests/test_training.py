"""The survey's trained networks: made by a recipe, kept in float16, found again, and named by a case."""

import dataclasses
import json
import os
import runpy
from pathlib import Path

import pytest
import torch
import typer

from gi_lib import checkpoints, data, metrics, models, results, training
from gi_lib.attacks import BiasRatio, InvertingGradients
from gi_lib.bench import Case, key, network, run
from gi_lib.bench.cases import identity
from gi_lib.training import Recipe

ROOT = Path(__file__).parents[1]
TINY = Recipe("mlp", "digits", epochs=2)
DIGITS = data.load("digits", split="train")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The project's folder of checkpoints, empty, and a recipe for the embedded digits."""
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    monkeypatch.setitem(training.RECIPES, ("mlp", "digits"), TINY)
    monkeypatch.setattr(metrics, "lpips", lambda *args, **kwargs: None)
    monkeypatch.delenv("GI_DATA", raising=False)
    return tmp_path


@pytest.fixture
def case(folder):
    return Case(BiasRatio(), "mlp", "digits", (0,), weights="trained", profile="smoke")


# Training


def test_what_is_trained_is_found_again(folder, monkeypatch):
    reference, now = training.train(TINY, DIGITS, folder)
    assert now and reference.startswith("mlp_digits@")
    monkeypatch.setattr(training, "fit", None)
    assert training.train(TINY, DIGITS, folder) == (reference, False)
    assert training.find(TINY, [folder / "other", folder]) == (reference, folder)


def test_it_learns_from_the_train_split_and_no_other(folder):
    reference, _ = training.train(TINY, DIGITS, folder)
    test = data.load("digits")
    assert training.accuracy(training.kept(TINY, reference, DIGITS, folder), test) > 0.7
    for wrong in (test, data.load("photos", split="train")):
        with pytest.raises(ValueError, match="on the train split of digits, got the .* load it with split='train'"):
            training.fit(TINY, wrong)


def test_it_is_trained_anew_on_other_images_and_the_file_says_on_which(folder):
    reference, _ = training.train(TINY, DIGITS, folder)
    assert checkpoints.origin(reference, folder) == DIGITS.hash(range(len(DIGITS)))
    fewer = dataclasses.replace(DIGITS, images=DIGITS.images[:256], labels=DIGITS.labels[:256])
    other, now = training.train(TINY, fewer, folder)
    assert now and other != reference and checkpoints.origin(other, folder) == fewer.hash(range(256))


def test_parameters_are_kept_in_float16_and_buffers_as_they_are(folder, monkeypatch):
    photos = dataclasses.replace(data.load("photos", split="train"), name="photos")
    recipe = Recipe("resnet20", "photos", epochs=1, batch=8)
    model = training.fit(recipe, photos)
    monkeypatch.setattr(training, "fit", lambda *args: model)
    reference, _ = training.train(recipe, photos, folder)
    tensors, state = checkpoints.load(reference, folder), model.state_dict()
    parameters = dict(model.named_parameters())
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name].half() if name in parameters else state[name])
    assert (tensors["net.bn1.running_mean"] != 0).any()
    loaded = training.kept(recipe, reference, photos, folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not loaded.training
    assert torch.allclose(loaded.mean.flatten(), torch.tensor(photos.mean))


def test_the_same_recipe_gives_the_same_bytes_and_touches_no_global_generator(tmp_path):
    recipe = dataclasses.replace(TINY, epochs=1, augmentation="flip and crop")
    before = torch.random.get_rng_state()
    first, second = (training.train(recipe, DIGITS, tmp_path / name)[0] for name in "ab")
    other, _ = training.train(dataclasses.replace(recipe, seed=1), DIGITS, tmp_path / "a")
    assert first == second != other
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("how", ["crop", "flip and crop"])
def test_an_augmented_image_is_a_piece_of_its_padded_original(rng, how):
    images = torch.rand(6, 2, 5, 7, generator=rng)
    moved = training.augmented(images, how, rng)
    assert moved.shape == images.shape and not torch.equal(moved, images)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for one, out in zip(padded, moved, strict=True):
        pieces = one.unfold(1, 5, 1).unfold(2, 7, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        candidates = torch.cat([pieces, pieces.flip(3)]) if how == "flip and crop" else pieces
        assert (candidates == out).flatten(1).all(1).any()
    assert training.augmented(images, "none", rng) is images


def test_training_that_diverges_is_an_error_and_leaves_nothing(folder):
    with pytest.raises(ValueError, match="the training of mlp_digits diverged; lower the recipe's rate"):
        training.train(dataclasses.replace(TINY, rate=1e8), DIGITS, folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "lenett"}, "did you mean 'lenet'"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"augmentation": "flip"}, "no augmentation is called 'flip'"),
        ({"epochs": 0}, "Recipe needs epochs, a whole number >= 1"),
        ({"batch": 0}, "Recipe needs batch"),
        ({"seed": -1}, "Recipe needs seed"),
        ({"rate": 0.0}, "Recipe needs rate, a finite number > 0"),
    ],
)
def test_a_recipe_checks_its_fields(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


# Cases


def test_the_key_has_the_recipes_hash_and_the_identity_has_not(case, monkeypatch):
    assert key(case) != key(dataclasses.replace(case, weights=None))
    before = key(case), identity(case), TINY.hash
    stated = dataclasses.replace(TINY, accuracy=0.9)
    monkeypatch.setitem(training.RECIPES, ("mlp", "digits"), stated)
    assert (key(case), stated.hash) == (before[0], before[2])  # what came of it changes nothing
    monkeypatch.setitem(training.RECIPES, ("mlp", "digits"), dataclasses.replace(TINY, epochs=3))
    assert key(case) != before[0] and identity(case) == before[1]


def test_every_field_and_both_revisions_change_a_recipes_hash(monkeypatch):
    changes = {
        "model": "lenet",
        "dataset": "mnist",
        "epochs": 3,
        "batch": 64,
        "rate": 0.1,
        "augmentation": "crop",
        "seed": 1,
    }
    assert changes.keys() | {"accuracy"} == {field.name for field in dataclasses.fields(Recipe)}
    hashes = {TINY.hash, *(dataclasses.replace(TINY, **{name: value}).hash for name, value in changes.items())}
    with monkeypatch.context() as patch:
        patch.setattr(training, "revision", training.revision + 1)
        hashes.add(TINY.hash)
    monkeypatch.setitem(models.MODELS, "mlp", dataclasses.replace(models.MODELS["mlp"], revision=9))
    assert len(hashes | {TINY.hash}) == len(changes) + 3


def test_the_record_says_which_bytes_were_used(folder, case, tmp_path):
    reference, _ = training.train(TINY, DIGITS, folder)
    untrained = dataclasses.replace(case, weights=None)
    by_hash = dataclasses.replace(case, weights=reference)
    rows = run([case, untrained, by_hash], tmp_path / "s.jsonl")
    assert [(row["status"], row["weights"], row["checkpoint"]) for row in rows] == [
        ("ok", "trained", reference),
        ("ok", None, None),
        ("ok", reference, reference),
    ]
    assert rows[0]["loss"] == rows[2]["loss"] and rows[0]["label_accuracy"] == 1
    assert results.read(tmp_path / "s.jsonl")["checkpoint"].fillna("").tolist() == [reference, "", reference]


def test_a_row_from_before_there_were_checkpoints_stays_valid(case, tmp_path):
    (row,) = run([dataclasses.replace(case, weights=None)], tmp_path / "s.jsonl")
    del row["checkpoint"]
    (tmp_path / "old.jsonl").write_text(json.dumps(row) + "\n")
    assert results.read(tmp_path / "old.jsonl")["checkpoint"].isna().all()


def test_they_are_found_in_the_data_root_too(folder, case, tmp_path):
    root = tmp_path / "root"
    reference, _ = training.train(TINY, DIGITS, root / folder.name)
    model = network(case, data.load("digits"), root)
    kept = checkpoints.load(reference, root / folder.name)
    assert torch.equal(model.state_dict()["net.1.weight"], kept["net.1.weight"].float())


def test_what_was_not_trained_yet_is_a_failure_with_the_command_that_makes_it(case, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trained mlp for digits \(recipe .*train.py mlp digits` makes it"):
        network(case, data.load("digits"), None)
    (row,) = run([case], tmp_path / "s.jsonl")
    assert row["status"] == "failed" and "`python experiments/train.py mlp digits` makes it" in row["error"]


def test_a_checkpoint_of_another_network_is_a_failure_with_its_remedy(folder, case, tmp_path):
    reference, _ = training.train(TINY, DIGITS, folder)
    wrong = dataclasses.replace(case, model="lenet", weights=reference, attack=InvertingGradients(steps=1))
    (row,) = run([wrong], tmp_path / "s.jsonl")
    assert row["status"] == "failed" and f"{reference} holds another network than lenet on digits" in row["error"]
    assert "or train this one by `python experiments/train.py lenet digits`" in row["error"]
    checkpoints.point("mlp_digits", TINY.hash, checkpoints.save("mlp_digits", {"a": torch.ones(1)}, folder), folder)
    with pytest.raises(ValueError, match="holds another network than mlp on digits"):
        network(case, data.load("digits"), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "train"}, "did you mean 'trained'"),
        ({"model": "lenet5"}, "no recipe that trains 'lenet5' on 'digits'; .*--epochs 20` trains others"),
        ({"dataset": "imagenet"}, "no recipe that trains 'mlp' on 'imagenet'"),
        ({"size": 16}, "mlp was trained on digits at 8 px, not at 16; leave size out"),
    ],
)
def test_a_case_that_nothing_was_trained_for_is_refused(case, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(case, **change)


# The command


def command(*arguments):
    app = typer.Typer()
    app.command()(runpy.run_path(str(ROOT / "experiments" / "train.py"))["main"])
    return app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_trains_writes_down_and_finds_again(folder, tmp_path, capsys):
    log = tmp_path / "log" / "training.jsonl"
    options = ("--out", folder, "--log", log, "--device", "cpu")
    for _ in range(2):
        command("mlp", "digits", *options)
    first, second = capsys.readouterr().out.splitlines()
    assert second == f"{first}, found again"
    (row,) = map(json.loads, log.read_text().splitlines())
    assert Recipe(**row["recipe"]) == TINY and row["recipe_hash"] == TINY.hash
    assert first.startswith(f"{row['checkpoint']}  {row['accuracy']:.1%} of ") and row["accuracy"] > 0.7
    assert row["bytes"] == (folder / f"{row['checkpoint']}.safetensors").stat().st_size
    assert row["data_hash"] == DIGITS.hash(range(len(DIGITS))) and row["minutes"] >= 0
    command("mlp", "digits", "--epochs", 1, *options)
    assert len(log.read_text().splitlines()) == 2
    assert training.find(TINY, [folder])[0] == row["checkpoint"]


def test_the_command_makes_those_that_are_missing(folder, tmp_path, capsys, monkeypatch):
    stated = dataclasses.replace(TINY, accuracy=0.9)
    never = Recipe("lenet", "digits", 1)
    monkeypatch.setattr(training, "RECIPES", {("mlp", "digits"): stated, ("lenet", "digits"): never})
    options = ("--out", folder, "--log", tmp_path / "training.jsonl", "--device", "cpu")
    command("missing", *options)
    assert [line.split("@")[0] for line in capsys.readouterr().out.splitlines()] == ["mlp_digits"]
    command("all", *options)
    assert [line.split("@")[0] for line in capsys.readouterr().out.splitlines()] == ["lenet_digits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["lenet"], "name the dataset as well"), (["missing", "mnist"], "leave the rest out, or name a model")],
)
def test_the_command_says_what_it_lacks(arguments, message):
    with pytest.raises(typer.BadParameter, match=message):
        command(*arguments)


# What is kept in the project

PAIRS = [(model, dataset) for model in ("lenet", "cnn6") for dataset in ("mnist", "cifar10", "cifar100")]


def test_there_is_a_recipe_for_each_of_the_surveys_networks():
    names = ("mlp", "lenet", "cnn6", "convnet", "vgg11", "resnet18", "resnet50", "vit")
    assert training.RECIPES.keys() == {(m, d) for m in names for d in ("mnist", "cifar10", "cifar100")}
    assert all(pair == (recipe.model, recipe.dataset) for pair, recipe in training.RECIPES.items())


def rows():
    lines = (ROOT / "results" / "trained_networks" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def log():
    return {row["recipe_hash"]: row for row in rows()}


@pytest.mark.parametrize("recipe", training.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_stated_accuracy_has_its_record(recipe):
    """The first training's; another machine's rounding ends within what 2,000 test images can tell."""
    reached = [row["accuracy"] for row in rows() if row["recipe_hash"] == recipe.hash]
    assert (not reached) == (recipe.accuracy is None)
    assert not reached or recipe.accuracy == reached[0]
    assert all(abs(other - reached[0]) < 0.035 for other in reached)


@pytest.mark.parametrize("pair", PAIRS, ids="_".join)
def test_the_small_networks_are_in_the_project(pair):
    recipe = training.RECIPES[pair]
    reference, folder = training.find(recipe)
    assert reference == log()[recipe.hash]["checkpoint"]
    assert (folder / f"{reference}.safetensors").stat().st_size < 3e6


@pytest.mark.parametrize("pair", PAIRS, ids="_".join)
def test_they_reach_their_accuracy_on_the_real_data(pair):
    if not os.environ.get("GI_DATA"):
        pytest.skip("needs the real datasets: set GI_DATA to a folder that has them")
    recipe = training.RECIPES[pair]
    test = data.load(recipe.dataset, root=os.environ["GI_DATA"])
    model = training.kept(recipe, *training.find(recipe)[:1], test)
    assert training.accuracy(model, test) == pytest.approx(recipe.accuracy, abs=0.005)
