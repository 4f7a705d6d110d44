"""The `gi` command: what it prints, what it writes, and how it ends."""

import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import gi_lib
from gi_lib import bench, metrics, results
from gi_lib.attacks import ATTACKS
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
    for command in ("attack", "run", "check", "table", "score", "list"):
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
        ("dlg:lr", "settings are written field=value"),
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
    monkeypatch.setattr(metrics, "lpips", lambda a, b, root=None: metrics.mse(a, b))
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
    short, long = (float(lines[i].split()[2]) for i in (0, 2))
    assert long > 5 * short
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
