"""The look that the HTML reports share: one file each, readable offline, with its plots inside."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#7A7A7A",
)

_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "recsys-ops",
}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light; }
  body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c1c1c;
         background: #fff; max-width: 1080px; margin: 0 auto; padding: 24px; }
  h1 { font-size: 1.7rem; margin: 0 0 1rem; }
  h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #ddd; }
  p { max-width: 75ch; margin: .6rem 0; }
  figure { margin: 1rem 0; }
  figure img { max-width: 100%; height: auto; }
  figcaption, .note { color: #555; font-size: .9rem; max-width: 85ch; }
  .table { overflow-x: auto; margin: 1rem 0; }
  table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
  th, td { padding: .35rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
  th { border-bottom: 2px solid #bbb; }
  td.number, th.number { text-align: right; white-space: nowrap; }
  code { font-family: ui-monospace, Consolas, monospace; font-size: .92em; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
{{ section.body }}
</section>
{% endfor %}
</body>
</html>
"""

_TABLE = """<div class="table"><table>
<thead><tr>{% for h in headers %}<th{{ kinds[loop.index0] }}>{{ h }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for c in row %}<td{{ kinds[loop.index0] }}>{{ c }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
"""

_FIGURE = (
    '<figure><img src="data:image/svg+xml;base64,{{ data }}" alt="{{ alt }}">'
    "{% if caption %}<figcaption>{{ caption }}</figcaption>{% endif %}</figure>\n"
)


@dataclass(frozen=True)
class Section:
    """A heading (text) and what stands below it (HTML, from the ``*_html`` functions joined)."""

    heading: str
    body: str


def render_page(title: str, sections: Sequence[Section]) -> str:
    """A whole report as one HTML document that needs no other file.

    Args:
        title: text, escaped here.
        sections: in order of reading.

    Example:
        >>> page = render_page("Speed & more", [Section("One", paragraph_html("1 < 2"))])
        >>> "<h1>Speed &amp; more</h1>" in page and "<p>1 &lt; 2</p>" in page
        True
    """
    from markupsafe import Markup

    return _render(_PAGE, title=title, sections=[Section(s.heading, Markup(s.body)) for s in sections])


def paragraph_html(text: str, note: bool = False) -> str:
    """A paragraph of text, which is escaped; a note is set smaller and in grey.

    Example:
        >>> paragraph_html("1 < 2")
        '<p>1 &lt; 2</p>'
    """
    return _render('<p{% if note %} class="note"{% endif %}>{{ text }}</p>', text=text, note=note)


def table_html(headers: Sequence[str], rows: Sequence[Sequence[Any]], numeric: Sequence[int] = ()) -> str:
    """A table of text cells, which are escaped.

    Args:
        headers: one per column.
        rows: each as long as ``headers``; None prints as a dash.
        numeric: the columns to align right.

    Raises:
        ValueError: a row is not as long as ``headers``.

    Example:
        >>> "<td>a &amp; b</td>" in table_html(["name"], [["a & b"]])
        True
    """
    from markupsafe import Markup

    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"table_html: expected rows of {len(headers)} cells, got {list(row)}")
    kinds = [Markup(' class="number"') if i in numeric else "" for i in range(len(headers))]
    cells = [["-" if c is None else c for c in row] for row in rows]
    return _render(_TABLE, headers=headers, rows=cells, kinds=kinds)


def figure_html(fig: Figure, alt: str = "", caption: str = "") -> str:
    """A matplotlib figure as an image inside the page (SVG, so that it scales).

    Args:
        fig: from ``new_figure``, or any other.
        alt: what the picture shows, for readers who cannot see it.
        caption: text below it.

    Example:
        >>> with new_figure(4, 3) as figure:
        ...     html = figure_html(figure)
        >>> html.startswith('<figure><img src="data:image/svg+xml;base64,')
        True
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    return _render(_FIGURE, data=base64.b64encode(buffer.getvalue()).decode(), alt=alt, caption=caption)


@contextlib.contextmanager
def new_figure(width: float = 10.5, height: float = 4.0) -> Iterator[Figure]:
    """An empty figure, and the shared style for the axes made inside the ``with`` block.

    It belongs to no window and to no global state.

    Args:
        width, height: inches; 10.5 fill the width of a page.

    Example:
        >>> with new_figure() as figure:
        ...     axes = figure.subplots()
        >>> axes.spines["top"].get_visible()
        False
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height))


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True)
    return str(Markup(environment.from_string(template).render(**values)))
