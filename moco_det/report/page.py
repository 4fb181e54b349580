"""The report as one HTML page that opens without a network: styles and pictures are inside."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>moco-det report</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid; vertical-align: bottom; }
tr.published td { font-style: italic; background: var(--soft); }
.wide { overflow-x: auto; margin: .5rem 0; }
.note { border-left: 4px solid #c80; padding: .2rem .8rem; }
.matrix td { min-width: 3rem; border: 1px solid var(--line); }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
li { overflow-wrap: anywhere; }
details li { font-size: .9rem; }
small, figcaption { opacity: .75; }
figure { margin: 1.5rem 0; } figcaption { margin-bottom: .4rem; }
img { max-width: 100%; height: auto; background: white; }
@media print { details > * { display: block; } }
</style>
</head>
<body>
{% macro grid(head, rows, shades=None) %}
<div class="wide"><table{% if shades %} class="matrix"{% endif %}>
<thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
{% set row_shades = shades[loop.index0] if shades else None %}
<tr{% if row[0].startswith("published: ") %} class="published"{% endif %}>
{%- for cell in row %}
<td{% if row_shades and not loop.first and row_shades[loop.index0 - 1] > 0.005 %} \
style="background: rgb(86 160 233 / {{ "%.0f" % (85 * row_shades[loop.index0 - 1]) }}%)"{% endif %}>
{{- cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
{% macro bullets(lines) %}
{% if lines %}<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% endmacro %}
{% macro figures(items) %}
{% for caption, path in items.items() %}
<figure>
<figcaption>{{ caption }}</figcaption>
<img alt="{{ caption }}" src="{{ path | inline }}">
</figure>
{% endfor %}
{% endmacro %}
<h1>Report</h1>
<p><small>{{ legend }}</small></p>
{% for table in tables %}
<section>
<h2>{{ table.title }}</h2>
{{ grid(*table.scores) }}
{% for source in table.sources %}<p><small>Published numbers: {{ source }}.</small></p>{% endfor %}
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% if table.comparisons %}<h3>Differences</h3>{{ bullets(table.comparisons) }}{% endif %}
<h3>What was run</h3>
{{ bullets(table.provenance) }}
{% for heading, lines in table.deviations %}
<details><summary>{{ heading }}</summary>{{ bullets(lines) }}</details>
{% endfor %}
{% for detail in table.details %}
<details{% if loop.length < 6 %} open{% endif %}><summary>{{ detail.title }}</summary>
{{ grid(detail.head, detail.rows, detail.shades) }}
{% if detail.note %}<p><small>{{ detail.note }}</small></p>{% endif %}
</details>
{% endfor %}
{{ figures(table.figures) }}
</section>
{% endfor %}
{% if pretraining %}<section><h2>Pre-training</h2>{{ grid(*pretraining) }}</section>{% endif %}
{{ figures(pictures) }}
{% if notes %}<section class="note"><h2>Notes</h2>{{ bullets(notes) }}</section>{% endif %}
</body>
</html>
"""


def render_page(content: Mapping[str, Any], pictures: Mapping[str, str | Path]) -> str:
    """The page as text.

    Args:
        content: legend, tables, pretraining and notes, as `Report.content` gives them.
        pictures: caption -> PNG or JPEG file; like the tables' own, they go in as base64.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = _inline
    return environment.from_string(_TEMPLATE).render(**content, pictures=pictures)


def _inline(path: str | Path) -> str:
    """A picture as a data URL."""
    kind = "jpeg" if Path(path).suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
