"""What gives other numbers than before has another revision, so that its records are made anew."""

import json

import pytest
import torch

from tests import golden

STORED = json.loads(golden.FILE.read_text())


def test_everything_with_a_revision_has_an_entry():
    assert STORED.keys() == golden.ENTRIES.keys()
    assert golden.SETTINGS.keys() == golden.ATTACKS.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", golden.ENTRIES)
def test_the_numbers_are_those_of_this_revision(name):
    now, before = golden.ENTRIES[name](), STORED[name]
    assert now["revision"] == before["revision"], f"write the new numbers: python tests/golden.py {name!r}"
    values, expected = (torch.tensor(entry["values"], dtype=torch.float64) for entry in (now, before))
    if values.shape != expected.shape or not torch.allclose(values, expected, rtol=1e-6, atol=1e-8):
        pytest.fail(
            f"{name} gives other numbers than revision {before['revision']} did: mend it; or, where they are meant to"
            f" differ, raise its revision and write the new numbers: python tests/golden.py {name!r}"
        )
