"""Escaping of names and other free texts: one function for each destination.

Names of classes, files and runs are untrusted. They must not move a terminal's cursor, end a table's cell, load a
picture from a URL, or be evaluated by a spreadsheet.
"""

import re

__all__ = [
    "UNPRINTABLE",
    "for_csv",
    "for_figure",
    "for_latex",
    "for_markdown",
    "for_markdown_code",
    "for_terminal",
    "printable",
]

# Control characters, line separators, bidirectional controls and lone surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# An underscore within a word and a bracket without a link are not markup.
_MARKDOWN = re.compile(r"[\\`*<|&~$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^(?:[#>]|[-+](?=\s))")
_FORMULA = re.compile(r"[=+\-@\uff1d\uff0b\uff0d\uff20\t\r\n]")
_LATEX = {character: f"\\{character}" for character in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "\N{MINUS SIGN}": "$-$",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
}


def printable(text: str) -> str:
    """Return one line: white space becomes single spaces, an unprintable character its Python escape."""
    return _escaped(" ".join(text.split()))


def for_terminal(text: str) -> str:
    """Escape control characters for a terminal except line breaks and tabs. For rich, wrap the result in ``Text``."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else _escaped(found[0]), text)


def for_markdown(text: str) -> str:
    """Escape markup, HTML and formulas for a line or table cell of Markdown."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(text))


def for_markdown_code(text: str) -> str:
    """Return a code span of Markdown, in more backticks than the text has in a row."""
    text = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def for_csv(text: str) -> str:
    """Escape a spreadsheet cell: a text that begins like a formula and is not a number gets an apostrophe in front."""
    text = UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t\r" else _escaped(found[0]), text)
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def for_latex(text: str) -> str:
    """Escape a text for a line or table cell of LaTeX."""
    escaped = "".join(_LATEX.get(character, character) for character in printable(text))
    # After the double backslash of a row, LaTeX would read a bracket or star as its argument.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def for_figure(text: str) -> str:
    """Escape a text for Matplotlib, which reads text between dollar signs as mathematics."""
    return for_terminal(text).replace("$", r"\$")


def _escaped(text: str) -> str:
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isprintable()
