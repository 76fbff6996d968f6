"""Self-contained HTML page of a comparison: it needs no network, no library and no second file."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ema_seg.comparison.schema import Comparison
from ema_seg.comparison.tables import evidence_cells, verdict_text
from ema_seg.reporting.page import data_uri
from ema_seg.runtime.files import write_file

__all__ = ["write_page"]

_ASSETS = files("ema_seg.comparison") / "page_assets"


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
    pictures = {path: data_uri(directory / path) for path in sorted(paths)}
    page = _asset("page.html")
    # The data come last, as their texts might contain a placeholder.
    for place, content in {
        "/* style */": _asset("page.css"),
        "/* program */": _asset("page.js"),
        "<!-- data -->": _embed({**comparison, "shown_claims": _with_texts(comparison), "pictures": pictures}),
    }.items():
        page = page.replace(place, content)
    path = directory / "comparison.html"
    write_file(path, page.encode(errors="backslashreplace"))  # lone surrogates become JSON escapes
    return path


def _with_texts(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the claims with the verdict as ``text`` and the ``cells`` of each piece of evidence."""
    return [
        {
            **claim,
            "text": verdict_text(claim),
            "evidence": [{**evidence, "cells": evidence_cells(evidence)} for evidence in claim["evidence"]],
        }
        for claim in comparison["claims"]
    ]


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _embed(data: Any) -> str:
    """Encode data as JSON for a script element; escape ``<``, because ``</script`` would end the element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
