"""The `gi` command: what it prints, what it writes, and how it ends."""

import tomllib
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import gi_lib
from gi_lib import bench, metrics, results
from gi_lib.attacks import ATTACKS
from gi_lib.cli import app, parse_indices
from gi_lib.data import DATASETS
from gi_lib.models import MODELS, WEIGHTS

STUDY = """
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case

CASES = [Case(InvertingGradients(steps=2), "lenet", "digits", (i,), profile="smoke") for i in range(3)]
"""


@pytest.fixture
def gi(tmp_path, monkeypatch):
    """Run `gi` in an empty folder, without LPIPS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "lpips", lambda *args, **kwargs: None)
    Path("tiny.py").write_text(STUDY)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_is_a_manual_page(gi):
    page = gi("--help").output
    for word in ("gi attack dlg", "gi run experiments", "GI_DATA", "Exit codes", "table", "score", "list"):
        assert word in page
    for command in ("attack", "run", "table", "score", "list"):
        done = gi(command, "--help")
        assert done.exit_code == 0
        assert len(done.output.splitlines()) > 5


def test_version_is_the_package_s(gi):
    assert gi("--version").output == f"gi {gi_lib.__version__}\n"
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project.get("version", gi_lib.__version__) == gi_lib.__version__


@pytest.mark.parametrize(("dataset", "size"), [("digits", 8), ("photos", 32)])
def test_attack_prints_scores_and_writes_the_picture(gi, dataset, size):
    done = gi("attack", "inverting_gradients", "--dataset", dataset, "--indices", "0-1", "--steps", 2, "--labels")
    assert done.exit_code == 0, done.output
    for word in ("PSNR", "SSIM", "LPIPS missing", "labels 100%", "training steps", "attack.png", "steps=2"):
        assert word in done.output
    zoom = 128 // size
    with Image.open("attack.png") as image:
        assert image.size == (2 * size * zoom, 2 * size * zoom)


def test_attack_on_fedavg(gi):
    done = gi("attack", "inverting_gradients", "--local-steps", 2, "--steps", 2, "--restarts", 2, "--out", "a.png")
    assert done.exit_code == 0, done.output
    assert Path("a.png").exists()


def test_a_warning_is_one_line(gi):
    done = gi("attack", "dlg", "--model", "mlp", "--steps", 1)
    assert done.exit_code == 0, done.output
    assert "gi: warning: DLG needs second derivatives" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", "dgl"], "no attack is called 'dgl'; did you mean 'dlg'?"),
        (["attack", "dlg", "--model", "lenett"], "did you mean 'lenet'?"),
        (["attack", "dlg", "--dataset", "digit"], "did you mean 'digits'?"),
        (["attack", "dlg", "--weights", "cifar10"], "no set of weights is called 'cifar10'"),
        (["attack", "dlg", "--indices", "a"], "is not a list of whole numbers such as 0,1 or 0-3"),
        (["attack", "dlg", "--indices", "999"], "index 999 is out of range"),
        (["attack", "dlg", "--device", "gpu"], "the device 'gpu' can't be used"),
        (["attack", "dlg", "--dataset", "mnist", "--root", "nowhere"], "nowhere"),
        (["attack", "dlg", "--steps", "1", "--out", "/proc/no/a.png"], "/proc/no"),
        (["run", "missing.py"], "there is no study at missing.py"),
        (["run", "empty.py"], "needs a list CASES"),
        (["run", "wrong.py"], "no model is called 'lenett'; did you mean 'lenet'?"),
        (["table", "nothing.jsonl"], "no records at nothing.jsonl"),
        (["score", "nothing.jsonl"], "no records at nothing.jsonl"),
    ],
)
def test_bad_input_ends_with_one_line_and_2(gi, arguments, message):
    Path("empty.py").write_text("")
    Path("wrong.py").write_text(STUDY.replace("lenet", "lenett"))
    done = gi(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("gi: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_run_table_score(gi, monkeypatch):
    done = gi("run", "tiny.py")
    assert done.exit_code == 0, done.output
    assert "3 of 3 cases ok; records: results/tiny.jsonl" in done.output
    assert len(list(Path("results/tiny").glob("*.png"))) == 3
    table = gi("table", "--by", "attack,model")
    assert "inverting_gradients" in table.output
    assert gi("table", "results/tiny.jsonl", "--by", "atack").exit_code == 2
    left = gi("score")
    assert left.exit_code == 1
    assert "0 filled in, 3 still missing" in left.output
    monkeypatch.setattr(metrics, "lpips", lambda a, b, root=None: metrics.mse(a, b))
    assert "3 filled in, 0 still missing" in gi("score", "results/tiny.jsonl").output


def test_failed_cases_are_listed_and_the_code_is_1(gi):
    Path("tiny.py").write_text(STUDY.replace("range(3)", "(0, 999)"))
    done = gi("run", "tiny.py", "--out", "elsewhere")
    assert done.exit_code == 1
    assert "1 of 2 cases ok; records: elsewhere/tiny.jsonl" in done.stdout
    assert "gi: failed: inverting_gradients on lenet, digits [999]: ValueError: index 999" in done.stderr


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(gi, monkeypatch):
    attempt, ran = bench.attempt, []

    def interrupted(case, *rest):
        ran.append(case)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return attempt(case, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "attempt", interrupted)
        done = gi("run", "tiny.py")
    assert done.exit_code == 130
    assert "2 finished cases are kept in results/tiny.jsonl, the same command goes on" in done.stderr
    assert len(results.rows(Path("results/tiny.jsonl"))) == 2
    assert "3 of 3 cases ok" in gi("run", "tiny.py").output


def test_ctrl_c_in_an_attack(gi, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "attempt", interrupted)
    done = gi("attack", "dlg")
    assert (done.exit_code, done.stderr) == (130, "gi: interrupted\n")


def test_list_has_everything_with_its_needs(gi):
    everything = gi("list").output
    for name in [*ATTACKS, *MODELS, *WEIGHTS, *DATASETS]:
        assert name in everything
    attacks = gi("list", "attacks").output
    assert "digits" not in attacks
    assert attacks.count("needs ") >= len(ATTACKS)
    assert gi("list", "atacks").exit_code == 2


def test_indices():
    assert parse_indices("0,2-4") == (0, 2, 3, 4)
    for wrong in ("", "1,", "-1", "1.5"):
        with pytest.raises(ValueError, match="not a list of whole numbers"):
            parse_indices(wrong)
