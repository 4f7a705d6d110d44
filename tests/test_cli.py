"""The `gi` command: what it prints, what it writes, and how it ends."""

import csv
import io
import json
import os
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import gi_lib
from gi_lib import bench, metrics, results
from gi_lib.attacks import ATTACKS, BiasRatio
from gi_lib.cli import app, from_spec, parse_indices
from gi_lib.data import DATASETS
from gi_lib.defenses import DEFENSES
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
    monkeypatch.setattr(bench, "pool", lambda workers, limit=None: nullcontext())  # in this process, to be fast
    Path("tiny.py").write_text(STUDY)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_is_a_manual_page(gi):
    page = gi("--help").output
    for word in ("gi attack dlg", "gi run experiments", "GI_DATA", "Exit codes", "table", "gi check", "score", "list"):
        assert word in page
    assert "gi audit mymodule:net --update round.safetensors" in page
    for command in ("attack", "audit", "run", "check", "table", "score", "list"):
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
    words = ("PSNR", "SSIM", "LPIPS missing", "labels 100%", "training steps", "attack.png", "steps=2", "letter B")
    for word in (*words, "the image's mean colour", "chance", "returned 2 of 2 images"):
        assert word in done.output
    zoom = 128 // size
    with Image.open("attack.png") as image:
        assert image.size == (2 * size * zoom, 2 * size * zoom)


def test_attack_on_fedavg(gi):
    done = gi("attack", "inverting_gradients", "--local-steps", 2, "--steps", 2, "--restarts", 2, "--out", "a.png")
    assert done.exit_code == 0, done.output
    assert Path("a.png").exists()


def test_attack_through_a_defense_by_several_clients(gi):
    settings = ("--defense", "gaussian_noise:std=0.01", "--clients", 2, "--indices", "0-1", "--model", "mlp")
    done = gi("attack", "bias_ratio", *settings)
    assert done.exit_code == 0, done.output
    assert "the closed form does not hold here" in done.stderr


def test_attack_of_a_malicious_server_is_granted_what_it_needs(gi):
    done = gi("attack", "robbing_the_fed:bins=16,surrogates=500", "--indices", "0-3", "--model", "lenet")
    assert done.exit_code == 0, done.output
    assert "RobbingTheFed(bins=16, surrogates=500); ThreatModel(has_auxiliary_data=True, malicious_server=True)" in (
        done.output
    )
    assert "labels 100%" in done.output


def test_attack_on_a_librarys_model(gi):
    more = ("--model", "torchvision:resnet18", "--dataset", "photos", "--steps", 1, "--size", 16)
    done = gi("attack", "inverting_gradients", *more)
    assert done.exit_code == 0, done.output


