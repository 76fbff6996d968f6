"""Readers of untrusted YAML, JSON and CSV files: the correct value, or an error of one sentence."""

import csv
import json
import os
import re

import pytest

from ema_seg.runtime.errors import DataError
from ema_seg.runtime.texts import read_json, read_rows, read_table, read_yaml


@pytest.fixture
def text_file(tmp_path):
    def write(content):
        path = tmp_path / "text"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# A YAML bomb: a few hundred bytes that nested aliases expand to 9**10 values.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghij"
)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (BOMB, "line 5: more than 20,000 values with aliases expanded"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x,", "{y: 1},"), "values with aliases expanded"),
        ("&a [*a]", "line 1: the alias *a is undefined"),
        ("9" * 5000, "line 1: a number of 5,000 characters exceeds the limit of 100"),
        ("0x" + "f" * 90, "line 1: a number exceeds 64 bits"),
        ("1" + ":1" * 5000, "a number of 10,001 characters"),
        ("[" * 3000, "nested more than 100 levels deep"),
        ("- " * 3000, "nested more than 100 levels deep"),
        ("a: 1\nb: 2\na: 3", "line 3 has the key 'a' for the second time"),
        ("a: b: c", "line 1: mapping values are not allowed"),
        ("a\0b", "unacceptable character #x0000"),
        ("!!int one", "invalid literal for int"),
        ("!!bool one", "a value does not match its tag"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("!!set {a}", "could not determine a constructor"),
        ("[" + '"\\ud83c", ' * 8000 + "]", "surrogate escapes"),
    ],
)
def test_invalid_yaml_is_refused(content, found, text_file):
    with pytest.raises(DataError, match=rf"text: is not valid YAML \(.*{re.escape(found)}.*\); correct the file\.$"):
        read_yaml(text_file(content))


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("[2024-13-45, 2024-01-02]", ["2024-13-45", "2024-01-02"]),
        (json.dumps(["🌱", r"\ud83c\udf31"]), ["🌱", r"\ud83c\udf31"]),
        ('\ufeff{"a": [1, 1e-3, 0x1F, 1_000, .5, -1.5, true, null, ~, on, "1", 1:30]}', None),
        ("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: [*a, *a]}", None),
        ("", None),
    ],
)
def test_valid_yaml_is_read(content, value, text_file):
    # OmegaConf's loader is the reference; it reads no dates either.
    import yaml
    from omegaconf._utils import get_yaml_loader

    expected = value or yaml.load(content.removeprefix("\ufeff"), Loader=get_yaml_loader())  # noqa: S506, of a constant
    assert read_yaml(text_file(content)) == expected


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[" * 3000 + "]" * 3000, "it is nested more than 100 levels deep"),
        ('{"a":' * 200_000, "it is nested more than 100 levels deep"),
        ("[" + "9" * 5000 + "]", "a number of 5,000 digits exceeds 64 bits"),
        ("[123456789012345678901234]", "a number of 24 digits exceeds 64 bits"),
        ('{"a": 1, "a": 2}', "it has the key 'a' twice"),
        ("[NaN]", "NaN is not JSON"),
        ('["a\0b"]', "Invalid control character"),
        ("[1", "Expecting ',' delimiter"),
    ],
)
def test_invalid_json_is_refused(content, found, text_file):
    with pytest.raises(DataError, match=rf"text: is not JSON \(.*{re.escape(found)}.*\); restore the file\.$"):
        read_json(text_file(content))


def test_valid_json_is_read(text_file):
    value = {"brackets": '[\\"{' * 200, "digits": "1" * 30, "small": 1.2345678901234567890123e-05, "emoji": "🌱"}
    value["deep"] = [[[2**63]]]
    for ascii_only in (True, False):
        assert read_json(text_file("\ufeff" + json.dumps(value, ensure_ascii=ascii_only))) == value


def test_a_table_is_read_or_refused(text_file):
    assert read_rows(text_file("\ufeffepoch,loss\r\n0,0.5\r\n\r\n1,0.25\r\n"))[1] == {"epoch": "1", "loss": "0.25"}
    assert read_rows(text_file("")) == []
    assert read_table(text_file(b"caf\xe9,b"))[0][0] == os.fsdecode(b"caf\xe9")
    for content, found in {
        "a,a\n1,2": "its header has a name twice",
        "a,b\n1,2\n3": "row 2 has 1 cells instead of 2",
        "a,b\n" + "x" * (csv.field_size_limit() + 1): "field larger than field limit",
    }.items():
        with pytest.raises(DataError, match=rf"text: is not .*{found}.*; restore the file\.$"):
            read_rows(text_file(content))


def test_only_text_files_of_some_size_are_read(tmp_path, text_file):
    for content in ("grün: 1".encode("utf-16"), "a\ngrün: 1".encode("latin-1")):
        for read in (read_yaml, read_json):
            with pytest.raises(DataError, match=r"text: line \d is not UTF-8; save the file as UTF-8, or "):
                read(text_file(content))
    os.truncate(text_file(""), 2**31)
    for read, most in ((read_yaml, 1), (read_json, 1024), (read_rows, 256)):
        with pytest.raises(DataError, match=rf"has 2048\.0 MiB, expected .* of at most {most} MiB; "):
            read(tmp_path / "text")
    os.mkfifo(tmp_path / "pipe")  # without a writer
    with pytest.raises(DataError, match="pipe: is a pipe or a device, expected a file"):
        read_yaml(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError, match="directory"):
            read_json(path)
