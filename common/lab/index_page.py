"""results/index.html: the rows of the index with filters and figures that enlarge, one page that needs no other.

Pictures are those of the results, by relative path; style and script are in the page. Without the script every row is
there, and a figure is a link to its file.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import PurePosixPath

from common.lab import page
from common.lab.claims import OURS, WORDS
from common.lab.experiment import SCALE_NAMES
from common.lab.index import OTHER, PAPERS, Facts, Row, rows

TONES = {  # of a verdict's dot
    "reproduced": "--tone2", "direction reproduced": "--tone5", "in part": "--tone4", "not reproduced": "--tone1",
}  # fmt: skip
HEADINGS = ("source", "claim", "paper", "ours", "verdict", "results", "figure")

STYLE = """
main { max-width: 84rem } h2 { text-wrap: balance }
.filters { display: flex; flex-wrap: wrap; gap: .75rem 1.5rem; align-items: end; margin: 1.6rem 0 0 }
.filters label { display: grid; gap: .2rem; font-size: .875rem; color: var(--muted); min-width: 0; max-width: 22rem }
.filters select { width: 100% }
.filters select, button { font: inherit; font-size: .9375rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--faint); border-radius: .4rem; padding: .4rem .6rem; min-height: 2.5rem; max-width: 100% }
button { cursor: pointer } select:focus-visible, button:focus-visible, a:focus-visible { outline: 2px solid var(--link);
  outline-offset: 2px } .filters output { color: var(--muted); font-size: .875rem; padding-bottom: .6rem }
.claims { width: 100%; font-size: .9375rem; margin-top: 1rem }
.claims th, .claims td { text-align: left; vertical-align: top; white-space: normal; padding: .6rem 1rem .6rem 0;
  min-width: 0; overflow-wrap: break-word }
.claims tbody th { font-weight: 600 } .claims td:first-child, .claims .results { color: var(--muted) }
.claims td:nth-child(1) { width: 9rem } .claims td:nth-child(3) { width: 9.5rem }
.claims td:nth-child(4) { width: 15rem }
.claims .verdict { width: 10.5rem } .claims .results { width: 9.5rem } .claims td:last-child { width: 8.5rem;
  padding-right: 0 }
.verdict span::before { content: ""; display: inline-block; width: .65em; height: .65em; border-radius: 50%;
  margin-right: .45em; background: var(--dot) }
