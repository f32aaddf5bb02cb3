"""One self-contained HTML page with tables and figures."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ranvier.atomic import replacing

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #2b2b2b; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: .2rem; }  h2 { font-size: 1.1rem; margin-top: 2rem; }
  table { border-collapse: collapse; }  th, td { padding: .25rem .9rem; text-align: right; }
  th { border-bottom: 2px solid #2b2b2b; font-weight: 600; }  td { border-bottom: 1px solid #e4e4e4; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  img { max-width: 100%; }  .facts { color: #6a6a6a; font-size: .85rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
{% for section in sections %}
<h2>{{ section.heading }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.columns %}
<table>
<tr>{% for column in section.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endif %}
{% if section.image %}
<img alt="{{ section.heading }}" src="data:image/png;base64,{{ images[section.image] }}">
{% endif %}
{% endfor %}
<p class="facts">{% for name, value in facts.items() %}{{ name }} {{ value }}{{ "; " if not loop.last }}{% endfor %}</p>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A heading with a paragraph, a table or a picture, each optional."""

    heading: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    image: Path | None = None


def write_page(
    path: str | Path, *, title: str, lead: str, sections: Sequence[Section], facts: Mapping[str, str]
) -> None:
    """Write the page; pictures are embedded, so that the file can be sent as it is.

    Args:
        path: The html file.
        title: Heading of the page.
        lead: First paragraph.
        sections: What follows.
        facts: Versions, device, seed: printed small at the end.

    Raises:
        FileNotFoundError: A picture is missing.
    """
    from jinja2 import Environment

    images = {
        section.image: base64.b64encode(section.image.read_bytes()).decode() for section in sections if section.image
    }
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    text = page.render(title=title, lead=lead, sections=sections, facts=facts, images=images)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
