"""The book's sources, the address that they repeat, and the site that was built from them.

The site is the one in $GI_SITE, which `make test` sets after building it: then a missing site fails. Without
GI_SITE the tests of the site look at `_build/html` and are skipped where nothing is built.
"""

import json
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlencode, urlsplit

import build
import cells
import pandas as pd
import pytest
import yaml
from _ext import website
from docutils.core import publish_doctree

import gi_lib
from gi_lib.pages import BOARD, EXPLORED
from gi_lib.results import export
from tests.test_plots import explored as unpacked

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = cells.chapters()
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def notebook(path):
    return json.loads(path.read_text())


def source(cell):
    return "".join(cell["source"])


# --- the sources


def test_there_are_chapters():
    assert CHAPTERS


@each_chapter
def test_notebook_is_clean(path):
    """No outputs, stable ids, no metadata that an editor left, and bytes that `make cells` would write."""
    nb = notebook(path)
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert set(nb["metadata"]) <= {"kernelspec", "language_info"}
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in nb["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{1,62}", name) for name in ids), ids
    for cell in nb["cells"]:
        assert source(cell).strip(), f"{cell['id']} is empty"
        assert set(cell["metadata"]) <= {"tags", "mystnb"}, cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
    assert path.read_text() == json.dumps(nb, indent=1, ensure_ascii=False) + "\n", "run `make cells`"


def test_every_module_is_in_the_api_reference():
    """Each file of gi_lib and of its attacks and defenses; other folders by their own name at least."""
    package = ROOT / "gi_lib"
    paths = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    names = {f"gi_lib.{path.stem}" for path in paths if path.stem not in ("__init__", "cli")}
    for folder in ("attacks", "defenses"):
        names |= {f"gi_lib.{folder}.{p.stem}" for p in (package / folder).glob("*.py") if p.stem != "__init__"}
    texts = [(ROOT / "book" / name).read_text(encoding="utf-8") for name in ("api.md", "api_attacks.md")]
    said = set(re.findall(r"automodule:: (\S+)", "".join(texts)))
    assert names <= said and all(find_spec(name) for name in said)


@each_chapter
def test_code_is_narrow(path):
    wide = [
        (cell["id"], line)
        for cell in notebook(path)["cells"]
        if cell["cell_type"] == "code"
        for line in source(cell).splitlines()
        if len(line) > 78
    ]
    assert wide == []


@each_chapter
def test_first_cells(path):
    """A title, then the same install, parameters and checked cells everywhere."""
    nb = notebook(path)
    assert re.match(r"# \S", source(nb["cells"][0])), "a notebook begins with '# TITLE'"
    code = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    for cell, name, text in (
        (code[0], "install", cells.install(cells.address())),
        (code[1], "parameters", cells.PARAMETERS),
        (code[2], "checked", cells.CHECKED),
    ):
        assert cell["id"] == name
        assert source(cell) == text, "run `make cells`"
        assert cell["metadata"] == cells.METADATA[name], "run `make cells`"


