"""Pieces of a self-contained HTML page: text, tables, pictures, charts, and the page around them.

Every piece takes plain text and escapes it; what is HTML already has the type `Html`.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple, NewType

from torch import Tensor

from pyrovae import charts, pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Html = NewType("Html", str)

# What a chart is drawn in, and the CSS variable that takes its place, so that dark mode can.
_VARIABLES = {
    charts.PAPER: "paper",
    charts.INK: "ink",
    charts.GREY: "grey",
    charts.LINE: "line",
    charts.BLUE: "blue",
    charts.ORANGE: "orange",
    "#000000": "ink",
    **{colour: f"label{i}" for i, colour in enumerate(charts.LABELS)},
}
# More values than this an image is not shown with: the page must stay small.
_MOST_VALUES = 3 * 64 * 64

# The page may load nothing at all: not even its own pictures come from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Section(NamedTuple):
    """One section of a page."""

    ident: str
    short: str
    """Its name in the table of contents."""
    title: str
    body: Html


def section(ident: str, short: str, title: str, *body: Html) -> Section:
    """A section whose body has several parts."""
    return Section(ident, short, title, join(*body))


def text(value: object) -> Html:
    """Any value as text, escaped."""
    return Html(html.escape(str(value)))


def join(*parts: Html) -> Html:
    """Pieces one after the other."""
    return Html("\n".join(parts))


def paragraph(value: str) -> Html:
    """A paragraph of text; the flags in it are marked as code."""
    marked = re.sub(r"(?<!\S)--[a-z][a-z-]*", r"<code>\g<0></code>", text(value))
    return Html(f"<p>{marked}</p>")


def number(value: float | None, digits: int = 2, error: float | None = None) -> str:
    """A number with a true minus sign and its error, or a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    shown = f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
    if error is None or error != error:
        return shown
    return f"{shown}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:,.{digits}f}"


def plural(count: int, noun: str) -> str:
    """ "1 draw", "2 draws"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def facts(rows: Iterable[tuple[str, object]]) -> Html:
    """Names and values, one below the other."""
    items = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows
    )
    return Html(f'<dl class="facts">{items}</dl>')


def tiles(rows: Iterable[tuple[str, str, str]]) -> Html:
    """(name, value, unit) in large type."""
    items = "".join(
        f"<div><dt>{text(name)}</dt><dd><b>{text(value)}</b> <span>{text(unit)}</span></dd></div>"
        for name, value, unit in rows
    )
    return Html(f'<dl class="tiles">{items}</dl>')


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], opened: bool = False
) -> Html:
    """A table that opens on demand, such as the numbers behind a chart."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return Html(
        f"<details{' open' if opened else ''}><summary>{text(caption)}</summary>"
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></details>"
    )


def commands(lines: Iterable[str]) -> Html:
    """Commands to be copied."""
    # A line breaks between words, never at the hyphens of a flag.
    words = (" ".join(f"<span>{text(w)}</span>" for w in line.split(" ")) for line in lines)
    return Html("".join(f"<pre><code>{line}</code></pre>" for line in words))


def picture(
    x: Tensor, alt: str, columns: int | None = None, width: int = 880, gap: int | None = None
) -> Html:
    """Images (N, C, H, W) on one sheet, pixel by pixel.

    Args:
        x: the images.
        alt: what they show, for those who cannot see them.
        columns: images in a row.
        width: of the sheet on a large screen, at most, in pixels of the page.
        gap: pixels between images.
    """
    gap = 0 if len(x) == 1 else gap
    data = base64.b64encode(pictures.png(shrunk(x), columns, gap)).decode()
    across, height = _png_size(data)
    # Whole pixels of the page for each pixel of the sheet keep all of one size.
    scale = max(1, width // across)
    return Html(
        f'<img src="data:image/png;base64,{data}" alt="{text(alt)}" '
        f'width="{across * scale}" height="{height * scale}">'
    )


def shrunk(x: Tensor) -> Tensor:
    """Large images (N, C, H, W), averaged down to what a page can hold; others as they are."""
    _, channels, height, width = x.shape
    factor = (_MOST_VALUES / (channels * height * width)) ** 0.5
    if factor >= 1:
        return x
    from torch.nn.functional import interpolate

    size = (max(1, int(height * factor)), max(1, int(width * factor)))
    return interpolate(x.float(), size=size, mode="area")


def _png_size(data: str) -> tuple[int, int]:
    header = base64.b64decode(data[:32])
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def figure(body: Html, caption: str) -> Html:
    """A chart or picture with its caption."""
    return Html(f"<figure>{body}<figcaption>{text(caption)}</figcaption></figure>")


def row(*parts: Html) -> Html:
    """Pieces beside each other where the screen is wide enough."""
    return Html(f'<div class="row">{"".join(parts)}</div>')


def gallery(items: Iterable[tuple[Html, Sequence[str]]]) -> Html:
    """Small pictures with lines of text below each."""
    cells = (
        f"<li>{image}{''.join(f'<span>{text(line)}</span>' for line in lines)}</li>"
        for image, lines in items
    )
    return Html(f'<ul class="gallery">{"".join(cells)}</ul>')


def chart(ax: "Axes", name: str, alt: str) -> Html:
    """A Matplotlib chart as inline SVG whose text is text and whose colours are CSS variables.

    Args:
        ax: the only axes of its figure.
        name: a word that no other chart of the page has.
        alt: what the chart shows, for those who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    # The salt makes identifiers, and so the page, the same every time.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing: Any = ax.figure
        drawing.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    used = set(re.findall(r'(?:xlink:href="|url\()#([\w.-]+)', svg))
    svg = re.sub(r"<[^>]*>", lambda tag: _tidy(tag.group(), name, used), svg)
    width, height = drawing.get_size_inches() * 72
    box = f"0 0 {width:g} {height:g}"
    return Html(f'<svg class="chart" role="img" aria-label="{text(alt)}" viewBox="{box}">{svg}')


def _tidy(tag: str, name: str, used: set[str]) -> str:
    """One SVG tag: short numbers, our colours, the page's font, identifiers of its own."""

    def identifier(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    tag = re.sub(r'\sid="([^"]*)"', identifier, tag)
    tag = re.sub(r'xlink:href="#', f'href="#{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", tag)
    tag = re.sub(r"font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r"\s+", " ", tag)
    tag = re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag


def page(title: str, intro: Html, sections: Sequence[Section]) -> Html:
    """The whole document, with a table of contents; it needs no network and no script."""
    style = files("pyrovae").joinpath("report.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{s.ident}">{text(s.short)}</a></li>' for s in sections)
    body = "\n".join(
        f'<section id="{s.ident}" aria-labelledby="{s.ident}-title">\n'
        f'<h2 id="{s.ident}-title">{text(s.title)}</h2>\n{s.body}\n</section>'
        for s in sections
    )
    return Html(f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">
<header>
<h1>{text(title)}</h1>
{intro}
</header>
{body}
</main>
<footer><p>Made by pyrovae. This page is one file: it loads nothing and sends nothing.</p></footer>
</body>
</html>
""")
