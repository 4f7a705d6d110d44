"""Figures, tables and the slider: what they contain, and what they must not."""

import base64
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from gi_lib import metrics, pages, plots, results
from gi_lib.attacks import ATTACKS, InvertingGradients
from gi_lib.bench import Case, run
from gi_lib.pages import BOARD, explorer, leaderboard, png
from gi_lib.results import export

OUTSIDE = re.compile(r"https?://|//cdn|@import|url\(")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Records of two models on digits; one case of three fails."""
    out = tmp_path_factory.mktemp("results") / "tiny.jsonl"
    attack = InvertingGradients(steps=2)
    cases = [Case(attack, "lenet", "digits", (i,), profile="smoke") for i in (0, 1, 999)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "lpips", lambda *args, **kwargs: None)
        run([*cases, Case(attack, "mlp", "digits", (0, 1), seed=4, profile="smoke")], out, device="cpu")
    return out


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_slider_holds_every_frame_and_asks_nothing_of_others():
    frames = images(5, 2, 3, 8, 8)
    page = str(plots.slider(frames, [0, 1, 3, 7, 10], truth=frames[-1], losses=[5, 4, 3, 2, 1], shown=64))
    assert not OUTSIDE.search(page)
    sources = page[page.index("sources = [") :]
    assert len(set(re.findall(r"data:image/png;base64,[\w+/=]+", sources))) == 5
    assert 'max="4" value="4"' in page
    assert "step 3 of 10, loss 3.00e+00" in page
    assert 'aria-label="Step of the reconstruction"' in page
    assert page.count("<img") == 2 == page.count('alt="') == page.count("width:128px")
    assert page.index("The private images") < page.index("The reconstruction") and "play</button>" in page
    assert "background" not in page


def test_slider_matches_each_frame_and_says_what_it_is_worth():
    truth = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4) * torch.linspace(0, 1, 4)])
    frames = torch.stack([images(2, 1, 4, 4), truth.flip(0)])
    frames = torch.cat([frames, frames[:1] * torch.nan])
    page = str(plots.slider(frames, [0, 1, 2], truth, candidates=truth))
    scores = json.loads(re.search(r"scores = (\[.*?\]),", page)[1])
    assert "not identified" in scores[0] and scores[1].count("150.0 dB") == 2
    assert scores[2] == "pixels that are no numbers"
    assert scores[1].endswith("+141.4 from its floor, identified among 2")
    assert "private; floor 150.0, 8.6 dB" in page
    sources = re.findall(r"data:image/png;base64,[\w+/=]+", page[page.index("sources = [") :])
    assert sources[1] == png(truth)  # the second frame was flipped


def test_slider_is_the_same_when_built_twice_and_differs_with_its_frames():
    first, second = (str(plots.slider(images(2, 1, 1, 8, 8), [0, 1])) for _ in range(2))
    assert first == second
    other = str(plots.slider(1 - images(2, 1, 1, 8, 8), [0, 1]))
    identity = re.compile(r'id="(gi-\w+)"')
    assert identity.search(first)[1] != identity.search(other)[1]


def test_slider_escapes_its_text_and_survives_nan():
    frames = images(2, 1, 1, 8, 8)
    frames[0] = torch.nan
    page = str(plots.slider(frames, [0, 1], alt='</script><b x="$now">'))
    assert page.count("</script>") == 1
    assert "<b " not in page


@pytest.mark.parametrize(
    ("frames", "steps", "more", "message"),
    [
        (None, [], {}, "no frames to show; ask the attack for some"),
        (images(2, 1, 1, 8, 8), [0], {}, "2 frames need as many steps"),
        (images(2, 1, 1, 8, 8), [0, 1], {"losses": [1.0]}, "got 2 steps and 1 losses"),
        (images(2, 1, 1, 8, 8), [0, 1], {"truth": images(1, 1, 9, 9)}, "does not fit the frames"),
    ],
)
def test_slider_says_what_does_not_fit(frames, steps, more, message):
    with pytest.raises(ValueError, match=message):
        plots.slider(frames, steps, **more)


def test_compare_has_an_alt_text_for_each_image():
    page = str(plots.compare(images(3, 3, 8, 8), images(3, 3, 8, 8), psnr=[20.0, 30.0, 40.0]))
    assert page.count("<img") == 6
    assert 'alt="Reconstruction 2, PSNR 30.0 dB"' in page
    assert not OUTSIDE.search(page)


def test_compare_says_which_image_is_identified():
    truth = images(2, 1, 8, 8)
    page = str(plots.compare(truth, truth.flip(0), candidates=truth, shown=96))
    assert page.count("not identified among 2</figcaption>") == 2 and page.count("width:96px") == 6
    page = str(plots.compare(truth, truth, candidates=truth))
    assert page.count(" from its floor, identified among 2</figcaption>") == 2


def test_losses_are_a_figure_with_an_alt_text():
    trace = torch.tensor([[4.0, 8.0], [2.0, 4.0], [1.0, torch.nan]])
    figure = plots.losses(trace, chosen=0)
    assert figure.alt == "Matching loss of 2 restarts over 3 steps, ending between 1.0e+00 and 1.0e+00."
    page = figure._repr_html_()
    assert page.startswith("<img") and figure.alt in page
    assert page == figure._repr_html_()


def test_quality_against_cost(study):
    figure = plots.quality_against_cost(results.read(study), by=["attack", "model"])
    assert figure.alt.count(" dB at ") == 2
    assert "inverting_gradients, lenet" in figure.alt
    assert figure._repr_html_().startswith("<img")


def test_quality_against_cost_in_panels(study):
    figure = plots.quality_against_cost(results.read(study), panels="model")
    assert [axes.get_title() for axes in figure.figure.axes] == ["lenet", "mlp"]
    assert "lenet: inverting_gradients: " in figure.alt and "mlp: inverting_gradients: " in figure.alt
    nothing = results.read(study).iloc[:0]
    assert "No case has run" in plots.quality_against_cost(nothing, panels="model")._repr_html_()


def test_groups_without_a_value_are_drawn_too(study):
    frame = results.read(study)
    frame["weights"] = [None, *["trained"] * (len(frame) - 1)]
    assert "untrained: " in plots.quality_against_cost(frame, panels="weights").alt
    drawn = plots.curves(frame.assign(x=range(1, len(frame) + 1), y=1.0), "x", "y", ["weights"], ("x", "y"))
    assert "untrained: " in drawn.alt


def test_heatmap_says_in_words_what_each_cell_holds(study):
    frame = results.read(study)
    order = {"model": ["lenet", "mlp", "vit"], "dataset": ["digits", "photos"]}
    figure = plots.heatmap(frame, order=order)
    written = [text.get_text() for text in figure.figure.axes[0].texts]
    rows = results.summarise(frame, ["model"]).set_index("model")
    said = {
        name: f"{row['above']:+.1f}\n{round(row['identified'] * row['images'])}/{row['images']:.0f} found"
        for name, row in rows.iterrows()
    }
    assert written[:2] == [said["lenet"], "not run"]
    alt = {name: text.replace("\n", " ") for name, text in said.items()}
    assert f"lenet: digits {alt['lenet']}; mlp: digits {alt['mlp']};" in figure.alt
    assert "not run: 4 of 6 cells" in figure.alt and "vit" not in figure.alt
    assert figure._repr_html_().startswith("<img")


def test_heatmap_says_that_all_images_were_missed(study):
    frame = results.read(study)
    frame = frame.assign(psnr=[[None] * len(indices) for indices in frame["indices"]])
    assert "missed" in plots.heatmap(frame).alt and "nan" not in plots.heatmap(frame).alt


def test_heatmap_tells_failed_from_not_applicable_without_colour(study):
    frame = results.read(study)
    failed = frame[frame["status"] == "failed"]
    none = failed.assign(model="mlp", status="not applicable")
    figure = plots.heatmap(pd.concat([failed, none]))
    axes = figure.figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["failed\n0/1", "does not\napply"]
    assert len({patch.get_hatch() for patch in axes.patches}) == 2
    assert "lenet: digits failed 0/1; mlp: digits does not apply; not run: 0 of 2 cells" in figure.alt


def test_heatmap_marks_what_lies_under_the_floor_without_colour(study):
    frame = results.read(study)
    done = frame[frame["status"] == "ok"]
    for shift, hatch in ((-3.0, "...."), (3.0, "")):
        psnr = [[f + shift for f in floors] for floors in done["floor"]]
        axes = plots.heatmap(done.assign(psnr=psnr, model="lenet"), marks={("lenet", "digits"): "*"}).figure.axes[0]
        assert axes.texts[0].get_text().startswith(f"{shift:+.1f}*")
        assert (axes.patches[0].get_hatch() or "") == hatch


def test_heatmap_without_records_is_an_empty_grid(study):
    order = {"model": ["lenet"], "dataset": ["digits", "photos"]}
    figure = plots.heatmap(results.read(study).iloc[:0], order=order)
    assert figure.alt.endswith("model by dataset. not run: 2 of 2 cells.")
    assert plots.heatmap(results.read(study).iloc[:0])._repr_html_().startswith("<img")


def test_curves_say_where_each_line_begins_and_ends():
    frame = pd.DataFrame({"net": ["a", "a", "b", "b"], "R": [4, 1, 1, 4], "ms": [20.0, 10.0, 1.0, 2.5]})
    figure = plots.curves(frame, "R", "ms", ["net"], ("restarts", "milliseconds"))
    assert figure.alt == "milliseconds against restarts. a: 10 at 1, 20 at 4; b: 1 at 1, 2.5 at 4."
    assert [line.get_label() for line in figure.figure.axes[0].lines] == ["a", "b"]


def test_table_counts_failures_and_leaves_what_was_not_run_empty(study):
    frame = results.read(study)
    page = str(plots.table(frame, by=["model", "weights"]))
    assert "<td>2 / 3</td>" in page and "<td>1 / 1</td>" in page
    assert page.index(">identified<") < page.index(">dB above floor<") < page.index(">cost<") < page.index(">seconds<")
    assert '<th scope="row">lenet</th><td class="gi-by">untrained</td>' in page
    likeness = list(plots._COLUMNS).index("SSIM\n(LPIPS)") + 1  # behind the other column of `by`
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row)[likeness] for row in page.split("<tr>")[2:]]
    assert re.fullmatch(r"-?0\.\d{3}", cells[0]), "LPIPS was not had"
    had = frame.assign(lpips=frame["ssim"])
    assert re.search(r"<td>(-?0\.\d{3})<br>\(\1\)</td>", str(plots.table(had, by=["model"])))
    assert "Not run" not in page
    page = str(plots.table(frame, by=["model"], order={"model": ["lenet", "convnet"]}))
    assert '<th scope="row">convnet</th>' + "<td></td>" * 8 + "</tr>" in page
    assert "mlp" not in page
    assert "Not run, and empty: 1 of 2." in page


def test_picture_grid(study):
    frame = results.read(study)
    order = {"model": ["lenet", "mlp"], "dataset": ["digits", "photos"]}
    page = str(plots.picture_grid(frame, study.parent, order=order))
    assert page.count("<img") == 2 == page.count("width:192px;max-width:100%")  # two images of 96 each
    assert page.count("<td></td>") == 2
    assert "Not run, and empty: 2 of 4." in page
    assert "2 / 3 ok" in page
    failed = frame[frame["status"] == "failed"]
    assert "0 / 1 ok" in str(plots.picture_grid(failed, study.parent))


def test_picture_grid_shows_each_image_with_its_own_numbers(study):
    frame = results.read(study)
    lenet = frame[(frame["model"] == "lenet") & (frame["status"] == "ok")]
    page = str(plots.picture_grid(lenet, study.parent, which=("best", "worst")))
    above = sorted(
        p - f for ps, fs in zip(lenet["psnr"], lenet["floor"], strict=True) for p, f in zip(ps, fs, strict=True)
    )
    assert re.findall(r"([-+][\d.]+) from its floor", page) == [f"{above[-1]:+.1f}", f"{above[0]:+.1f}"]
    assert page.count("<img") == 2 and "the best and worst image" in page


def explored(page):
    """The rows that the explorer's page holds, as dicts, and the rest of its data."""
    packed = re.search(r'<script type="application/gzip">(.*?)</script>', str(page))[1]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    columns = {}
    for name, column in data["columns"].items():
        if isinstance(column, dict):
            texts = [*column["values"], None]
            column = [texts[code] for code in column.get("codes", range(data["rows"]))]
        columns[name] = column
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], data