@each_chapter
def test_parameters_are_seen_in_the_notebook(path):
    """In the page `build.fold_parameters` puts the values that were used in their place."""
    for cell in notebook(path)["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            assert not [tag for tag in cell["metadata"]["tags"] if tag.startswith(("hide", "remove"))]


@pytest.mark.parametrize("path", sorted((ROOT / "tests/reference").glob("*.ipynb")), ids=lambda path: path.stem)
def test_reference_notebooks_store_what_they_print(path):
    """Strict nbval passes on a notebook without stored outputs."""
    code = [cell for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        names = [(output["output_type"], output.get("name")) for output in cell["outputs"]]
        assert names == [("stream", "stdout")], cell["id"]


def techniques():
    """The notebooks of the part on techniques."""
    return [ROOT / f"{page}.ipynb" for page in contents()["II. Techniques"]]


def test_a_technique_begins_with_its_result_and_folds_what_is_not_the_attack():
    """Also: what is folded says what it is."""
    assert len(techniques()) >= 4
    for path in techniques():
        cells_ = notebook(path)["cells"]
        names = [cell["id"] for cell in cells_]
        start = names.index("result-run")
        assert names.index("result") == start - 1 and start < names.index("idea"), path.stem
        assert names[:start] == ["title", "install", "parameters", "checked", "setup", "result"], path.stem
        for cell in cells_:
            folded = "hide-input" in cell["metadata"].get("tags", [])
            assert folded or cell["id"] not in ("setup", "result-run", "idea-picture"), path.stem
            assert not folded or cell["metadata"]["mystnb"]["code_prompt_show"], (path.stem, cell["id"])


def test_parameters_are_shown_once_with_the_values_that_were_used():
    page = [
        {"source": "# Title", "metadata": {}},
        {"source": 'profile = "quick"', "metadata": {"tags": ["parameters"]}},
        {"source": '# Parameters\nprofile = "smoke"\nseed = 3\n', "metadata": {"tags": ["injected-parameters"]}},
    ]
    build.fold_parameters(page)
    assert [cell["source"][:3] for cell in page] == ["# T", "# P"]
    assert page[1]["metadata"]["mystnb"]["code_prompt_show"] == 'Parameters: profile = "smoke", seed = 3'
    assert "hide-input" in page[1]["metadata"]["tags"]
    plain = [{"source": "seed = 0", "metadata": {"tags": ["parameters"]}}]
    build.fold_parameters(plain)
    assert plain[0]["source"] == "seed = 0"


def contents():
    """Caption of a part -> its pages, as they stand in the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = {part["caption"]: [entry["file"] for entry in part["chapters"]] for part in toc["parts"]}
    return {"": [toc["root"]]} | parts


def test_every_page_is_in_the_table_of_contents():
    found = {f"book/{p.stem}" for p in (ROOT / "book").iterdir() if p.suffix in {".md", ".ipynb"}}
    listed = [page for pages in contents().values() for page in pages]
    assert len(set(listed)) == len(listed)
    assert {page for page in listed if page.startswith("book/")} == found


def test_no_title_carries_a_number_of_its_own():
    for path in CHAPTERS:
        assert re.match(r"# [^\W\d]", source(notebook(path)["cells"][0])), path.name


# --- what is said twice


def test_requirements_are_the_sum_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == project["dependencies"] + extras


def test_version_stands_in_the_package_the_citation_and_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == gi_lib.__version__
    assert f"## {gi_lib.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_address_is_repeated_right():
    address = cells.address()
    assert yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"] == address
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == address
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"] == address
    assert f"git clone {address}" in (ROOT / "README.md").read_text()


def test_one_target_changes_the_address_everywhere(tmp_path):
    (tmp_path / "book").mkdir()
    for path in cells.repeats():
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    old = cells.address()
    cells.rename("https://github.com/somebody/else.git", tmp_path)
    assert cells.address(tmp_path) == "https://github.com/somebody/else"
    for path in cells.repeats(tmp_path):
        assert old.split("github.com/")[1] not in path.read_text(), path.name
    for path in cells.chapters(tmp_path):
        assert not cells.write_cells(path, cells.address(tmp_path))


def test_public_address_follows_from_the_repository():
    assert website.public_address("https://github.com/Some-body/else.js") == "https://some-body.github.io/else.js/"
    assert website.public_address("https://github.com/me/Me.github.io") == "https://me.github.io/"
    for address in ("https://github.com/Some-body/else.js", "https://github.com/me/Me.github.io"):
        assert cells.site(address) == website.public_address(address)
    with pytest.raises(website.ConfigError, match="make repository"):
        website.public_address("https://example.org/me/book")


def test_description_is_the_first_paragraph_cut_after_a_sentence_or_a_word():
    plain = {"doctitle_xform": False}
    first = "One sentence that is long enough to stand alone, as a description should be."
    page = "Title\n=====\n\n.. class:: badges\n\nrun time 3 s\n\n* a list\n\n{}\n\nMore.\n\nPart\n----\n\nText.\n"
    assert website.description(publish_doctree(page.format(first), settings_overrides=plain)) == first
    assert (
        website.description(
            publish_doctree(page.format(first + " It goes on" + 40 * " and on"), settings_overrides=plain)
        )
        == first
    )
    cut = website.description(publish_doctree(page.format(60 * "word "), settings_overrides=plain))
    assert len(cut) <= website.DESCRIPTION and cut.endswith("word…")
    assert website.description(publish_doctree("* no paragraph but this")) == ""


def test_aliases_of_the_search_are_of_pages_and_stand_once():
    aliases = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]["search_aliases"]
    names = [name.lower() for page in aliases.values() for name in page]
    assert len(set(names)) == len(names)
    assert set(aliases) <= {page for pages in contents().values() for page in pages}


@pytest.mark.parametrize("wrong", ["", "github.com/a/b", "https://example.org/a/b", "https://github.com/a", "a b"])
def test_wrong_address_is_refused(tmp_path, wrong):
    (tmp_path / "book").mkdir()
    (tmp_path / "_config.yml").write_text("repository:\n  url: https://github.com/a/b\n")
    with pytest.raises(SystemExit, match="must look like"):
        cells.rename(wrong, tmp_path)


# --- the site


class Page(HTMLParser):
    """What a page loads and links to: `tags` is a list of (tag, attributes)."""

    def __init__(self, path):
        super().__init__()
        self.path, self.tags = path, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    @property
    def ids(self):
        return {a["id"] for _, a in self.tags if a.get("id")} | {
            a["name"] for t, a in self.tags if t == "a" and a.get("name")
        }


def outside(url):
    return bool(urlsplit(url or "").netloc)


def loads(tag, attributes):
    """The addresses that a browser fetches by itself when it meets this tag."""
    if tag == "link":
        inert = {"canonical", "author", "license", "next", "prev", "index", "search"}
        return [] if set((attributes.get("rel") or "").split()) & inert else [attributes.get("href")]
    names = {"object": ("data",), "video": ("src", "poster")}.get(tag, ("src",))
    found = [attributes.get(name) for name in names] if tag != "a" else []
    return found + [part.split()[0] for part in (attributes.get("srcset") or "").split(",") if part.strip()]


@pytest.fixture(scope="module")
def html(site):
    return [Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]


def test_pages_load_nothing_from_other_hosts(html):
    assert html
    found = [(p.path.name, tag, url) for p in html for tag, a in p.tags for url in loads(tag, a) if outside(url)]
    assert found == []


def test_style_sheets_load_nothing_from_other_hosts(site):
    pattern = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")
    found = [(path.name, url) for path in site.rglob("*.css") for url in pattern.findall(path.read_text())]
    assert found == []


def test_inline_scripts_name_no_script_of_another_host(html):
    pattern = re.compile(r"""["'](?:https?:)?//[^"'\s]+\.m?js["']""")
    assert [(p.path.name, url) for p in html for url in pattern.findall(p.path.read_text())] == []


def test_katex_is_vendored_and_loaded_where_there_is_a_formula(site, html):
    assert (site / "_static/katex/katex.min.js").exists() and (site / "_static/katex/LICENSE").exists()
    formula = {p.path for p in html if any("math" in (a.get("class") or "").split() for _, a in p.tags)}
    loading = {p.path for p in html if any(t == "script" and "katex" in (a.get("src") or "") for t, a in p.tags)}
    assert loading == formula and formula


def test_pages_carry_a_description_and_their_address(site, html):
    """All pages of the table of contents; the site's map lists them and no others."""
    base = website.public_address(cells.address())
    pages = [f"{page}.html" for part in contents().values() for page in part]
    by_path = {page.path.relative_to(site).as_posix(): page for page in html}
    for name in pages:
        said = [a for tag, a in by_path[name].tags if tag == "meta"]
        said = {a.get("name") or a.get("property"): a.get("content") for a in said}
        assert 20 <= len(said["description"]) <= website.DESCRIPTION, name
        assert said["og:description"] == said["description"] and said["og:title"]
        canonical = [a["href"] for tag, a in by_path[name].tags if tag == "link" and a.get("rel") == "canonical"]
        assert canonical == [said["og:url"]] == [base + name]
        assert (site / said["og:image"].removeprefix(base)).exists() and said["og:image:alt"]
    assert re.findall(r"<loc>(.*)</loc>", (site / "sitemap.xml").read_text()) == [base + name for name in pages]
    assert f"Sitemap: {base}sitemap.xml\n" in (site / "robots.txt").read_text()
    assert [a["href"] for tag, a in by_path["404.html"].tags if tag == "a"] == [base + name for name in pages]


def test_links_inside_the_site_lead_somewhere(site, html):
    """Also the provenance links to ../results/. Not from source pages: viewcode links to what it skips."""
    by_path = {page.path.resolve(): page for page in html}
    broken = []
    for page in (page for page in html if "_modules" not in page.path.parts):
        for tag, attributes in page.tags:
            for url in [attributes.get("href"), *loads(tag, attributes)]:
                parts = urlsplit(url or "")
                if not url or parts.scheme or parts.netloc or url == "#":
                    continue
                target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
                anchor = unquote(parts.fragment)
                views = target.name in ("leaderboard.html", "explorer.html") and "=" in anchor  # what is shown first
                known = by_path[target].ids if target in by_path and not views else {anchor}
                if not target.exists() or (anchor and anchor not in known):
                    broken.append((page.path.name, url))
    assert broken == []


def test_the_sidebar_numbers_chapters_without_holes(html):
    index = next(page for page in html if page.path.name == "index.html" and page.path.parent.name == "book")
    numbers = re.findall(
        r'<a class="reference internal" href="[a-z_]+\.html">(\d+)\. ', index.path.read_text(encoding="utf-8")
    )
    assert len(numbers) > 10 and numbers == [str(n + 1) for n in range(len(numbers))]


def test_pictures_have_alternative_text(html):
    bad = []
    for page in html:
        for tag, attributes in page.tags:
            alt = attributes.get("alt")
            if tag == "img" and (not alt or not alt.strip() or alt.endswith((".png", ".svg", ".jpg"))):
                bad.append((page.path.name, attributes.get("src", "")[:60], alt))
    assert bad == []


@each_chapter
def test_chapter_page_has_badges_and_buttons(site, path):
    text = (site / "book" / f"{path.stem}.html").read_text()
    slug = cells.address().split("github.com/")[1]
    assert f'href="https://colab.research.google.com/github/{slug}/blob/colab/book/{path.name}"' in text
    assert f'href="{cells.address()}"' in text, "the repository button is gone"
    for words in ("run time", "peak memory", "executed 20"):
        assert words in text


@each_chapter
def test_chapter_page_prints_no_warning(site, path):
    """A warning says where the package lies on the machine that built the page."""
    text = (site / "book" / f"{path.stem}.html").read_text()
    assert "output stderr" not in text and "Warning: " not in text


def test_pages_that_were_given_parameters_show_them(site):
    for path in CHAPTERS:
        text = (site / "book" / f"{path.stem}.html").read_text()
        assert text.count("# Parameters") == 1 == text.count("Parameters: profile = ")


def test_a_table_that_scrolls_can_be_focused(origin, tmp_path):
    dom = browse(f"{origin}/book/dlg.html", tmp_path, "--window-size=500,800")
    assert 'tabindex="0" role="region" aria-label="Table that scrolls: Across models and datasets"' in dom


def browse(address, folder, *options):
    """The page as it stands in a real browser after its scripts have run, where one is installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", f"--user-data-dir={folder}/profile", *options]
    command += ["--virtual-time-budget=5000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@each_chapter
def test_browser_asks_no_other_host(origin, tmp_path, path):
    """The same in a real browser: what the page asked for by its network log."""
    log = tmp_path / "net.json"
    dom = browse(f"{origin}/book/{path.stem}.html", tmp_path, f"--log-net-log={log}")
    typeset = 'class="math' not in dom or 'class="katex' in dom
    assert typeset, "KaTeX did not typeset the page"
    # One event a line; the browser's own requests have no origin as their initiator.
    events = [json.loads(line.rstrip(",")) for line in log.read_text().splitlines() if '"initiator"' in line]
    own = {event["params"]["url"] for event in events if event["params"]["initiator"] == origin}
    assert any("_static" in url for url in own), "the log has no request of the page: its format changed"
    assert {url for url in own if not url.startswith(origin)} == set()


def test_code_loses_no_colour_where_its_plainest_spans_are_gone(site):
    """`website.complete` takes the spans of names, punctuation and spaces out of each page."""
    for page in site.glob("book/*.html"):  # in the reference a signature's parts keep theirs
        code = re.sub(r'<dt class="sig .*?</dt>', "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r'<span class="(?:n|nn|p|w)">', code), page
    style = (site / "_static/pygments.css").read_text()
    for theme in ("light", "dark"):
        plain = re.search(rf'data-theme="{theme}"\] \.highlight \{{[^}}]*; color: (#\w+)', style)[1]
        for name in ("n", "nn", "p", "w"):
            rule = rf'data-theme="{theme}"\] \.highlight \.{name} \{{ color: {plain} \}}'
            assert re.search(rule, style), (theme, name)


# --- the results explorer


def explored(site):
    """The records that the page holds, as dicts."""
    return unpacked((site / "book/explorer.html").read_text())[0]


def test_explorer_holds_all_records_and_a_table_for_readers_without_scripts(site):
    rows = explored(site)
    assert {row["study"] for row in rows} == {path.stem for path in (ROOT / "results").glob("*.jsonl")}
    text = (site / "book/explorer.html").read_text()
    assert '<div class="gi-plain"><div' in text and text.count("gi-plain") == 1
    missing = [r["key"] for r in rows if r["picture"] and not (site / f"results/{r['study']}/{r['key']}.png").exists()]
    assert missing == []


def test_all_records_can_be_downloaded_and_each_has_a_file_of_its_own(site):
    rows = explored(site)
    for name in export.TABLES:
        assert f'href="../records/{name}"' in (site / "book/explorer.html").read_text()
        assert (site / "records" / name).stat().st_size > 1000
    assert len(pd.read_parquet(site / "records/records.parquet")) == len(rows)
    for row in rows:
        alone = json.loads((site / f"records/{row['study']}/{row['key']}.json").read_text())
        assert (alone["study"], alone["key"], alone["status"]) == (row["study"], row["key"], row["status"])


def shown_by(dom):
    """The cells of each row of the explorer's table, as text."""
    body = re.search(r'<table class="gi-records".*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    lines = re.findall(r"<tr [^>]*data-row.*?</tr>", body, re.DOTALL)
    cell = re.compile(r"<t[hd][ >].*?</t[hd]>", re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", text) for text in cell.findall(line)] for line in lines]


def test_explorer_opens_on_the_survey_with_two_techniques_on_one_image(site, origin, tmp_path):
    rows = [row for row in explored(site) if row["study"] == "survey"]
    dom = browse(f"{origin}/book/explorer.html", tmp_path)
    assert f"{len(rows)} of {len(explored(site))} records" in dom and "gi-plain" not in dom
    table = shown_by(dom)
    assert len(table) == min(50, len(rows)) and len(table[0]) == 13 == dom.count("aria-sort=")
    status = ["" if row["status"] == "ok" else row["status"] for row in rows[:50]]
    wanted = [[r["attack"] + s, r["model"], r["dataset"]] for r, s in zip(rows, status, strict=False)]
    assert [line[:3] for line in table] == wanted
    (tmp_path / "dom.html").write_text(dom)
    images = [a for tag, a in Page(tmp_path / "dom.html").tags if tag == "img" and "/results/" in a["src"]]
    assert len(images) == 3 + 2 * sum(bool(row["picture"]) for row in rows[:50])
    pair = [image["alt"] for image in images[:3]]
    assert pair[0].startswith("Private: ") and all(alt.startswith("Rebuilt: ") for alt in pair[1:])
    assert pair[1].split(" on ")[0] != pair[2].split(" on ")[0]
    attacked = {re.search(r" on (.*), [^,]* dB$", alt)[1] for alt in pair[1:]}
    assert len(attacked) == 1 and pair[0].removeprefix("Private: ") in attacked.pop()
    for image in images:
        assert image["loading"] == "lazy" and (site / "book" / image["src"]).resolve().exists()


def test_explorer_filters_searches_and_sorts_by_its_address(site, origin, tmp_path):
    row = explored(site)[-1]
    same = [r for r in explored(site) if all(r[name] == row[name] for name in ("study", "model", "tv", "precision"))]
    view = f"study={row['study']}&model={row['model']}&precision={row['precision']}&sort=-psnr"
    view += f"&tv={'none' if row['tv'] is None else row['tv']}"
    dom = browse(f"{origin}/book/explorer.html#{view}", tmp_path)
    assert f"{len(same)} of " in dom and dom.count('aria-sort="descending"') == 1
    values = sorted((r["psnr"] for r in same if r["psnr"] is not None), reverse=True)[:50]
    shown = [float(line[EXPLORED.index("psnr")]) for line in shown_by(dom)][: len(values)]
    assert shown == pytest.approx(values, abs=0.0501)  # 34.25 is 34.3 in JavaScript and 34.2 in Python
    assert 'aria-label="PSNR against training steps. ' in dom or not values
    dom = browse(f"{origin}/book/explorer.html#columns=all&q={row['key']}+{row['study']}", tmp_path)
    assert [line[-1] for line in shown_by(dom)] == [row["key"]]
    geiping = sum(r["attack"] == "inverting_gradients" for r in explored(site))
    assert f"{geiping} of " in browse(f"{origin}/book/explorer.html#q=Geiping+2020", tmp_path)
    assert "No record fits." in browse(f"{origin}/book/explorer.html#q=no+such+record", tmp_path)


# --- the leaderboard


def board(dom):
    """Each row of the leaderboard that is seen, in its order, as the texts of its cells."""
    lines = re.findall(r"<tr>(.*?)</tr>", re.search(r"<tbody.*</tbody>", dom, re.DOTALL)[0], re.DOTALL)
    return [[re.sub(r"<small>.*?</small>|<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", x)] for x in lines]


def test_leaderboard_sorts_and_filters_by_its_address_and_stands_without_scripts(site, origin, tmp_path):
    page = f"{origin}/book/leaderboard.html"
    plain = board((site / "book/leaderboard.html").read_text())
    dom = browse(page, tmp_path)
    assert board(dom) == plain and f"{len(plain)} of {len(plain)} rows" in dom
    assert dom.count('aria-sort="descending"') == 1 and dom.count('aria-sort="none"') == len(BOARD) - 1
    cost, dataset = (list(BOARD).index(name) for name in ("cost in training steps", "dataset"))
    view = urlencode({"technique": plain[-1][0], "dataset": plain[-1][dataset], "sort": "cost in training steps"})
    dom = browse(f"{page}#{view}", tmp_path)
    fits = [row for row in plain if (row[0], row[dataset]) == (plain[-1][0], plain[-1][dataset])]
    rows = board(dom)
    assert f"{len(fits)} of {len(plain)} rows" in dom and sorted(rows) == sorted(fits)
    assert 'aria-sort="ascending"><button type="button">cost in training steps' in dom
    for part in re.findall(r"<tbody.*?</tbody>", dom, re.DOTALL):
        values = [float(row[cost].replace(",", "")) for row in board(part) if row[cost]]
        assert values == sorted(values)
    assert "no row of" in browse(f"{page}#technique=none", tmp_path)


# --- continuous integration


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_are_pinned_and_write_no_more_than_they_must(path):
    """By commit, since a tag can be moved; and only three jobs may write, each one thing, which run no code of ours."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"} and "schedule" in workflow[True]  # YAML's `on`
    may = {"publish": {"pages", "id-token"}, "notebooks": {"contents"}, "tell": {"issues"}}
    for name, job in workflow["jobs"].items():
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", use) for use in uses)
        runs = "\n".join(step.get("run", "") for step in job["steps"])
        colab = "us-docker.pkg.dev/colab-images/public/cpu-runtime"  # its changes are what that job looks for
        assert runs.count("docker run") == runs.count(colab)
        assert {right for right, how in job.get("permissions", {}).items() if how == "write"} == may.get(name, set())
        assert (
            name != "notebooks" or job["if"] == "github.ref == 'refs/heads/main'"
        )  # all badges lead to what it writes
        assert name not in may or not re.search(r"\b(python3?|bash|make|docker|gi)\b|\./", runs)