def test_settings_follow_a_colon():
    assert from_spec("dlg:lr=0.5,history=7", ATTACKS, "attack", {"steps": 3}) == ATTACKS["dlg"](3, 0.5, history=7)
    assert from_spec("dp_sgd:expected_batch=None", DEFENSES, "defense") == DEFENSES["dp_sgd"]()
    for spec, message in [
        ("dlgg", "did you mean 'dlg'"),
        ("dlg:lr", "settings are written field=value, such as tv=.1, got 'lr'"),
        ("dlg:rate=1", "no setting of dlg is called 'rate'"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_spec(spec, ATTACKS, "attack")


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
        (["attack", "dlg", "--indices", "0-20000000"], "is more than 4096 images"),
        (["attack", "dlg", "--indices", "0-9999999999999999"], "is not a list of whole numbers"),
        (["attack", "dlg", "--steps", "0"], "DLG needs steps, a whole number >= 1, got 0"),
        (["attack", "bias_ratio", "--steps", "3"], "no setting of bias_ratio is called 'steps'"),
        (["attack", "dlg", "--defense", "noise"], "no defense is called 'noise'"),
        (["attack", "dlg", "--clients", "2"], "2 clients can't share 1 images"),
        (["attack", "dlg", "--model", "timm:no_such"], "no model of timm is called 'no_such'"),
        (["attack", "dlg", "--model", "nowhere:make"], "there is no make in a module nowhere"),
        (["attack", "idlg", "--indices", "0-1"], "IDLG takes one image, got batch_size=2"),
        (["run", "tiny.py", "--dask", "tcp://127.0.0.1:1", "--limit", "3"], "Dask has limits of its own"),
        (["attack", "dlg", "--device", "gpu"], "the device 'gpu' can't be used"),
        (["attack", "dlg", "--dataset", "mnist", "--root", "nowhere"], "nowhere"),
        (["attack", "dlg", "--steps", "1", "--out", "/proc/no/a.png"], "/proc/no"),
        (["run", "missing.py"], "there is no study at missing.py"),
        (["run", "empty.py"], "needs a list CASES"),
        (["run", "wrong.py"], "no model is called 'lenett'; did you mean 'lenet'?"),
        (["table", "nothing.jsonl"], "no records at nothing.jsonl"),
        (["score", "nothing.jsonl"], "no records at nothing.jsonl"),
        (["check", "missing.py"], "there is no study at missing.py"),
        (["check", "tiny.py"], "no records at results/tiny.jsonl"),
        (["attack", "dlg", "--set", "lr"], "settings are written field=value, such as tv=.1"),
        (["attack", "dlg", "--set", "rate=1"], "no setting of dlg is called 'rate'"),
        (["attack", "dlg", "--split", "val"], "no split is called 'val'"),
        (["attack", "dlg", "--images", "nowhere"], "there is no image and no folder at nowhere"),
        (["attack", "dlg", "--images", "tiny.py"], "tiny.py can't be decoded"),
        (["audit", "nowhere:net"], "there is no net in a module nowhere"),
        (["audit", "mlp", "--update", "nothing.safetensors", "--size", "8"], "is not a readable safetensors file"),
        (["audit", "mlp", "--weights", "tiny.py", "--size", "8"], "tiny.py does not hold the state of this model"),
        (["audit", "mlp", "--budget", "1e-9", "--size", "8"], "is too small for any search"),
        (["audit", "mlp", "--labels", "x", "--size", "8"], "--labels 'x' is not a list of whole numbers"),
        (["audit", "mlp", "--images", "nowhere", "--size", "8"], "there is no image and no folder at nowhere"),
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
    assert "3 ok, of 3 cases; records: results/tiny.jsonl" in done.output
    assert len(list(Path("results/tiny").glob("*.png"))) == 3
    table = gi("table", "--by", "attack,model")
    assert "inverting_gradients" in table.output
    assert gi("table", "results/tiny.jsonl", "--by", "atack").exit_code == 2
    left = gi("score")
    assert left.exit_code == 1
    assert "0 filled in, 3 still missing" in left.output
    monkeypatch.setattr(metrics, "lpips", lambda a, b, root=None, download=False: metrics.mse(a, b))
    assert "3 filled in, 0 still missing" in gi("score", "results/tiny.jsonl").output


def test_a_case_that_a_record_names_runs_alone(gi):
    gi("run", "tiny.py")
    row = results.rows(Path("results/tiny.jsonl"))[1]
    for name in (row["key"], row["case"]):
        done = gi("run", "tiny.py", "--only", name, "--out", name)
        assert done.exit_code == 0 and "1 ok, of 1 cases" in done.output
        (again,) = results.rows(Path(name) / "tiny.jsonl")
        assert (again["key"], again["psnr"]) == (row["key"], row["psnr"])
    done = gi("run", "tiny.py", "--only", row["key"], "--only", "0" * 12)
    assert done.exit_code == 2 and "no case of tiny.py is '000000000000'" in done.stderr


def test_check_counts_what_agrees_and_lists_what_does_not(gi):
    gi("run", "tiny.py")
    done = gi("check", "tiny.py", "--sample", 2, "--seed", 1, "--cheapest", "--device", "cpu")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        "3 of 3 cases have a record of this revision; 3 compared with data and picture;"
        " 2 run again, 2 with the same digits; 0 problems\n"
    )
    next(Path("results/tiny").glob("*.png")).unlink()
    done = gi("check", "tiny.py", "--sample", 0)
    assert done.exit_code == 1 and done.stdout.endswith("1 problem\n")
    assert done.stderr.startswith("gi: inverting_gradients on lenet, digits [") and "is missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_failed_cases_are_listed_and_the_code_is_1(gi):
    Path("tiny.py").write_text(STUDY.replace("range(3)", "(0, 999)"))
    done = gi("run", "tiny.py", "--out", "elsewhere")
    assert done.exit_code == 1
    assert "1 ok, 1 failed, of 2 cases; records: elsewhere/tiny.jsonl" in done.stdout
    assert "gi: failed: inverting_gradients on lenet, digits [999]: ValueError: index 999" in done.stderr


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(gi, monkeypatch):
    measure, ran = bench.measure, []

    def interrupted(case, *rest):
        ran.append(case)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return measure(case, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", interrupted)
        done = gi("run", "tiny.py")
    assert done.exit_code == 130
    assert "2 finished cases are kept in results/tiny.jsonl, the same command goes on" in done.stderr
    assert len(results.rows(Path("results/tiny.jsonl"))) == 2
    assert "3 ok, of 3 cases" in gi("run", "tiny.py").output


OTHER = STUDY.replace("steps=2", "steps=30").replace('profile="smoke"', 'profile="smoke", stage=2')


def test_a_folder_of_studies_is_one_queue(gi, monkeypatch):
    """Stage by stage, and within a stage what is cheapest by the records so far."""
    ran = []
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda case, *rest: ran.append(case.attack.steps) or measure(case, *rest))
    folder = Path("studies")
    folder.mkdir()
    (folder / "a.py").write_text(OTHER)
    (folder / "b.py").write_text(STUDY.replace("steps=2", "steps=9").replace("range(3)", "(0,)"))
    (folder / "c.py").write_text(STUDY)
    (folder / "script.py").write_text("raise SystemExit('no study')")
    gi("run", folder / "c.py")
    ran.clear()
    (folder / "c.py").write_text(STUDY.replace("range(3)", "range(5)"))
    done = gi("run", folder)
    assert done.exit_code == 0 and "9 ok, of 9 cases; records: results" in done.output
    assert ran == [2, 2, 9, 30, 30, 30]
    assert [len(results.rows(Path(f"results/{name}.jsonl"))) for name in "abc"] == [3, 1, 5]


def test_the_plan_of_several_studies_is_told_by_records(gi):
    Path("other.py").write_text(OTHER)
    gi("run", "tiny.py")
    done = gi("run", "tiny.py", "other.py", "--plan")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("stage 2: 3 cases, ") and "3 of 6 cases are done; 3 run, 0 do not" in lines[-1]
    assert not Path("results/other.jsonl").exists()


def test_an_evaluation_costs_what_records_of_any_attack_say(gi):
    gi("run", "tiny.py")
    rows = results.rows(Path("results/tiny.jsonl"))
    estimate = bench.by_records([{**row, "cpu_seconds": 6.0} for row in rows])
    case = bench.Case(ATTACKS["inverting_gradients"](steps=30), "lenet", "digits", (0,))
    assert rows[0]["gradient_evaluations"] == 3
    assert estimate(case) == 60.0
    assert estimate(bench.Case(ATTACKS["dlg"](steps=10), "lenet", "digits", (0,))) == 400.0
    assert estimate(bench.Case(ATTACKS["dlg"](steps=10), "mlp", "digits", (0,))) is None
    assert estimate(bench.Case(ATTACKS["bias_ratio"](), "lenet", "digits", (0,))) is None


def test_records_may_bring_a_study_new_cases(gi):
    Path("grows.py").write_text(
        STUDY.replace("range(3)", "range(2 if results.by_key(OWN) else 1)").replace(
            "\nCASES",
            "from pathlib import Path\nfrom gi_lib import results\nOWN = Path('results/grows.jsonl')\nCASES",
            1,
        )
    )
    done = gi("run", "grows.py")
    assert done.exit_code == 0 and "2 ok, of 2 cases" in done.output


def test_a_study_that_changes_while_it_runs_is_said_so(gi, monkeypatch):
    measure = bench.measure

    def changed(case, *rest):
        Path("tiny.py").write_text(STUDY + "# other\n")
        return measure(case, *rest)

    monkeypatch.setattr(bench, "measure", changed)
    done = gi("run", "tiny.py")
    assert done.exit_code == 2
    assert "tiny.py has changed while its cases run; what is done is kept. Start the same command again" in done.stderr
    assert len(results.rows(Path("results/tiny.jsonl"))) == 1
    assert "3 ok, of 3 cases" in gi("run", "tiny.py").output


def test_a_folder_without_a_study_is_said_so(gi):
    Path("empty").mkdir()
    done = gi("run", "empty")
    assert done.exit_code == 2 and "no Python file in empty has a list CASES" in done.stderr


def test_what_does_not_apply_is_counted_apart(gi):
    Path("tiny.py").write_text(
        STUDY.replace("range(3)", "(0,)") + "CASES += [Case(BiasRatio(), 'lenet', 'digits', (0,))]"
    )
    Path("tiny.py").write_text("from gi_lib.attacks import BiasRatio\n" + Path("tiny.py").read_text())
    done = gi("run", "tiny.py")
    assert done.exit_code == 0 and "1 ok, 1 not applicable, of 2 cases" in done.output


def test_cases_may_be_made_by_a_generator(gi):
    Path("tiny.py").write_text(
        STUDY.replace("CASES = [", "CASES = (").replace("for i in range(3)]", "for i in range(3))")
    )
    assert "3 ok, of 3 cases" in gi("run", "tiny.py").output


def test_a_plan_says_what_runs_what_does_not_and_how_long(gi):
    more = "CASES += [Case(BiasRatio(), 'lenet', 'digits', (i,)) for i in range(2)]\n"
    more += "CASES += [Case(InvertingGradients(steps=2000), 'lenet', 'digits', (i,)) for i in range(4)]\n"
    Path("tiny.py").write_text("from gi_lib.attacks import BiasRatio\n" + STUDY + more)
    done = gi("run", "tiny.py", "--plan", "--workers", 2)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == 4 and not Path("results").exists()
    assert lines[0].startswith("    3 x ") and "InvertingGradients(steps=2), lenet, untrained, digits" in lines[0]
    assert "    2 do not run  BiasRatio(), lenet" in lines[1] and "needs one on all 64 pixels" in lines[1]
    assert all(float(lines[i].split()[2]) >= 0 for i in (0, 2))  # how long; not which is longer
    assert "0 of 9 cases are done; 7 run, 2 do not; about" in lines[3] and "with 2" in lines[3]


def test_a_limit_of_the_study_is_taken(gi, monkeypatch):
    limits = []
    monkeypatch.setattr(bench, "pool", lambda workers, limit=None: limits.append(limit) or nullcontext())
    Path("tiny.py").write_text(STUDY + "LIMIT = 60\n")
    gi("run", "tiny.py")
    gi("run", "tiny.py", "--limit", 7)
    assert limits == [60, 7]


def test_a_study_that_another_process_runs_is_said_so(gi):
    out = Path("results/tiny.jsonl")
    code = (
        "import sys, pathlib; from gi_lib import bench\n"
        "with bench._only_run(pathlib.Path('results/tiny.jsonl')): print('held', flush=True); sys.stdin.read()"
    )
    held = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "held\n"
        done = gi("run", "tiny.py")
        assert done.exit_code == 2 and f"process {held.pid} on " in done.stderr and not out.exists()
        assert "is running this study; wait for it, or stop it, and run it again" in done.stderr
    finally:
        held.communicate("")
    assert gi("run", "tiny.py").exit_code == 0


def test_ctrl_c_in_an_attack(gi, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "attempt", interrupted)
    done = gi("attack", "dlg")
    assert (done.exit_code, done.stderr) == (130, "gi: interrupted\n")


def test_list_has_everything_with_its_needs(gi):
    everything = gi("list").output
    for name in [*ATTACKS, *MODELS, *WEIGHTS, *DATASETS, *DEFENSES, "torchvision:NAME"]:
        assert name in everything
    attacks = gi("list", "attacks").output
    assert "digits" not in attacks
    assert attacks.count("needs ") >= len(ATTACKS)
    assert gi("list", "atacks").exit_code == 2


def test_indices():
    assert parse_indices("0,2-4") == (0, 2, 3, 4)
    assert len(parse_indices("0-4095")) == 4096
    for wrong in ("", "1,", "-1", "1.5"):
        with pytest.raises(ValueError, match="not a list of whole numbers"):
            parse_indices(wrong)


def test_help_and_import_wait_for_nothing_heavy():
    """What is imported, since a time would depend on the machine."""
    heavy = "('torch', 'torchvision', 'pandas', 'scipy', 'skimage', 'numpy', 'pydantic')"
    code = f"import sys, gi_lib, gi_lib.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    later = "('torchvision', 'pandas', 'scipy.optimize', 'skimage', 'pydantic', 'matplotlib')"
    code = "import sys; from gi_lib import observe, evaluate, models, data; from gi_lib.attacks import DLG;"
    code += f"print([m for m in {later} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp932"])