def test_explorer_holds_every_record_and_only_pictures_that_exist(study):
    frame = results.read(study)
    page = str(explorer(frame, study.parent, "<p>plain</p>"))
    assert "<p>plain</p>" in page and not OUTSIDE.search(page)
    rows, data = explored(page)
    assert [row["key"] for row in rows] == list(frame["key"]) and data["rows"] == len(frame)
    assert [row["picture"] for row in rows] == [1, 1, 0, 2]
    failed = rows[2]
    assert (failed["status"], failed["psnr"], failed["picture"]) == ("failed", None, 0)
    assert "index" in failed["error"]
    assert rows[3]["psnr"] == pytest.approx(sum(frame["psnr"].iloc[3]) / 2, rel=1e-3)
    assert rows[3]["floor"] == pytest.approx(sum(frame["floor"].iloc[3]) / 2, rel=1e-3)
    assert rows[0]["weights"] is None and rows[0]["error"] is None


def test_explorer_has_the_settings_of_the_attack_and_its_paper(study):
    frame = results.read(study)
    frame.loc[0, "attack_text"] = "InvertingGradients(steps=2, tv=0.01, distance=squared_l2)"
    frame.loc[1, ["attack", "attack_text"]] = ["mine", "package.Mine(tv=2)"]
    rows, data = explored(explorer(frame, study.parent))
    assert [row["tv"] for row in rows] == [0.01, 2, 1e-4, 1e-4]
    assert [row["lr"] for row in rows] == [0.1, None, 0.1, 0.1]
    assert (rows[3]["budget"], rows[3]["batch_size"], rows[3]["precision"]) == (2, 2, "float32")
    assert rows[3]["images"] == "test 0, 1"
    assert data["papers"]["mine"] == "mine" and "Geiping" in data["papers"]["inverting_gradients"]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_paper_of_each_technique_has_its_authors_and_year_as_the_bibliography_has_them(name):
    """Of the entries of the year, one has as its authors' surnames those of the file, in their order."""
    about = pages._paper(name)
    parts = about.partition("(")[2].partition(")")[0].split(", ")
    place = next(i for i, part in enumerate(parts) if re.search(r"\b(19|20)\d\d$", part))
    said, year = parts[:place], parts[place][-4:]
    source = (Path(__file__).parent.parent / "book" / "references.bib").read_text(encoding="utf-8")
    known = []
    for entry in source.split("\n@")[1:]:
        if re.search(rf"\byear\s*=\s*\{{{year}\}}", entry):
            names = re.search(r"\bauthor\s*=\s*{(.*?)},\n", entry, re.DOTALL)[1]
            names = names.replace('{\\"o}', "oe").replace('{\\"u}', "ue").replace("{\\'c}", "c")
            known.append([" ".join(name.split()).partition(",")[0] for name in re.split(r"\s+and\s+", names)])
    assert said in known, about


