"""The report as one self-contained HTML page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco_common import html_page


def render_page(content: Mapping[str, Any], pictures: Mapping[str, str | Path]) -> str:
    """Render the page.

    Args:
        content: legend, tables, pretraining and notes, as `Report.content` gives them.
        pictures: caption -> PNG or JPEG file; like the tables' own, they go in as base64.
    """
    template = Path(__file__).with_name("report.html.j2")
    return html_page.render_page(template, title="Report", **content, pictures=pictures)
