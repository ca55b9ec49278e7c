"""One self-contained HTML file from a template, its data and the chart library."""

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..printable import printable, printable_values
from ..runtime.console import say
from ..storage.files import written_whole

_HERE = Path(__file__).parent
_LIBRARIES = ("vendor/d3.min.js", "vendor/plot.min.js", "static/page.js")
# <script> has no entities: characters that could end it, or a line of JavaScript, become JSON escapes.
_SCRIPT_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(template: str, *, title: str, data: dict[str, Any], **values: Any) -> str:
    """The page `templates/TEMPLATE.html` as one HTML file, including its styles, scripts, chart library and `data`.

    `static/TEMPLATE.js` reads `data` (JSON values) as `page.data`; the template has it as `data`, and `values` by their
    names. All text is escaped, control characters of it are visible (`printable`), and the page's content security
    policy forbids network requests and other scripts.
    Raises ValueError for NaN or infinity in `data`, and jinja2.UndefinedError for a value that the template needs.
    """
    data = printable_values(data)
    scripts = [_asset(name) for name in (*_LIBRARIES, f"static/{template}.js")]
    return (
        _environment()
        .get_template(f"{template}.html")
        .render(
            title=title,
            data=data,
            data_json=Markup(json.dumps(data, ensure_ascii=False, allow_nan=False).translate(_SCRIPT_ESCAPES)),  # noqa: S704 (escaped for <script>)
            styles=Markup(_asset("static/page.css")),  # noqa: S704 (a file of this package)
            scripts=[Markup(script) for script in scripts],  # noqa: S704 (files of this package)
            policy=_policy(scripts),
            **values,
        )
    )


def write_page(path: Path, template: str, *, title: str, data: dict[str, Any], **values: Any) -> Path:
    """Renders a page (see `render`) and writes it to `path` atomically; DataError if it cannot be written."""
    page = render(template, title=title, data=data, **values)
    with written_whole(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def say_page(path: Path) -> None:
    """Says where a page is, how large it is and how to open it."""
    say(f"The page is {path} ({path.stat().st_size / 1e6:.1f} MB); it opens in any browser, without a network.")


@cache
def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "share": _share}
    environment.filters["printable"] = printable  # before urlencode, as `data` is printable, too
    return environment


def _visible(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _count(number: float) -> str:
    return f"{number:,}"


def _share(number: float) -> str:
    percent = 100 * number
    return f"{percent:.1f} %" if percent >= 1 or not percent else f"{percent:.2g} %"


def _policy(scripts: list[str]) -> str:
    """The content security policy: images from data: URIs, the page's own scripts by digest, nothing else."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