.thumb { display: block; padding: 0; border: 1px solid var(--faint); border-radius: .4rem; overflow: hidden;
  background: #fff; cursor: zoom-in } .thumb img { display: block; width: 8.4rem; height: 5rem; object-fit: contain }
dialog { border: 0; border-radius: .6rem; padding: 1rem; background: var(--paper); color: var(--ink);
  width: min(96vw, 80rem); max-height: 96vh; overflow: auto } dialog::backdrop { background: rgb(0 0 0 / .6) }
dialog .sheet { background: #fff; border-radius: .4rem; padding: .5rem; overflow-x: auto }
dialog .sheet img { display: block; max-width: 100%; max-height: 72vh; margin: 0 auto }
dialog p { margin: .75rem 0 } dialog .bar { display: flex; gap: .5rem; justify-content: flex-end; flex-wrap: wrap }
[hidden] { display: none !important }
@media (max-width: 62rem) {
  .claims thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  .claims, .claims tbody, .claims tr, .claims th, .claims td { display: block; width: auto !important; padding: 0 }
  .claims tr { border-top: 1px solid var(--faint); padding: 1rem 0 } .claims th, .claims td { border: 0 }
  .claims tr > * + * { margin-top: .3rem } .claims td[data-name]::before { content: attr(data-name) " ";
    color: var(--muted); font-size: .8125rem; margin-right: .3rem }
  .claims td:last-child { margin-top: .7rem } .claims .again td:last-child { display: none }
  .thumb { width: 100%; max-width: 26rem }
  .thumb img { width: 100%; height: auto; max-height: 14rem }
}
"""

SCRIPT = """
const all = [...document.querySelectorAll('tbody tr')], filters = document.querySelector('.filters');
const selects = [...filters.querySelectorAll('select')], dialog = document.querySelector('dialog');
filters.hidden = false;
function show() {
  const fits = row => selects.every(one => !one.value || row.dataset[one.name].split('|').includes(one.value));
  all.forEach(row => { row.hidden = !fits(row); });
  document.querySelectorAll('section.paper').forEach(part => {
    part.hidden = !part.querySelector('tbody tr:not([hidden])');
  });
  const shown = all.filter(row => !row.hidden).length;
  filters.querySelector('output').textContent = `${shown} of ${all.length} claims`;
}
selects.forEach(one => one.addEventListener('change', show));
filters.querySelector('button').addEventListener('click', () => {
  selects.forEach(one => { one.value = ''; });
  show();
});
let place = 0;
const thumbs = () => all.filter(row => !row.hidden).map(row => row.querySelector('.thumb')).filter(Boolean);
function open(thumb) {
  place = thumbs().indexOf(thumb);
  const image = dialog.querySelector('img'), small = thumb.querySelector('img');
  image.src = thumb.getAttribute('href'); image.alt = small.alt;
  dialog.querySelector('.caption').textContent = thumb.dataset.caption;
  dialog.querySelector('a').href = thumb.dataset.page;
  if (!dialog.open) dialog.showModal();
}
const step = by => {
  const list = thumbs(), file = index => list[index].getAttribute('href');
  let next = place;  // rows of one experiment share a figure
  do { next = (next + by + list.length) % list.length; } while (next !== place && file(next) === file(place));
  open(list[next]);
};
all.forEach(row => {
  const thumb = row.querySelector('.thumb');
  if (thumb) thumb.addEventListener('click', event => { event.preventDefault(); open(thumb); });
});
dialog.querySelector('.previous').addEventListener('click', () => step(-1));
dialog.querySelector('.next').addEventListener('click', () => step(1));
dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener('keydown', event => {
  if (event.key === 'ArrowLeft') step(-1);
  if (event.key === 'ArrowRight') step(1);
});
show();
"""

DIALOG = """<dialog aria-label="A figure, enlarged">
<div class="sheet"><img src="data:," alt=""></div>
<p class="caption"></p>
<div class="bar"><a href="README.md">its page</a>
<button type="button" class="previous">Previous</button><button type="button" class="next">Next</button>
<form method="dialog"><button autofocus>Close</button></form></div>
</dialog>"""


def overview(provenances: Iterable[Facts]) -> str:
    """Return the text of results/index.html: every claim of the results with its answer."""
    found = rows(provenances)
    lead = (
        "What two papers claim, and what was measured here. n counts seeds; brackets are 95 % intervals. "
        "“Not published” as a verdict: the paper makes no such claim, and ours stands alone."
    )
    parts = ["<h1>Results</h1>", page.paragraph(lead, "lead"), page.tiles(_tiles(found)), _filters(found)]
    parts += [_section(title, own) for title in _titles(found) if (own := [row for row in found if row.paper == title])]
    return page.page("Results", [*parts, DIALOG], STYLE, SCRIPT if found else "")


def _titles(found: Sequence[Row]) -> list[str]:
    known = {row.paper for row in found}
    return [title for title in (*PAPERS.values(), OTHER) if title in known]


def _tiles(found: Sequence[Row]) -> list[tuple[str, str, str]]:
    claimed = [row for row in found if row.source != OURS]
    counts = [(word, sum(row.verdict == word for row in claimed)) for word in WORDS]
    return [(word, str(count), f"of {len(claimed)} claims of the papers") for word, count in counts if count]


def _filters(found: Sequence[Row]) -> str:
    choices = {
        "paper": [(title, title) for title in _titles(found)],
        "scale": [(name, name) for name in SCALE_NAMES if any(name == row.scale for row in found)],
        "verdict": [(word, word) for word in WORDS if any(word == row.verdict for row in found)],
    }
    selects = "\n".join(
        f'<label>{name} <select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(value, quote=True)}">{escape(text)}</option>' for value, text in options)
        + "</select></label>"
        for name, options in choices.items()
    )
    return (
        f'<div class="filters" role="group" aria-label="Which claims are shown" hidden>\n{selects}\n'
        '<button type="button">Show all</button><output aria-live="polite"></output>\n</div>'
    )


def _section(title: str, own: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in HEADINGS)
    figures = [row.figure for row in own]
    body = "\n".join(_row(row, again=row.figure in figures[:place]) for place, row in enumerate(own))
    table = f'<table class="claims">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    return page.section(title, table).replace("<section>", '<section class="paper">', 1)


def _row(row: Row, again: bool) -> str:
    """Return a row of the table; `again`: its figure stands in a row above, which is enough on a small screen."""
    data = {"paper": row.paper, "scale": row.scale, "verdict": row.verdict}
    marks = "".join(f' data-{name}="{escape(value, quote=True)}"' for name, value in data.items())
    links = [f'<a href="{row.page_at(scale)}">{scale}</a>' for scale in (row.scale, *row.others)]
    number = row.experiment.partition("_")[0]
    cells = [
        f"<td>{escape(row.source)}</td>",
        f'<th scope="row">{escape(row.claim)}</th>',
        f'<td data-name="paper">{escape(row.published)}</td>',
        f'<td data-name="ours">{escape(row.ours)}</td>',
        f'<td class="verdict"><span style="--dot: var({TONES.get(row.verdict, "--muted")})">{escape(row.verdict)}</span></td>',
        f'<td class="results" data-name="results">{number}: {", ".join(links)}</td>',
        f"<td>{_thumbnail(row)}</td>",
    ]
    kind = ' class="again"' if again else ""
    return f"<tr{kind}{marks}>{''.join(cells)}</tr>"


def _thumbnail(row: Row) -> str:
    if not row.figure:
        return ""
    alt = escape(f"{PurePosixPath(row.figure).stem.replace('_', ' ')}: {row.caption}", quote=True)
    caption = escape(f"{row.experiment}, {row.scale}. {row.caption}", quote=True)
    return (
        f'<a class="thumb" href="{row.figure}" data-page="{row.page}" data-caption="{caption}">'
        f'<img src="{row.figure}" alt="{alt}" loading="lazy"></a>'
    )
