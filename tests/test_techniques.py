"""The map of the field: its data file against the bibliography, the chapters and the records, and its page."""

import base64
import codecs
import importlib.util
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import latexcodec  # noqa: F401  (the codec `ulatex`; pybtex brings it)
import numpy as np
import pytest
import yaml
from PIL import Image

from gi_lib import results
from gi_lib.attacks import ATTACKS

ROOT = Path(__file__).resolve().parent.parent
FIELD = yaml.safe_load((ROOT / "book/techniques.yaml").read_text())
KEYS = {
    *("id", "name", "aliases", "authors", "year", "family", "letter", "needs", "recovers", "known", "code", "bib"),
    *("chapter", "ours"),
}
each = pytest.mark.parametrize("technique", FIELD["techniques"], ids=lambda technique: technique["id"])


@pytest.fixture(scope="module")
def extension():
    found = importlib.util.spec_from_file_location("techniques", ROOT / "book/_ext/techniques.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def entries(extension):
    return extension.bibtex(ROOT / "book/references.bib")


def test_ids_and_names_are_unique():
    for field in ("id", "name"):
        values = [technique[field] for technique in FIELD["techniques"]]
        assert len(values) == len(set(values)), field


@each
def test_an_entry_is_whole(technique, entries):
    assert technique.keys() - {"short"} == KEYS
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", technique["id"])
    assert technique["bib"] in entries, "references.bib lacks it"
    assert technique["family"] in FIELD["families"]
    if technique["family"] == "defenses":
        assert technique["letter"] is None
    else:
        assert technique["letter"] in FIELD["letters"]
    assert technique["needs"] and technique["recovers"] and technique["authors"]
    assert len(technique.get("short", technique["name"])) <= 15, "the timeline has no room for it: give a `short` name"
    assert technique["code"] is None or technique["code"].startswith("https://")


@each
def test_the_year_and_the_first_author_are_those_of_the_cited_work(technique, entries):
    entry = entries[technique["bib"]]
    assert re.search(rf"\byear\s*= \{{{technique['year']}\}}", entry)
    first = re.search(r"author\s*= \{(.*?),", entry)[1]
    assert re.split(" et al| and |, ", technique["authors"])[0] == re.sub("[{}]", "", codecs.decode(first, "ulatex"))


SECTIONS = {  # family -> the sections of book/field.md that are its own
    "closed-form": ["Closed form"],
    "matching": ["Gradient matching"],
    "priors": ["Batch statistics and many seeds"],
    "labels": ["Labels"],
    "exact": ["Exact batches"],
    "generative": ["Generative, untrained and diffusion priors"],
    "learned": ["Learned inversion"],
    "fedavg": ["Many local steps"],
    "malicious": ["A malicious server"],
    "transformers": ["Vision transformers"],
    "defenses": ["Defenses", "A malicious server"],  # there, how a client notices
}


def cited():
    """Section of book/field.md -> the keys that it cites."""
    _, *parts = re.split(r"^## (.*)$", (ROOT / "book/field.md").read_text(), flags=re.MULTILINE)
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        keys = ",".join(re.findall(r"\{cite:[pt]\}`([^`]*)`", text))
        found[heading] = {key.strip() for key in keys.split(",")} - {""}
    return found


def test_each_family_has_its_sections_in_the_chapter_on_the_field():
    assert SECTIONS.keys() == FIELD["families"].keys()
    assert {section for own in SECTIONS.values() for section in own} <= cited().keys()


@each
def test_the_chapter_on_the_field_tells_of_a_technique_in_its_own_family(technique):
    """Works that no section of a family cites are told of elsewhere: the history, surveys, the threat model."""
    cites, mine = cited(), SECTIONS[technique["family"]]
    of_families = {section for own in SECTIONS.values() for section in own}
    where = [section for section in of_families if technique["bib"] in cites[section]]
    assert not where or set(mine) & set(where), f"{technique['family']} here, there under {', '.join(where)}"


@each
def test_a_known_result_has_a_source_and_a_provenance(technique):
    fact = technique["known"]
    if fact is not None:
        assert fact["says"] and fact["source"] and fact["provenance"] in ("read", "second-hand", "unverified")


@each
def test_a_chapter_exists_and_is_in_the_book(technique):
    if technique["chapter"]:
        assert (ROOT / f"{technique['chapter']}.ipynb").is_file()
        assert f"file: {technique['chapter']}\n" in (ROOT / "_toc.yml").read_text()


def test_every_technique_of_the_records_is_on_the_map_once():
    ours = [technique["ours"] for technique in FIELD["techniques"] if technique["ours"]]
    assert len(ours) == len(set(ours))
    assert set(ours) == set(ATTACKS), "an attack without an entry in techniques.yaml, or an entry without its attack"
    assert set(results.read(ROOT / "results")["attack"]) <= set(ours)


# --- the page


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        said = dict(attributes)
        self.ids += [said["id"]] if "id" in said else []
        self.links += [said["href"]] if tag == "a" else []


@pytest.fixture(scope="module")
def table(extension, entries):
    frame = results.read(ROOT / "results")
    return extension.table(FIELD, entries, frame, lambda page: page.removeprefix("book/") + ".html")


def test_the_table_has_an_anchor_and_a_bibtex_entry_for_each_technique(table, entries):
    page = Page(table)
    anchors = [name for name in page.ids if name.startswith("tech-")]
    assert anchors == [f"tech-{technique['id']}" for technique in FIELD["techniques"]]
    assert table.count("@") >= len(anchors) and table.count("<pre>") == len(anchors)
    assert table.count("no chapter yet") == sum(technique["chapter"] is None for technique in FIELD["techniques"])


def test_the_timeline_has_one_mark_for_each_technique_that_leads_to_its_row(extension):
    picture = extension.timeline(FIELD, "map.html")
    assert picture.count("<circle") == len(FIELD["techniques"])
    assert sorted(Page(picture).links) == sorted(f"map.html#tech-{t['id']}" for t in FIELD["techniques"])
    assert picture.count('class="gi-run"') == sum(bool(technique["chapter"]) for technique in FIELD["techniques"])


def test_our_best_result_is_computed_from_the_records(extension):
    frame = results.read(ROOT / "results")
    value, said = extension.best(frame, "bias_ratio")
    survey = frame[(frame["attack"] == "bias_ratio") & (frame["study"] == "survey") & (frame["status"] == "ok")]
    best = max(
        (sum(map(sum, cases["identified"])) / len(cases), results.summarise(cases, ["attack"])["above"].iloc[0])
        for _, cases in survey.groupby(["model", "dataset"])
    )
    assert value == pytest.approx(1000 * best[0] + best[1])
    assert "leaderboard.html#technique=bias_ratio" in said
    assert extension.best(frame, "no such technique") is None
    # A technique that the survey lacks is told by another study, which is named; settings are chosen on train images.
    assert "<small>dlg" in extension.best(frame[frame["study"] != "survey"], "dlg")[1]
    assert extension.best(frame[frame["study"] == "tuning"], "inverting_gradients") is None


def test_a_result_that_was_not_read_in_the_paper_says_so(extension):
    fact = {"says": "12 dB", "source": "a list", "provenance": "second-hand"}
    assert "second-hand" in extension.known({"known": fact})
    assert "second-hand" not in extension.known({"known": fact | {"provenance": "read"}})
    assert "no result read" in extension.known({"known": None})


# --- the opening picture of the first page, which book/readme.py writes


def test_each_card_of_the_opening_picture_shows_private_gradient_and_rebuilt_and_leads_to_a_page():
    text = (ROOT / "book/_static/opening.html").read_text()
    cards = text.split('<div class="gi-card">')[1:]
    assert len(cards) >= 3
    anchors = {f"map.html#tech-{technique['id']}" for technique in FIELD["techniques"]}
    for card in cards:
        assert re.findall(r"<figcaption>(\w+)", card) == ["private", "gradient", "rebuilt"]
        assert len(re.findall(r'<img [^>]*alt="[^"]+" src="data:image/png;base64,', card)) == 3
        sent = re.findall(r'base64,([^"]+)"', card)
        private, _, rebuilt = (np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) / 255 for one in sent)
        said = [float(number) for number in re.search(r"rebuilt, (\d+) and (\d+) dB", card).groups()]
        for mine, theirs, decibels in zip(np.split(private, 2, 1), np.split(rebuilt, 2, 1), said, strict=True):
            error = ((mine - theirs) ** 2).mean()  # of 8 bits: 0 where the decibels are many
            assert decibels > 50 if error == 0 else abs(-10 * np.log10(error) - decibels) < 0.7
        (link,) = Page(card).links
        assert link in anchors or (ROOT / "book" / f"{link.removesuffix('.html')}.ipynb").is_file()
