"""Self-contained HTML page of a Markdown text: it needs no network and no second file."""

import base64
import html
import re
from io import BytesIO
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

from ema_seg.data.source import IMAGE_FORMATS
from ema_seg.runtime.files import write_file

__all__ = ["data_uri", "write_page"]

_JPEG_QUALITY = 85
_PICTURE = re.compile(r'(<img src=")([^":]+)(")')
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --paper: #ffffff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6eaee; --soft: #9aa5b1; --line: #333b45; --paper: #14181d; }}
}}
body {{
  margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem) 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word;
}}
h1 {{ font-size: 1.7rem; line-height: 1.2; }}
h2 {{ font-size: 1.2rem; margin-top: 2.4rem; }}
table {{
  display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums;
}}
th, td {{ padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th {{ font-weight: 500; color: var(--soft); }}
img {{ max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_page(markdown: str, path: Path) -> None:
    """Write a Markdown text as a page.

    Args:
        markdown: the text; its first line is the title. The paths of its pictures are relative to the page.
        path: the page.

    Raises:
        DataError: the page cannot be written.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = _PICTURE.sub(lambda found: f"{found[1]}{data_uri(path.parent / found[2])}{found[3]}", body)
    title = html.escape(markdown.partition("\n")[0].lstrip("# "))
    write_file(path, _PAGE.format(title=title, body=body).encode(errors="backslashreplace"))


def data_uri(path: Path) -> str:
    """Encode a picture as a data URI; large RGB pictures become JPEG, at a tenth of their size."""
    content, kind = path.read_bytes(), path.suffix.lstrip(".").lower().replace("jpg", "jpeg")
    with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as picture:
        if picture.mode == "RGB" and kind != "jpeg" and len(content) > 2**16:
            buffer = BytesIO()
            picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
            content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
