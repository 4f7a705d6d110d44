"""The study of what a vision transformer's gradient holds: its closed form, and that its parts agree."""

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "experiments" / "vit_account.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def run(script, out, *arguments):
    script["main"](["--dataset", "digits", "--out", str(out), *arguments])
    return {row["part"]: row for row in map(json.loads, out.read_text().splitlines())}


def test_patches_are_cut_and_joined(script):
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(script["joined"](script["cut"](images), 8), images)
    assert torch.equal(script["tiled"](images)[:, :, :4, :4], script["tiled"](images)[:, :, 4:, 4:])


def test_closed_form_is_exact_and_rows_say_what_made_them(script, tmp_path):
    rows = run(script, tmp_path / "vit.jsonl", "--parts", "tokens", "closed", "attack", "--steps", "2")
    exact, *noisy = [row["psnr"] for row in rows["closed"]["closed"]]
    assert exact > 80 > noisy[-1]
    assert 0 < min(rows["tokens"]["attention_entropy"]) <= max(rows["tokens"]["attention_entropy"]) <= 1
    assert rows["attack"]["steps"] == 2 and (tmp_path / "vit" / "untrained_0.png").is_file()
    for row in rows.values():
        assert row["versions"]["torch"] and row["device"] and row["started"] and row["hash"]


def test_energy_of_the_columns_is_that_of_the_directions(script, tmp_path):
    rows = run(script, tmp_path / "vit.jsonl", "--parts", "shares", "jacobian", "--probes", "16", "--chunk", "16")
    shares, whole = rows["shares"], rows["jacobian"]
    assert shares["pixels"] == whole["pixels"] == 64
    assert sum(whole["energy"]) / 64 == pytest.approx(shares["energy_of_unit"]["any"], rel=0.4)
    mean = whole["spectra"]["all"]["share_of_mean_patch"]
    assert shares["share_of_mean_patch"] == pytest.approx(mean, abs=0.1)
    assert whole["sketched_over_exact_energy"] == pytest.approx(1, abs=0.05)


def test_a_convolutional_network_has_a_jacobian_too(script, tmp_path):
    rows = run(script, tmp_path / "vit.jsonl", "--parts", "jacobian", "--networks", "lenet", "--double")
    assert rows["jacobian"]["spectra"]["all"]["rank_at"]["1e-05"] == 64
