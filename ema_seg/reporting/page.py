"""A comparison as one page that opens from the disk and needs nothing else: no network, no library, no second file."""

import base64
import json
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ema_seg.data.source import IMAGE_FORMATS
from ema_seg.reporting.comparison import Comparison
from ema_seg.reporting.files import write_file

__all__ = ["write_page"]

_ASSETS = files("ema_seg.reporting") / "page_assets"
_JPEG_QUALITY = 85


def write_page(comparison: Comparison, directory: Path) -> Path:
    """Write ``comparison.html``.

    The page holds the comparison as JSON, the pictures of its examples as data URIs, and the program that draws
    tables and plots from them.

    Args:
        comparison: what ``compare_runs`` returned, with the ``files`` of its examples.
        directory: where the files of the examples lie, and the page goes.

    Returns:
        The path of the page.
    """
    paths = {path for example in comparison["examples"] for path in example["files"].values() if path}
    pictures = {path: _data_uri(directory / path) for path in sorted(paths)}
    page = _asset("page.html")
    # The data last: what they hold might look like a place to fill in.
    for place, content in {
        "/* style */": _asset("page.css"),
        "/* program */": _asset("page.js"),
        "<!-- data -->": _embed({**comparison, "pictures": pictures}),
    }.items():
        page = page.replace(place, content)
    path = directory / "comparison.html"
    write_file(path, page.encode(errors="backslashreplace"))  # in JSON an escape
    return path


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _embed(data: Any) -> str:
    """JSON for the inside of a script element, which ``</script`` would end."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _data_uri(path: Path) -> str:
    """The picture itself; photographs of other formats as JPEG, which is a tenth of their size."""
    content, kind = path.read_bytes(), path.suffix.lstrip(".").lower().replace("jpg", "jpeg")
    with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as picture:
        if picture.mode == "RGB" and kind != "jpeg" and len(content) > 2**16:
            buffer = BytesIO()
            picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
            content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