def test_the_dictionary_on_the_page_has_every_column_and_links_to_the_files():
    page = str(pages.data_dictionary())
    assert re.findall(r'<th scope="row"><code>(\w+)</code>', page) == list(export.COLUMNS)
    assert re.findall(r'href="../records/([\w.]+)"', page) == list(export.TABLES)
    assert "<code>indices</code>" in page and "`" not in page


def test_explorer_cannot_be_ended_by_what_a_record_says(study):
    frame = results.read(study).assign(error="</script><img src=x>")
    page = str(explorer(frame, study.parent))
    assert page.count("</script>") == 1 and "<img" not in page


def lines(page):
    """The cells of each row of each part of a leaderboard, as text; `more` is the second line of a cell."""
    parts = re.findall(r"<tbody.*?</tbody>", str(page), re.DOTALL)
    rows = [[re.findall(r"<td.*?</td>", row) for row in re.findall(r"<tr>.*?</tr>", part)] for part in parts]
    plain = [[[re.sub("<[^>]*>", "", re.sub("<br>", "; ", cell)) for cell in row] for row in part] for part in rows]
    return [[dict(zip(BOARD, row, strict=True)) for row in part] for part in plain]


def ranked(study, **values):
    """Records of one image each, one for each value of the lists in `values`."""
    row = results.read(study).iloc[0].to_dict() | {"restarts": 1, "gradient_evaluations": 3}
    row |= {"psnr": [20.0], "floor": [15.0], "identified": [False]}
    count = len(next(iter(values.values())))
    rows = [row | {"case": f"{i}", "model": f"m{i}"} | {k: v[i] for k, v in values.items()} for i in range(count)]
    return pd.DataFrame(rows).astype({"size": "Int64"})