def test_a_terminal_that_lacks_a_letter_shows_a_question_mark(encoding):
    code = "from gi_lib.cli import main; import sys; sys.argv = ['gi', 'list', 'datasets']; main()"
    environment = {"PYTHONIOENCODING": encoding, "PATH": "", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0 and b"H?ggstr?m" in done.stdout


@pytest.mark.parametrize("limit", ["'soon'", "0", "True", "-1"])
def test_a_limit_that_is_no_time_is_refused(gi, limit):
    Path("tiny.py").write_text(f"{STUDY}LIMIT = {limit}\n")
    done = gi("run", "tiny.py")
    assert done.exit_code == 2 and "LIMIT is a number of seconds > 0, or None" in done.stderr


def test_dask_says_that_the_studys_limit_does_not_hold(gi, monkeypatch):
    monkeypatch.setattr(bench, "cluster", lambda address, workers: nullcontext())
    Path("tiny.py").write_text(f"{STUDY}LIMIT = 9\n")
    assert "the study's LIMIT of 9 seconds does not hold on Dask" in gi("run", "tiny.py", "--dask", "local").stderr


def test_a_plan_goes_on_after_a_cell_that_fails_and_counts_a_case_once(gi):
    more = "CASES = [*CASES, *CASES, Case(InvertingGradients(), 'lenet', 'digits', (0,), weights='net@0123abcd')]\n"
    Path("tiny.py").write_text(STUDY + more)
    done = gi("run", "tiny.py", "--plan")
    assert done.exit_code == 0 and "there is no checkpoint" in done.stdout
    assert "0 of 4 cases are done; 3 run, 1 do not" in done.stdout


def test_models_and_attacks_lie_beside_the_study_or_where_the_command_is_given(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from gi_lib.attacks import DLG\nfrom torch import nn\n"
        "class Mine(DLG): pass\n"
        "def net(num_classes, image_shape): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    study = "from gi_lib.bench import Case\nfrom mine import Mine\n"
    study += "CASES = [Case(Mine(steps=1, max_iter=2), 'mine:net', 'digits', (0,))]\n"
    (tmp_path / "own.py").write_text(study)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [str(Path(sys.executable).with_name("gi"))]
    for arguments, folder in (
        (["attack", "dlg", "--steps", "1", "--model", "mine:net"], tmp_path),
        (["run", "../own.py"], elsewhere),
    ):
        done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def colours(path, *rgb):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (20, 12), rgb)
    image.paste((255, 255, 255), (12, 0, 20, 12))
    image.save(path)


def test_attack_on_images_of_ones_own(gi):
    colours(Path("mine/cats/a.png"), 200, 30, 10)
    colours(Path("mine/dogs/b.png"), 10, 30, 200)
    folder = gi("attack", "bias_ratio", "--model", "mlp", "--images", "mine", "--size", 8, "--indices", "1", "--json")
    assert folder.exit_code == 0, folder.output
    record = json.loads(folder.stdout)
    assert record["dataset"] == "folder:mine" and record["psnr"][0] > 60 and record["label_accuracy"] == 1
    with Image.open("attack.png") as picture:
        assert picture.getpixel((5, 5)) == (10, 30, 200) == picture.getpixel((5, 133))
    single = gi("attack", "robbing_the_fed", "--model", "mlp", "--images", "mine/cats/a.png", "--size", 8)
    assert single.exit_code == 0 and "recovered 100%" in single.output


def test_attack_takes_any_setting_and_a_split(gi):
    done = gi("attack", "inverting_gradients", "--set", "tv=.1", "--set", "steps=2", "--split", "train", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["attack_text"] == "InvertingGradients(steps=2, tv=0.1)" and record["split"] == "train"
    assert Path(record["picture"]).exists()


def test_attack_asks_nobody_for_lpips(tmp_path, monkeypatch):
    """Weights that are not in the data root are missing, not downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "_downloaded_alexnet", lambda: pytest.fail("it was downloaded"))
    done = CliRunner().invoke(app, ["attack", "bias_ratio", "--model", "mlp", "--root", str(tmp_path)])
    assert done.exit_code == 0 and "LPIPS missing" in done.stdout


@pytest.fixture
def records(gi):
    gi("run", "tiny.py")
    return gi


@pytest.mark.parametrize("columns", [60, 80, 120, 300])
def test_a_table_fits_the_terminal(records, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = records("table").stdout.splitlines()
    assert max(map(len, lines)) <= columns
    head = next(line.split() for line in lines if line.startswith("attack"))
    assert {"attack", "ok", "identified"} <= set(head) and lines[0].startswith("all: model lenet, weights -")
    missing = [line for line in lines if line.startswith("no room for")]
    assert bool(missing) == (columns < 300)


def test_a_table_as_csv_json_and_markdown_has_every_column(records):
    rows = list(csv.DictReader(io.StringIO(records("table", "--format", "csv").stdout)))
    assert rows[0]["attack"] == "inverting_gradients" and rows[0]["n"] == "3" and "psnr_low" in rows[0]
    [row] = json.loads(records("table", "--format", "json").stdout)
    assert row["n"] == 3 and row["psnr"] == pytest.approx(float(rows[0]["psnr"])) and row["lpips"] is None
    lines = records("table", "--format", "md").stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("| ") and line.count("|") == lines[0].count("|") for line in lines)
    assert records("table", "--format", "xml").exit_code == 2


def test_what_all_groups_share_is_said_once(records):
    Path("tiny.py").write_text(STUDY.replace("steps=2", "steps=3"))
    records("run", "tiny.py")
    first, head, *rest = records("table").stdout.splitlines()
    assert first.startswith("all: model lenet, weights -") and head.split()[:2] == ["attack", "attack_text"]
    assert len([line for line in rest if "InvertingGradients(steps=" in line]) == 2


def test_own_studies_do_not_land_among_the_surveys(gi, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    for name in ("gi_lib/__init__.py", "experiments/ours.py"):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).write_text(STUDY.replace("range(3)", "(0,)"))
    (checkout / "mine.py").write_text(STUDY.replace("range(3)", "(0,)"))
    monkeypatch.chdir(checkout)
    assert "records: own_results/mine.jsonl" in gi("run", "mine.py").stdout
    assert "records: results/ours.jsonl" in gi("run", "experiments/ours.py").stdout
    assert gi("check", "mine.py", "--sample", 0).exit_code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "records: results/mine.jsonl" in gi("run", checkout / "mine.py").stdout
    assert f"records: {checkout / 'results'}/ours.jsonl" in gi("run", checkout / "experiments/ours.py").stdout
    assert (elsewhere / "results/mine.jsonl").exists()


def command(*arguments, **environment):
    code = "import sys; from gi_lib.cli import main; sys.argv = ['gi', *sys.argv[1:]]; main()"
    path = os.pathsep.join(sys.path)
    return [sys.executable, "-c", code, *arguments], {"PATH": "", "PYTHONPATH": path, "COLUMNS": "100", **environment}


@pytest.mark.parametrize("arguments", [("list",), ("table", "tiny.jsonl"), ("--help",)])
def test_a_reader_who_has_enough_is_not_complained_to(records, arguments):
    Path("tiny.jsonl").write_bytes(Path("results/tiny.jsonl").read_bytes())
    line, environment = command(*arguments)
    running = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()  # before it has written anything
    assert running.stderr.read() == b""
    assert running.wait() != 2


def test_files_are_read_as_utf8_under_any_locale(gi):
    Path("studies").mkdir()
    Path("studies/umlaut.py").write_text(f"# H\u00e4ggstr\u00f6m\n{STUDY}", encoding="utf-8")
    line, environment = command("run", "studies", "--plan", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run(line, env=environment, capture_output=True)
    assert done.returncode == 0 and b"0 of 3 cases are done" in done.stdout, done.stderr


MINE = """
from torch import nn
def net(num_classes, image_shape):
    c, h, w = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, 16), nn.ReLU(), nn.Linear(16, num_classes))
