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
<title>moco-det report</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid; }
tr.published td { font-style: italic; background: var(--soft); }
.wide { overflow-x: auto; }
.note { border-left: 4px solid #c80; padding: .2rem .8rem; }
small, figcaption { opacity: .75; }
figure { margin: 1rem 0; } img { max-width: 100%; background: white; }
</style>
</head>
<body>
{% macro grid(head, rows) %}
<div class="wide"><table>
<thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if row[0].startswith("published: ") %} class="published"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
{% macro bullets(lines) %}
{% if lines %}<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
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
{% for title, detail in table.details.items() %}
<details><summary>{{ title }}</summary>{{ grid(*detail) }}</details>
{% endfor %}
</section>
{% endfor %}
{% if pretraining %}<section><h2>Pre-training</h2>{{ grid(*pretraining) }}</section>{% endif %}
{% for caption, data in pictures.items() %}
<figure>
<figcaption>{{ caption }}</figcaption>
<img alt="{{ caption }}" src="data:image/png;base64,{{ data }}">
</figure>
{% endfor %}
{% if notes %}<section class="note"><h2>Notes</h2>{{ bullets(notes) }}</section>{% endif %}
</body>
</html>
"""


def render_page(content: Mapping[str, Any], pictures: Mapping[str, str | Path]) -> str:
    """The page as text.

    Args:
        content: legend, tables, pretraining and notes, as `Report.content` gives them.
        pictures: caption -> PNG file, which goes in as base64.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    encoded = {
        caption: base64.b64encode(Path(file).read_bytes()).decode()
        for caption, file in pictures.items()
    }
    return environment.from_string(_TEMPLATE).render(**content, pictures=encoded)
