"""The report as one page that opens offline: styles and plotly.js inside, nothing fetched from anywhere.

The page knows sections, and for each table its figure, if it has one. Whatever comes from a run (names, captions,
labels) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from apps.references import Reference
from apps.sections import Section
from workbench.tables import Table

ROWS_SHOWN = 100
"""Rows of a table that the page holds; all are in its CSV."""
PLOTLY_CONFIG = {"responsive": True, "displaylogo": False}

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #d9dee4; --wash: #f5f7fa; --link: #0b5cad; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  sans-serif; }
.page { max-width: 1160px; margin: 0 auto; padding: 24px 20px 64px; display: grid; gap: 0 40px;
  grid-template-columns: 190px minmax(0, 1fr); }
header, footer { grid-column: 1 / -1; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 0 0 8px; }
.meta { color: var(--soft); margin: 0 0 20px; overflow-wrap: anywhere; }
nav { position: sticky; top: 20px; align-self: start; font-size: 0.92rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav li { margin: 0 0 6px; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
section { border-top: 1px solid var(--line); padding: 22px 0 10px; overflow-wrap: break-word; }
section > p { max-width: 74ch; }
figure { margin: 18px 0 30px; break-inside: avoid; }
figcaption, .files { color: var(--soft); font-size: 0.92rem; }
figcaption { max-width: 84ch; margin-top: 2px; }
.files { margin-top: 4px; }
details { margin-top: 4px; font-size: 0.92rem; }
summary { cursor: pointer; color: var(--link); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
code, pre { font: 0.88rem ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--wash); padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { background: var(--wash); border-left: 3px solid #e69f00; padding: 8px 12px; }
.hash { overflow-wrap: anywhere; }
@media (max-width: 900px) {
  .page { display: block; padding: 16px 14px 48px; }
  nav { position: static; margin-bottom: 16px; }
  nav li { display: inline-block; margin-right: 14px; }
}
@media print {
  .page { display: block; max-width: none; padding: 0; }
  nav, .files, details, .modebar { display: none !important; }
  section { break-inside: auto; }
}
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
<script>{{ plotly }}</script>
</head>
<body>
<div class="page">
<header>
<h1>{{ title }}</h1>
<p class="meta">interp-workbench {{ environment.workbench }} · torch {{ environment.libraries.torch }} ·
Python {{ environment.python }} · {{ environment.device }}, {{ environment.threads }} threads</p>
</header>
<nav aria-label="Contents"><ol>
{% for section in sections %}<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{% endfor %}<li><a href="#provenance">Provenance</a></li>
<li><a href="#references">References</a></li>
</ol></nav>
<main>
{% for section in sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
<figure id="table-{{ table.name }}">
{% if table.figure %}
{{ table.figure }}
<figcaption>{{ table.caption }}</figcaption>
<details><summary>Table</summary>{{ listing(table) }}</details>
{% else %}
<figcaption>{{ table.caption }}</figcaption>
{{ listing(table) }}
{% endif %}
<div class="files">{% for file in table.files %}<a href="{{ file.path }}">{{ file.label }}</a>
{{- " · " if not loop.last }}{% endfor %}</div>
</figure>
{% endfor %}
</section>
{% endfor %}
<section id="provenance">
<h2>Provenance</h2>
<p>{{ manifest.precision }} All of this, and the hash of every file, is in
<a href="manifest.json">manifest.json</a>.</p>
{% if missing %}<p class="note">Static figures (SVG) are missing: {{ missing }}.</p>{% endif %}
<p>To make it again:</p>
<pre>{% for command in commands %}{{ command }}
{% endfor %}</pre>
<details><summary>Checkpoints ({{ manifest.checkpoints | length }})</summary>
<div class="scroll"><table>
<tr><th class="number">step</th><th>kept for</th><th>stored as</th><th>SHA-256</th></tr>
{% for each in manifest.checkpoints %}<tr><td class="number">{{ each.step }}</td>
<td>{{ each.reasons | join(", ") }}</td><td>{{ each.dtype }}</td>
<td class="hash"><code>{{ each.sha256 }}</code></td></tr>
{% endfor %}</table></div></details>
<details><summary>Recipe, seeds and environment</summary>
<pre>{{ facts }}</pre></details>
</section>
<section id="references">
<h2>References</h2>
<ol>
{% for reference in references %}<li>{{ reference.line() }}</li>
{% endfor %}</ol>
<p>As BibTeX: <a href="references.bib">references.bib</a>.</p>
</section>
</main>
<footer class="meta">The page is whole by itself; its links lead to the files that were written beside it.</footer>
</div>
</body>
</html>
"""