def test_leaderboard_ranks_by_identification_then_by_the_floor(study):
    frame = ranked(study, identified=[[False], [True], [True], [False]], psnr=[[14.0], [10.0], [16.0], [15.5]])
    better, rest = lines(leaderboard(frame))
    assert [row["model"] for row in better] == ["m2", "m1", "m3"] and [row["model"] for row in rest] == ["m0"]
    assert [row["identified"] for row in better][::2] == ["1 of 1; chance 0.2 %", "0 of 1; chance 0.2 %"]
    assert (better[0]["dB above floor"], rest[0]["dB above floor"]) == ("+1.0", "-1.0")
    assert (better[0]["PSNR (dB)"], better[0]["gradient evaluations"], better[0]["study"]) == ("16.0", "3", "tiny")
    page = str(leaderboard(frame))
    assert "No better than the image's mean colour" in page and "4 rows of 4 records." in page
    assert page.count("aria-sort") == 1 == page.count('aria-sort="descending">identified')
    assert not OUTSIDE.search(page) and 'href="../results/tiny.jsonl"' in page


def test_leaderboard_does_not_take_luck_for_leakage(study):
    """One identified image of hundreds, each with a chance of 1 in 500, is what chance gives."""
    alike = {"model": ["lenet"] * 300, "psnr": [[10.0]] * 300}
    (better, rest) = lines(leaderboard(ranked(study, identified=[[i == 0] for i in range(300)], **alike)))
    assert not better and rest[0]["identified"] == "1 of 300; chance 0.2 %"
    (better, rest) = lines(leaderboard(ranked(study, identified=[[i < 5] for i in range(300)], **alike)))
    assert not rest and better[0]["identified"] == "5 of 300; chance 0.2 %"


