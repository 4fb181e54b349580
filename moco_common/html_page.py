"""Self-contained HTML pages: styles and pictures are inlined; nothing is fetched or executed.

A page is a Jinja template that extends ``base.html.j2`` and takes the macros ``bullets`` and
``figures`` from ``macros.html.j2``; both are in ``moco_common/templates``.
"""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_SHARED = Path(__file__).with_name("templates")


def render_page(template: Path, **values: object) -> str:
    """Render a template to the text of a page.

    Args:
        template: a ``.html.j2`` file.
        values: variables of the template, including ``title``. All text is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = _data_url
    return environment.get_template(template.name).render(values)


def _data_url(picture: str | Path) -> str:
    """Return a PNG or JPEG file as a data URL."""
    path = Path(picture)
    kind = "jpeg" if path.suffix in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