LISTING = """{% macro listing(table) %}<div class="scroll"><table>
<tr>{% for column in table.columns %}<th class="{{ column.kind }}">{{ column.name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td class="{{ cell.kind }}">{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if table.more %}<p>The first {{ table.rows | length }} of {{ table.more }} rows; all are in the CSV.</p>{% endif %}
{% endmacro %}"""


def render(
    title: str,
    sections: Sequence[Section],
    figures: Mapping[str, go.Figure],
    *,
    manifest: Mapping[str, Any],
    facts: str,
    references: Sequence[Reference],
    static_missing: str | None,
) -> str:
    """The whole page.

    Args:
        title: of the report.
        sections: what it says.
        figures: by the name of their table.
        manifest: what it was made from.
        facts: recipe, seeds and environment as text.
        references: what the methods come from.
        static_missing: why there are no static figures; None where there are.
    """
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(LISTING + TEMPLATE)
    return template.render(
        title=title,
        style=Markup(STYLE),
        plotly=Markup(get_plotlyjs()),
        sections=[_section(section, figures, has_svg=static_missing is None) for section in sections],
        manifest=manifest,
        environment=manifest["environment"],
        commands=[command for command in manifest["commands"].values() if command],
        facts=facts,
        references=references,
        missing=static_missing,
    )


def figure_html(drawn: go.Figure, name: str) -> str:
    """A figure as a piece of a page that has plotly.js already."""
    return drawn.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=PLOTLY_CONFIG)


def _section(section: Section, figures: Mapping[str, go.Figure], *, has_svg: bool) -> dict[str, Any]:
    return {
        "title": section.title,
        "anchor": "-".join(section.title.lower().split()),
        "paragraphs": section.text.split("\n\n"),
        "tables": [_table(table, figures.get(table.name), has_svg=has_svg) for table in section.tables],
    }


def _table(table: Table, drawn: go.Figure | None, *, has_svg: bool) -> dict[str, Any]:
    kinds = [_kind(table.frame[column]) for column in table.frame]
    shown = table.frame.head(ROWS_SHOWN)
    files = [("CSV", f"tables/{table.name}.csv"), ("LaTeX", f"tables/{table.name}.tex")]
    if drawn is not None:
        files.append(("figure as HTML", f"figures/{table.name}.html"))
        files += [("as SVG", f"figures/{table.name}.svg")] if has_svg else []
    return {
        "name": table.name,
        "caption": table.caption,
        "figure": None if drawn is None else Markup(figure_html(drawn, table.name)),
        "columns": [
            {"name": str(name).replace("_", " "), "kind": kind} for name, kind in zip(table.frame, kinds, strict=True)
        ],
        "rows": [
            [{"text": cell_text(value), "kind": kind} for value, kind in zip(row, kinds, strict=True)]
            for row in shown.itertuples(index=False, name=None)
        ],
        "more": len(table.frame) if len(table.frame) > len(shown) else 0,
        "files": [{"label": label, "path": path} for label, path in files],
    }


def cell_text(value: object) -> str:
    """A cell as a person reads it: four significant digits, yes or no, nothing where there is nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _kind(column: pd.Series) -> str:
    return "number" if column.dtype.kind in "iuf" else "text"
