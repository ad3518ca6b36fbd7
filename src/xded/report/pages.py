"""What all pages share: tables with links, pictures as part of the page, the templates' environment."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

MANY_COLUMNS = 9  # a table with more is printed across


@dataclass(frozen=True)
class Grid:
    """A table of a page; the first column names the row. `note` says what the numbers mean.

    Cells are texts, which are escaped, or `Markup` made of escaped texts.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def many(self) -> bool:
        """Whether it is too wide for a page in portrait format."""
        return len(self.columns) > MANY_COLUMNS


@dataclass(frozen=True)
class Drawing:
    """An SVG element, its title, what it shows in words and numbers, and how to read it."""

    name: str
    title: str
    text: str
    caption: str
    svg: str
    width: int  # CSS pixels
    height: int


def page(template: str, **values: object) -> str:
    """A template with its values filled in; every text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template(template).render(**values)


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Bytes as an address that needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