def test_leaderboard_counts_failures_and_leaves_out_what_is_no_result(study):
    frame = ranked(study, split=["test", "train", "test", "test"], model=["lenet"] * 4)
    none = {"psnr": None, "floor": None, "identified": None, "chance": None}
    for i, status in ((2, "not applicable"), (3, "failed")):
        for name, value in (none | {"status": status}).items():
            frame.at[i, name] = value
    again = frame.iloc[:1].assign(study="other", started="2999-01-01", psnr=[[30.0]])
    page = leaderboard(pd.concat([frame, again]))
    ((row,), rest) = lines(page)
    assert not rest and (row["identified"], row["PSNR (dB)"]) == ("0 of 2; 1 failed, chance 0.2 %", "30.0")
    assert row["study"] == "other, tiny"
    for said in ("1 rows of 2 records", "1 of attacks on train images", "1 of a case that", "1 of a technique"):
        assert said in str(page)


def test_leaderboard_keeps_unlike_settings_apart_and_names_them(study):
    threat = "ThreatModel(knows_labels=True, knows_batch_size=False, malicious_server=True)"
    frame = ranked(
        study,
        attack_text=[
            "InvertingGradients(steps=9, tv=0.1)",
            "InvertingGradients(steps=9)",
            "InvertingGradients(steps=3)",
        ],
        threat=["ThreatModel()", threat, "ThreatModel()"],
        defense=[None, "GaussianNoise(std=0.01)", None],
        size=[64, None, None],
        weights=[None, "trained", None],
        batch_size=[1, 1, 1],
        model=["lenet"] * 3,
    )
    (rows, _) = lines(leaderboard(frame))
    assert {row["technique"] for row in rows} == {
        "inverting_gradients; tv=0.1, 64 px",
        "inverting_gradients; knows labels, batch size: no, malicious server, GaussianNoise(std=0.01)",
        "inverting_gradients",
    }
    assert {row["model"] for row in rows} == {"lenet", "lenet; trained"}


def test_leaderboard_escapes_what_a_record_says(study):
    wrong = "<img src=x onerror=1>"
    frame = ranked(study, attack_text=[f"Mine({wrong})"], weights=[wrong], dataset=[wrong]).assign(study=wrong)
    page = str(leaderboard(frame))
    assert "<img" not in page and page.count("&lt;img") == 5


def test_provenance_names_what_made_the_numbers(study):
    line = str(plots.provenance(results.read(study), "tiny"))
    said, opened = re.fullmatch(r'<details class="provenance"><summary>(.*)</summary>(.*)</details>', line).groups()
    assert re.fullmatch(r"Study tiny: 3 of 4 cases ok, 2\d{3}-\d\d-\d\d", said)
    assert '<a href="../results/tiny.jsonl">' in opened
    for fact in ("commit", "seeds 0, 4", "profile smoke", f"torch {torch.__version__}", "thread", "float32"):
        assert fact in opened
    assert "no records" in str(plots.provenance(results.read(study).iloc[:0], "tiny"))
    live = str(plots.provenance_live(3, "quick", "cpu"))
    for fact in ('class="provenance"', "seed 3", "profile quick", f"torch {torch.__version__}"):
        assert fact in live


def test_importing_the_package_imports_no_plotting_and_no_book_tools():
    code = (
        "import sys, gi_lib, gi_lib.attacks, gi_lib.bench, gi_lib.cli, gi_lib.plots;"
        "print([m for m in ('lpips', 'matplotlib', 'IPython', 'papermill', 'sphinx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