"""


@pytest.fixture
def mine(gi, tmp_path, monkeypatch):
    Path("mymodule.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodule", raising=False)
    return gi


def test_audit_of_a_recorded_update_writes_a_report(mine):
    from mymodule import net

    torch.manual_seed(5)
    model = net(4, (3, 8, 8))
    loss = torch.nn.functional.cross_entropy(model(torch.rand(1, 3, 8, 8)), torch.tensor([2]))
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    save_file(model.state_dict(), "before.safetensors")
    save_file(dict(zip(model.state_dict(), gradient, strict=True)), "round.safetensors")
    more = ("--weights", "before.safetensors", "--classes", 4, "--size", 8, "--steps", 2, "--out", "report.html")
    done = mine("audit", "mymodule:net", "--update", "round.safetensors", *more)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("mymodule:net: Exposed: images come back from the update; labels leak;")
    assert "certain: the gradient of what came back is the recorded update." in " ".join(done.stdout.split())
    assert done.stdout.endswith("report: report.html, numbers: report.json\n")
    found = json.loads(Path("report.json").read_text(encoding="utf-8"))["findings"]
    assert [f["numbers"]["proven"] for f in found if f["numbers"]["kind"] == "labels"] == [[2]]
    assert "<h1>Is mymodule:net exposed?</h1>" in Path("report.html").read_text(encoding="utf-8")


def test_audit_on_images_of_ones_own_and_of_a_model_with_its_own_classes(mine):
    for i in range(3):
        colours(Path(f"photos/{i}.png"), 60 * i, 90, 20)
    Path("mymodule.py").write_text(MINE.replace("16, num_classes", "16, 6"))
    settings = ("--images", "photos", "--size", 8, "--steps", 1, "--clients", 1, "--defense", "gaussian_noise:std=0")
    done = mine("audit", "mymodule:net", *settings)
    assert done.exit_code == 0, done.output
    written = json.loads(Path("audit.json").read_text(encoding="utf-8"))
    facts = written["facts"]
    assert written["made"]["simulated on"] == "3 images of your own"
    assert {f["numbers"]["chance"] for f in written["findings"] if f["numbers"]["kind"] == "images"} == {1 / 31}
    assert facts["images"] == "3 x 8 x 8, 6 classes" and facts["defense of simulated clients"] == "GaussianNoise(std=0)"


def test_an_audit_that_can_not_run_says_so_in_its_report(gi):
    done = gi("audit", "nowhere:net", "--out", "report.html")
    assert done.exit_code == 2
    assert "there is no net in a module nowhere" in Path("report.html").read_text(encoding="utf-8")
    assert "there is no net" in json.loads(Path("report.json").read_text(encoding="utf-8"))["error"]


BAD = [
    (["nowhere:net"], "there is no net in a module nowhere"),
    (["broken:net"], "the module broken can't be imported: SyntaxError"),
    (["leaving:net"], "the module leaving can't be imported: SystemExit: 3"),
    (["mymodule:net", "--update", "other.safetensors"], "the update does not fit the model"),
    (["mymodule:net", "--update", "nothing.safetensors"], "nothing.safetensors is not a readable safetensors file"),
    (["mymodule:net", "--budget", "1e-9"], "a budget of 1e-09 s is too small for any search"),
    (["mymodule:net", "--images", "nothing"], "there is no image and no folder at nothing"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_failing_audit_is_a_sentence_and_spares_an_earlier_report(mine, arguments, message):
    Path("broken.py").write_text("def net(:")
    Path("leaving.py").write_text("raise SystemExit(3)")
    save_file({"0.weight": torch.zeros(2)}, "other.safetensors")
    line = ("audit", *arguments, "--classes", 4, "--size", 8)
    (found,) = [text for text in mine(*line).stderr.splitlines() if text.startswith("gi: ")]
    assert message in found
    assert message in json.loads(Path("audit.json").read_text(encoding="utf-8"))["error"]
    assert "The audit did not run." in Path("audit.html").read_text(encoding="utf-8")
    Path("audit.html").write_text("a report")
    Path("audit.json").write_text('{"name": "net", "headline": "Exposed"}')
    done = mine(*line)
    assert done.exit_code == 2 and message in done.stderr and "an earlier audit is kept: audit.html" in done.stderr
    assert Path("audit.html").read_text() == "a report" and "Exposed" in Path("audit.json").read_text()
    assert not list(Path().glob(".*.part"))


def test_an_audit_that_is_interrupted_writes_nothing(mine, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(BiasRatio, "__call__", interrupted)
    done = mine("audit", "mymodule:net", "--size", 8, "--steps", 1)
    assert done.exit_code == 130 and not list(Path().glob("*audit*"))


def test_an_audit_whose_report_has_a_folder_s_name_is_refused_at_once(mine):
    Path("audit.json").mkdir()
    done = mine("audit", "mymodule:net", "--size", 8)
    assert done.exit_code == 2 and "audit.json is a folder; name another file" in done.stderr
    assert not Path("audit.html").exists()


def test_records_that_are_not_there_are_a_sentence(gi):
    for command in ("table", "score"):
        done = gi(command, "nothing.jsonl")
        assert done.exit_code == 2 and "nothing.jsonl" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path("nothing.jsonl").exists()
