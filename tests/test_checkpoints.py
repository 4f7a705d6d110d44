"""Checkpoints: a name with its hash stands for one set of numbers for ever."""

import pytest
import torch

from gi_lib import checkpoints

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1], dtype=torch.int64)}


def test_what_is_saved_is_loaded_by_its_hash(tmp_path):
    reference = checkpoints.save("net", TENSORS, tmp_path)
    assert reference.startswith("net@") and (tmp_path / f"{reference}.safetensors").is_file()
    found = checkpoints.load(reference, tmp_path)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[k], v) for k, v in TENSORS.items())
    assert checkpoints.save("net", TENSORS, tmp_path) == reference
    assert checkpoints.save("net", {"a": TENSORS["a"] + 1}, tmp_path) != reference


def test_a_view_and_a_parameter_are_saved_as_what_they_show(tmp_path):
    reference = checkpoints.save("net", {"a": torch.nn.Parameter(TENSORS["a"]).T}, tmp_path)
    assert torch.equal(checkpoints.load(reference, tmp_path)["a"], TENSORS["a"].T)


def test_a_file_that_has_changed_is_refused(tmp_path):
    reference = checkpoints.save("net", TENSORS, tmp_path)
    other = checkpoints.save("net", {"a": torch.ones(1)}, tmp_path)
    (tmp_path / f"{other}.safetensors").replace(tmp_path / f"{reference}.safetensors")
    with pytest.raises(ValueError, match=f"has changed since it was made: its content is @{other[4:]}"):
        checkpoints.load(reference, tmp_path)


def test_a_checkpoint_that_is_not_there_says_what_is(tmp_path):
    reference = checkpoints.save("net", TENSORS, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"of this name there are: {reference}"):
        checkpoints.load("net@00000000", tmp_path)
    with pytest.raises(FileNotFoundError, match="there are: none"):
        checkpoints.load("other@00000000", tmp_path)


@pytest.mark.parametrize("reference", ["net", "net@", "net@xyz", "../net@00000000", "net@000000000", 3])
def test_a_reference_of_another_form_is_refused(reference, tmp_path):
    with pytest.raises(ValueError, match="names no checkpoint; write name@hash, with 8 hexadecimal digits"):
        checkpoints.load(reference, tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", 3])
def test_a_bad_name_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a checkpoint's name is made of letters"):
        checkpoints.save(name, TENSORS, tmp_path)


def test_what_is_made_once_is_found_again_and_made_anew_where_its_recipe_changes(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": torch.full((2,), float(len(made)))}

    first, reference = checkpoints.cached("prior", ("recipe 1", "data abc"), make, tmp_path)
    again, same = checkpoints.cached("prior", ("recipe 1", "data abc"), make, tmp_path)
    assert reference == same and torch.equal(first["a"], again["a"]) and len(made) == 1
    other, another = checkpoints.cached("prior", ("recipe 2", "data abc"), make, tmp_path)
    assert another != reference and other["a"].tolist() == [2, 2] and len(made) == 2
    assert checkpoints.cached("prior", ("recipe 1data", " abc"), make, tmp_path)[1] != reference


def test_a_checkpoint_says_where_it_comes_from(tmp_path):
    first, second = (checkpoints.save("net", TENSORS, tmp_path, origin=origin) for origin in (None, "data abc"))
    assert first != second
    assert (checkpoints.origin(first, tmp_path), checkpoints.origin(second, tmp_path)) == (None, "data abc")
    assert torch.equal(checkpoints.load(second, tmp_path)["a"], TENSORS["a"])


@pytest.mark.parametrize("damage", ["delete", "change"])
def test_what_was_lost_or_damaged_is_made_anew(tmp_path, damage):
    _, reference = checkpoints.cached("prior", ("recipe",), lambda: TENSORS, tmp_path)
    path = tmp_path / f"{reference}.safetensors"
    path.unlink() if damage == "delete" else path.write_bytes(b"no")
    found, same = checkpoints.cached("prior", ("recipe",), lambda: TENSORS, tmp_path)
    assert same == reference and torch.equal(found["a"], TENSORS["a"])
