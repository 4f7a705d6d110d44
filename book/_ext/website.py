"""What the built site needs beyond the text of its pages.

Its public address, derived from the repository's; a description and social tags on each page; names under which the
search finds a page; sitemap.xml, robots.txt and a 404.html; formulas for KaTeX; and only the files that a page uses.
"""

import html
import re
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from fontTools import subset
from fontTools.ttLib import TTFont
from markupsafe import Markup
from sphinx import addnodes
from sphinx.errors import ConfigError
from sphinx.ext.mathjax import html_visit_displaymath, html_visit_math
from sphinx.util import logging

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
DESCRIPTION = 200  # characters, about what search engines show

# A file of the site -> what the body of a page holds where it is used. All other files are loaded everywhere.
USED_WHERE = {
    r"katex|typeset": r'class="math ',
    r"explorer\.": r'id="gi-explorer"',
    r"leaderboard\.js": r'id="gi-leaderboard"',
    r"techniques\.js": r'id="gi-techniques"',
    r"sphinx-design|design-tabs": r'class="(?:[^"]* )?sd-',
    r"mystnb\.": r'class="cell ',
}
# The theme loads these on every page: a second copy of its icons, and the index for a search while typing.
UNUSED = re.compile(r"\s*<script[^>]*[\"/](?:fontawesome|searchtools|language_data|searchindex)\.js[^>]*></script>")

# The icons in the theme's buttons, by the font that has them. Any other icon loads the whole font; those of boxes such
# as notes and warnings are read from the theme's style.
ICONS = {
    "solid-900": (
        "angle-down angle-left angle-right arrow-up bars circle-half-stroke download expand file file-pdf lightbulb "
        "list magnifying-glass moon rocket sun"
    ),
    "brands-400": "github",
}
FAMILIES = {"solid-900": "Font Awesome 6 Free", "brands-400": "Font Awesome 6 Brands"}


def public_address(repository: str) -> str:
    """Where GitHub Pages serves a repository: https://github.com/OWNER/NAME -> https://owner.github.io/NAME/."""
    found = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+)", repository or "")
    if not found:
        raise ConfigError(
            "the site's public address follows from 'repository: url: https://github.com/OWNER/NAME' in _config.yml, "
            f"got {repository!r}; change it by `make repository URL=...`"
        )
    host = f"{found[1].lower()}.github.io"
    return f"https://{host}/" if found[2].lower() == host else f"https://{host}/{found[2]}/"


def configure(app, config):
    config.html_baseurl = public_address(config.html_theme_options.get("repository_url"))
    config.html_search_scorer = str(HERE / "scorer.js")


