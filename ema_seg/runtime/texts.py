"""Readers of untrusted YAML, JSON and CSV files.

A few hundred bytes can fill the memory by YAML aliases, overflow the stack by nesting, or hold a number that takes
minutes to print. The readers bound size, depth and numbers before they build values.

A missing or unreadable file raises ``OSError`` as ``open`` does.
"""

import csv
import json
import re
import stat
from collections.abc import Iterator
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from ema_seg.runtime.errors import DataError, one_line

__all__ = ["read_json", "read_rows", "read_table", "read_yaml"]

_LARGEST = {"YAML": 2**20, "JSON": 2**30, "CSV": 2**28}  # bytes
_DEEPEST = 100
_MOST_NODES = 20_000  # of a YAML file with its aliases expanded: a list of 254 classes has 2,500
_LONGEST_NUMBER = 100  # characters
_LARGEST_NUMBER = 2**64
# Only PyYAML's loader in Python accepts surrogates; it reads 100 KiB per second.
_LARGEST_ESCAPED = 2**16  # bytes
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# A long number, or digits in a string; only if found, the length of each number is checked, which is slower.
_LONG_NUMBER = re.compile(rb"(?<![\w.])\d{20}")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DEPTHS = {ord(bracket): step for bracket, step in {"[": 1, "{": 1, "]": -1, "}": -1}.items()}


class _CoreSchemaConstructors:
    """Constructors of YAML's core schema, as in OmegaConf: dates are strings, ``1e-3`` a number, no other tags."""

    def construct_text(self, node: yaml.Node) -> str:
        # JSON writes a character beyond 16 bits as a surrogate pair of two escapes.
        return _join_surrogates(self.construct_scalar(node))  # type: ignore[attr-defined]

    def construct_number(self, node: yaml.Node) -> int | float:
        if len(node.value) > _LONGEST_NUMBER:
            raise ValueError(
                f"line {node.start_mark.line + 1}: a number of {len(node.value):,} characters exceeds the limit of "
                f"{_LONGEST_NUMBER}"
            )
        whole = node.tag == f"{_TAG}int"
        value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)  # type: ignore[attr-defined]
        if whole and abs(value) >= _LARGEST_NUMBER:
            raise ValueError(f"line {node.start_mark.line + 1}: a number exceeds 64 bits")
        return value


class _PythonLoader(_CoreSchemaConstructors, yaml.SafeLoader):
    pass


class _Loader(_CoreSchemaConstructors, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "seq", "map")
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
        |[-+]?\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.X,
)
for _loader in (_PythonLoader, _Loader):
    _loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
    _loader.yaml_constructors = {
        **{
            f"{_TAG}{name}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{name}"]
            for name in ("null", "bool", "seq", "map")
        },
        **{
            f"{_TAG}str": _CoreSchemaConstructors.construct_text,
            f"{_TAG}int": _CoreSchemaConstructors.construct_number,
        },
        **{
            f"{_TAG}float": _CoreSchemaConstructors.construct_number,
            None: yaml.SafeLoader.yaml_constructors[None],
        },  # refuses other tags
    }


