"""One HTML page that needs nothing else: text, tables, and figures of matplotlib as SVG inside it.

Figures are drawn in the colours of `common.lab.figures` and get those of the page, which follow the reader's light or
dark scheme; their text stays text. No script, no font and no picture comes from elsewhere.
"""

import io
import re
from collections.abc import Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from common.lab import figures

DARK = ("#5CB3E6", "#FF9248", "#3CC79E", "#E5A3CB", "#F0BE4A", "#8CCBF2", "#B795CF", "#C6A765", "#B5B5B5", "#5BA89B")

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #222; --muted: #676767; --faint: #dcdfe4;
  --link: #0060a0; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1e2227; --ink: #e8e8e6; --muted: #a3a8ae;
  --faint: #3a4048; --link: #7cc4f5; DARK } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; text-wrap: balance }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid var(--faint) }
p, li { max-width: 46rem } .lead, figcaption, .small { color: var(--muted) } .small { font-size: .875rem }
a { color: var(--link) } code, pre { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
code, td, th, li, h1 { overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.6rem 0 0 }
.tiles div { background: var(--card); border-radius: .5rem; padding: .8rem 1rem }
.tiles dt { color: var(--muted); font-size: .875rem } .tiles dd { margin: 0 }
.tiles .value { font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem 2rem }
.pair > * { min-width: 0 } figure { margin: .5rem 0 0 } figure svg { display: block; width: 100%; max-width: 31rem;
  height: auto } figure svg text { font-family: inherit !important } figcaption { font-size: .875rem }
.scroll { overflow-x: auto; margin: 1rem 0; max-width: 100%; background: /* a shadow where more is to the side */
  linear-gradient(to right, var(--paper), transparent) 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper), transparent) 100% / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--faint), transparent) 0 / .9rem 100% no-repeat,
  linear-gradient(to left, var(--faint), transparent) 100% / .9rem 100% no-repeat }
.scroll:focus-visible { outline: 2px solid var(--link) }
pre { background: var(--card); border-radius: .5rem; padding: 1rem; margin: 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--muted); padding-bottom: .4rem }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap }
th { font-weight: 600; vertical-align: bottom } thead th { white-space: normal; min-width: 5.5rem }
th:first-child, td:first-child { text-align: left } tbody th { font-weight: 400; text-align: left }
details { margin-top: 1rem } summary { cursor: pointer; font-weight: 600 }
@media (max-width: 40rem) { main { padding-top: 1.5rem } h1 { font-size: 1.4rem } }
@media print { .scroll { overflow: visible } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, parts: Sequence[str], style: str = "", script: str = "") -> str:
    """Return a whole page of some parts of HTML, with further rules of style and a script, if any, after them."""
    tones = [[f"--tone{index}: {tone};" for index, tone in enumerate(each)] for each in (figures.CYCLE, DARK)]
    style = STYLE.replace("LIGHT", " ".join(tones[0])).replace("DARK", " ".join(tones[1])) + style
    parts = [*parts, f"<script>{script}</script>"] if script else parts
    return PAGE.format(title=escape(title), style=style, body="\n".join(part for part in parts if part))


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; the text is plain."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def section(title: str, *parts: str) -> str:
    """Return parts under a heading."""
    return "\n".join((f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"))


def beside(first: str, second: str) -> str:
    """Return two parts side by side, or one below the other where the page is narrow."""
    return f'<div class="pair">\n<div>{first}</div>\n<div>{second}</div>\n</div>'


def listed(items: Sequence[str]) -> str:
    """Return a list of plain texts."""
    return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Return the few numbers that one sees first: (what, its value, what to compare it with)."""
    cells = (
        f'<div><dt>{escape(what)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="small">{escape(beside)}</dd></div>'
        for what, value, beside in facts
    )
    return '<dl class="tiles">\n' + "\n".join(cells) + "\n</dl>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table of plain texts that scrolls where it is wider than the page; the first column names the row."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def code(text: str, label: str) -> str:
    """Return text as it is written, in a box that scrolls."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><pre>{escape(text)}</pre></div>'
    )


def folded(summary: str, part: str) -> str:
    """Return a part that opens when its summary is clicked."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{part}\n</details>"


def figure(drawn: Figure, name: str, alt: str, caption: str) -> str:
    """Return a figure in the page's colours.

    Args:
        drawn: of `common.lab.figures`.
        name: of the figure, a word that no other figure of the page has.
        alt: what it shows, for those who do not see it.
        caption: what stands below it.
    """
    return f"<figure>\n{_svg(drawn, name, alt)}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _svg(drawn: Figure, name: str, alt: str) -> str:
    """Return a figure as an SVG element, the same bytes for the same drawing."""
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawn.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue()[stream.getvalue().index("<svg") :], flags=re.S)
    text = re.sub(r' xmlns:\w+="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)  # ids are unique on the page
    tones = {f"tone{index}": tone for index, tone in enumerate(figures.CYCLE)}
    for variable, tone in {"ink": figures.INK, "muted": figures.MUTED, "faint": figures.FAINT, **tones}.items():
        text = re.sub(tone, f"var(--{variable})", text, flags=re.IGNORECASE)
    view = re.search(r'viewBox="[^"]*"', text)[0]
    start = f'<svg {view} role="img" aria-label="{escape(alt, quote=True)}">'
    return start + text[text.index(">") + 1 :].strip()
