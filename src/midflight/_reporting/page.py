"""Write HTML pages that contain their style and figures."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from midflight._reporting.files import replacing

Filters = dict[str, Callable[..., Any]]


def write_page(
    path: Path, package: str, template: str, filters: Filters | None = None, **values: Any
) -> None:
    """Fill a Jinja template of `package` and write the page to `path`.

    The template may extend `page.html.j2`, the frame of all reports. It may use `filters` (name -> function).
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("midflight._reporting", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    page = environment.get_template(template).render(**values)
    with replacing(path) as part:
        part.write_bytes(page.encode())


def data_uri(svg: Path) -> str:
    """Return the SVG file as a `data:` URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