def read_yaml(path: Path, advice: str = "correct the file") -> Any:
    """Read a YAML file (UTF-8) into plain dicts, lists, strings, numbers, booleans and None; a date is a string.

    Raises:
        DataError: The file is not YAML, has an unknown tag or a repeated key, or is too large, too deep or has too many
            values or too long a number.
        OSError: The file does not exist or cannot be read.
    """
    text = _read_text(path, "YAML", advice)
    loader: Any = _Loader
    try:
        if _SURROGATE.search(text):
            if len(text) > _LARGEST_ESCAPED:
                raise ValueError(r"surrogate escapes (\ud800 to \udfff) must be written as characters")
            loader = _PythonLoader
        _check_nodes(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)  # noqa: S506, a safe loader of fewer tags
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        found = f"{where}{error.problem or error.context}"
        raise DataError(f"{path}: is not valid YAML ({found}); {advice}.") from error
    except LookupError as error:  # from PyYAML's constructors: an empty number or an invalid bool
        raise DataError(f"{path}: is not valid YAML (a value does not match its tag); {advice}.") from error
    except (yaml.YAMLError, ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is not valid YAML ({one_line(error).rstrip('.')}); {advice}.") from error


def read_json(path: Path, advice: str = "restore the file") -> Any:
    """Read a JSON file (UTF-8).

    Raises:
        DataError: The file is not strict JSON, has a repeated key or an integer of over 64 bits, or is too large or too
            deep.
        OSError: The file does not exist or cannot be read.
    """
    text = _read_text(path, "JSON", advice)
    try:
        content = text.encode()
        if _json_depth(content, text) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        return json.loads(
            text,
            parse_int=_whole_number if _LONG_NUMBER.search(content) else None,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: is not JSON ({one_line(error)}); {advice}.") from error


def read_rows(path: Path, advice: str = "restore the file") -> list[dict[str, str]]:
    """Read a CSV file with a header into a dict of strings for each row.

    Raises:
        DataError: A row has not as many cells as the header, the header repeats a name, or ``read_table`` fails.
        OSError: The file does not exist or cannot be read.
    """
    table = read_table(path, advice)
    if not table:
        return []
    header, *rows = table
    if len(set(header)) < len(header):
        raise DataError(f"{path}: is not a table (its header has a name twice); {advice}.")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            found = f"row {number} has {len(row)} cells instead of {len(header)}"
            raise DataError(f"{path}: is not a table ({found}); {advice}.")
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_table(path: Path, advice: str = "restore the file") -> list[list[str]]:
    """Read the non-empty rows of a CSV file; bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: The file is not CSV or is too large.
        OSError: The file does not exist or cannot be read.
    """
    text = _read_text(path, "CSV", advice, errors="surrogateescape")
    try:
        return [row for row in csv.reader(StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV ({one_line(error)}); {advice}.") from error


def _read_text(path: Path, kind: str, advice: str, errors: str = "strict") -> str:
    status = path.stat()
    # A pipe or a device may have no end. For a directory, reading raises a clear OSError.
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: is a pipe or a device, expected a file; {advice}.")
    if status.st_size > _LARGEST[kind]:
        most = f"{_LARGEST[kind] >> 20} MiB"
        raise DataError(f"{path}: has {status.st_size / 2**20:.1f} MiB, expected {kind} of at most {most}; {advice}.")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; save the file as UTF-8, or {advice}.") from error


def _check_nodes(events: Iterator[yaml.Event]) -> None:
    """Raise ValueError for too deep nesting, too many values, an undefined alias or a repeated key."""
    sizes: dict[str, int] = {}  # number of values, by anchor
    frames: list[_OpenCollection] = [_OpenCollection(None)]
    for event in events:
        line, frame = event.start_mark.line + 1, frames[-1]  # type: ignore[union-attr]  # each event has a mark
        if isinstance(event, yaml.CollectionStartEvent):
            frames.append(_OpenCollection(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(frames) > _DEEPEST:
                raise ValueError(f"line {line} is nested more than {_DEEPEST} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            ended = frames.pop()
            anchor, size, key, frame = ended.anchor, ended.size + 1, None, frames[-1]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size, key = event.anchor, 1, event.value
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"line {line}: the alias *{event.anchor} is undefined")
            anchor, size, key = None, sizes[event.anchor], None
        else:
            continue
        if anchor:
            sizes[anchor] = size
        frame.size += size
        if frame.size > _MOST_NODES:
            raise ValueError(f"line {line}: more than {_MOST_NODES:,} values with aliases expanded")
        if frame.keys is not None:
            if frame.at_key and key is not None and key != "<<":
                if key in frame.keys:
                    raise ValueError(f"line {line} has the key {key[:80]!r} for the second time")
                frame.keys.add(key)
            frame.at_key = not frame.at_key


class _OpenCollection:
    """List or mapping that has not ended yet."""

    def __init__(self, anchor: str | None, keys: set[str] | None = None) -> None:
        self.anchor = anchor
        self.keys = keys
        self.at_key = True
        self.size = 0


def _join_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _json_depth(content: bytes, text: str) -> int:
    """Return the nesting depth of a JSON text; remove strings only if a fast count exceeds the limit."""
    depth = _depth(content.translate(None, _NO_BRACKETS))
    if depth > _DEEPEST:
        outside = re.sub(r'"(?:[^"\\]|\\.)*+"', "", text, flags=re.DOTALL)
        depth = _depth(outside.encode().translate(None, _NO_BRACKETS))
    return depth


def _depth(brackets: bytes) -> int:
    return max(accumulate(map(_DEPTHS.__getitem__, brackets)), default=0)


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER or abs(int(digits)) >= _LARGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits exceeds 64 bits")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return content