def description(doctree) -> str:
    """The first paragraph of text on a page, cut after a sentence or a word; empty where there is none."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section) and "badges" not in paragraph["classes"]:
            text = " ".join(paragraph.astext().split())
            if len(text) <= DESCRIPTION:
                return text
            head = text[: DESCRIPTION - 1]
            sentences = re.match(r"(.{60,}[.?!]) ", head)
            return sentences[1] if sentences else head.rsplit(" ", 1)[0] + "…"
    return ""


# --- the search


def add_aliases(app, doctree, docname):
    """Give the search the names of `search_aliases`, as entries of an index and as words of the page."""
    names = app.config.search_aliases.get(docname, [])
    if names:
        doctree += addnodes.index(entries=[("single", name, "", "main", None) for name in names])
        words = sorted({word.lower() for name in names for word in re.findall(r"\w+", name)})
        doctree += nodes.meta("", name="keywords", content=", ".join(words))


def check_aliases(app, env):
    for docname in app.config.search_aliases:
        if docname not in env.all_docs:
            logger.warning("search_aliases in _config.yml names %r, which is no page of the book", docname)


# --- one page


def tags(context, text: str, config) -> str:
    """Description, Open Graph and Twitter tags."""
    picture, alt = config.social_picture
    properties = {
        "og:type": "article",
        "og:site_name": config.html_title,
        "og:title": Markup(context["title"]).striptags(),
        "og:url": context["pageurl"],
        "og:description": text,
        "og:image": config.html_baseurl + picture,
        "og:image:alt": alt,
    }
    named = {"description": text, "twitter:card": "summary_large_image"}
    pairs = [("name", name, value) for name, value in named.items()]
    pairs += [("property", name, value) for name, value in properties.items()]
    return "".join(f'\n    <meta {k}="{n}" content="{html.escape(str(v))}" />' for k, n, v in pairs if v)


def without_unused(head: str) -> Markup:
    return Markup(UNUSED.sub("", str(head)))


def complete(app, pagename, templatename, context, doctree):
    """The tags in the page's head; of styles and scripts, what the page's body uses."""
    body = context.get("body") or ""
    context["without_unused"] = without_unused
    if doctree is not None:
        context["metatags"] = context.get("metatags", "") + tags(context, description(doctree), app.config)

    def used(file) -> bool:
        name = str(getattr(file, "filename", None) or "")
        return all(re.search(body_has, body) for files, body_has in USED_WHERE.items() if re.search(files, name))

    for kind in ("css_files", "script_files"):
        context[kind] = [file for file in context[kind] if used(file)]
    # Its children are no list items: a reader for the blind would announce an empty list.
    context["body"] = body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    # A fifth of a page with much code, to no effect: names, punctuation and spaces have the colour of the code itself.
    context["body"] = body = re.sub(r'<span class="(?:n|nn|p|w)">([^<]*)</span>', r"\1", body)
    if 'class="sig ' in body:  # the reference: a quarter of its bytes, to no effect
        context["body"] = re.sub(r'<span class="pre">([^<]*)</span>', r"\1", body)


# --- files beside the pages


def theme_folder(app) -> Path:
    folders = [Path(folder) for folder in app.builder.theme.get_theme_dirs()]
    return next(folder for folder in folders if (folder / "static/vendor/fontawesome").is_dir()) / "static"


def write_icons(app):
    """icons.css and one small font for each of ICONS, cut out of the theme's fonts."""
    theme = theme_folder(app)
    style = (theme / "styles/pydata-sphinx-theme.css").read_text(encoding="utf-8")
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    faces = []
    for font, names in ICONS.items():
        codes = [ord(icon) for icon in re.findall(r"--pst-icon-[\w-]+:\s*\"(.)\"", style)]
        for name in names.split():
            found = re.search(rf"\.fa-{name}(?![\w-])[^{{}}]*\{{content:\"\\([0-9a-f]+)\"", style)
            if not found:
                raise ConfigError(f"the theme's style has no icon {name!r} any more; correct ICONS in {__name__}.py")
            codes.append(int(found[1], 16))
        cut = subset.Subsetter(subset.Options(notdef_outline=True))
        face = TTFont(theme / f"vendor/fontawesome/webfonts/fa-{font}.ttf")
        cut.populate(unicodes=codes)
        cut.subset(face)
        face.flavor = "woff"
        face.save(static / f"icons-{font}.woff")
        reach = ", ".join(f"U+{code:X}" for code in sorted(face.getBestCmap()))
        faces.append(
            f'@font-face {{ font-family: "{FAMILIES[font]}"; font-weight: {font[-3:]}; font-display: block; '
            f'src: url("icons-{font}.woff") format("woff"); unicode-range: {reach}; }}\n'
        )
    (static / "icons.css").write_text("".join(faces), encoding="utf-8")


NOT_FOUND = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<link rel="icon" href="data:,">
<title>No such page: {site}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1.05rem/1.6 system-ui, sans-serif; max-width: 42rem; margin: 3rem auto; padding: 0 1rem; }}
input, button {{ font: inherit; padding: .3rem .6rem; }}
</style>
</head>
<body>
<main>
<h1>There is no page at this address</h1>
<p>The page may have moved. Search the book, or choose one of its pages.</p>
<form action="{base}search.html" role="search">
<input type="search" name="q" aria-label="Search this book"> <button>Search</button>
</form>
<ul>
{links}
</ul>
</main>
</body>
</html>
"""


def write_files(app, exception):
    """sitemap.xml, robots.txt and 404.html. All addresses are whole: a 404 page is served at any depth."""
    if exception or app.builder.format != "html":
        return
    env, base, out = app.env, app.config.html_baseurl, Path(app.outdir)
    root = app.config.root_doc
    names = [root, *env.toctree_includes.get(root, [])]
    pages = {base + app.builder.get_target_uri(name): env.titles[name].astext() for name in names}
    lines = "".join(f"  <url><loc>{html.escape(page)}</loc></url>\n" for page in pages)
    sitemap = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
    (out / "sitemap.xml").write_text(f"{sitemap}{lines}</urlset>\n", encoding="utf-8")
    robots = f"User-agent: *\nDisallow: {urlsplit(base).path}_modules/\n\nSitemap: {base}sitemap.xml\n"
    (out / "robots.txt").write_text(robots, encoding="utf-8")
    links = "\n".join(f'<li><a href="{page}">{html.escape(title)}</a></li>' for page, title in pages.items())
    text = NOT_FOUND.format(site=html.escape(app.config.html_title), base=base, links=links)
    (out / "404.html").write_text(text, encoding="utf-8")


def setup(app):
    app.add_config_value("search_aliases", {}, "env", dict)
    app.add_config_value("social_picture", ("", ""), "html", (tuple, list))
    app.add_html_math_renderer("katex", (html_visit_math, None), (html_visit_displaymath, None))
    app.add_css_file("icons.css", priority=600)
    app.connect("config-inited", configure)
    app.connect("builder-inited", write_icons)
    app.connect("env-check-consistency", check_aliases)
    app.connect("doctree-resolved", add_aliases)
    app.connect("html-page-context", complete, priority=900)
    app.connect("build-finished", write_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
