"""Self-contained HTML page of a comparison: it needs no network, no library and no second file."""

import base64
import json
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ema_seg.comparison.schema import Comparison
from ema_seg.data.source import IMAGE_FORMATS
from ema_seg.runtime.files import write_file

__all__ = ["write_page"]

_ASSETS = files("ema_seg.comparison") / "page_assets"
_JPEG_QUALITY = 85


def write_page(comparison: Comparison, directory: Path) -> Path:
    """Write ``comparison.html``.

    The page holds the comparison as JSON, the pictures of its examples as data URIs, and the program that draws
    tables and plots from them.

    Args:
        comparison: result of ``compare_runs``, with the ``files`` of its examples.
        directory: folder of the examples' files and of the page.

    Returns:
        The path of the page.
    """
    paths = {path for example in comparison["examples"] for path in example["files"].values() if path}
    pictures = {path: _data_uri(directory / path) for path in sorted(paths)}
    page = _asset("page.html")
    # The data come last, as their texts might contain a placeholder.
    for place, content in {
        "/* style */": _asset("page.css"),
        "/* program */": _asset("page.js"),
        "<!-- data -->": _embed({**comparison, "pictures": pictures}),
    }.items():
        page = page.replace(place, content)
    path = directory / "comparison.html"
    write_file(path, page.encode(errors="backslashreplace"))  # lone surrogates become JSON escapes
    return path


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _embed(data: Any) -> str:
    """Encode data as JSON for a script element; escape ``<``, because ``</script`` would end the element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _data_uri(path: Path) -> str:
    """Encode a picture as a data URI; large RGB pictures become JPEG, at a tenth of their size."""
    content, kind = path.read_bytes(), path.suffix.lstrip(".").lower().replace("jpg", "jpeg")
    with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as picture:
        if picture.mode == "RGB" and kind != "jpeg" and len(content) > 2**16:
            buffer = BytesIO()
            picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
            content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
