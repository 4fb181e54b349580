"""What was seen of a run as one HTML page that opens without a network: pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
 padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
th, td {{ text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }}
th {{ white-space: nowrap; }}
li {{ overflow-wrap: anywhere; }}
figure {{ margin: 1.5rem 0; }}
img {{ max-width: 100%; height: auto; background: white; }}
</style>
</head>
<body>
<h1>{title}</h1>
"""


def render_page(
    title: str,
    lines: Mapping[str, str],
    findings: Sequence[str],
    pictures: Mapping[str, Path],
) -> str:
    """The page as text.

    Args:
        lines: figures by what they are of.
        findings: sentences.
        pictures: caption -> PNG file; they go in as base64.
    """
    parts = [_HEAD.format(title=escape(title)), "<ul>\n"]
    parts += [f"<li>{escape(finding)}</li>\n" for finding in findings]
    parts.append("</ul>\n<table>\n")
    parts += [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>\n'
        for name, text in lines.items()
    ]
    parts.append("</table>\n")
    for caption, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f"<figure><figcaption>{escape(caption)}</figcaption>"
            f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>\n'
        )
    return "".join([*parts, "</body>\n</html>\n"])
