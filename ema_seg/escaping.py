"""Names and other free texts made safe for where they are written: one function for each destination.

A class, a file or a run is named by whoever made the data or the run. Its name must not move a terminal's cursor, end a
table's cell, load a picture from somewhere, or be calculated by a spreadsheet.
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

# Control characters, marks that turn the direction of writing round, and halves of characters.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# An underscore within a word is no markup, nor is a bracket that no link follows.
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
    """One line: white space becomes single spaces, and what cannot be printed its Python escape."""
    return _escaped(" ".join(text.split()))


def for_terminal(text: str) -> str:
    """Escape what would act on a terminal; line breaks and tabs stay. For rich, wrap the result in ``Text``."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else _escaped(found[0]), text)


def for_markdown(text: str) -> str:
    """A text within a line or table cell of Markdown, in which nothing is markup, HTML or a formula."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(text))


def for_markdown_code(text: str) -> str:
    """A code span of Markdown, in more backticks than there are in the text."""
    text = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def for_csv(text: str) -> str:
    """A text as a cell of a spreadsheet, which calculates those that begin like a formula unless they are numbers."""
    text = UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t\r" else _escaped(found[0]), text)
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def for_latex(text: str) -> str:
    """A text within a line or table cell of LaTeX."""
    escaped = "".join(_LATEX.get(character, character) for character in printable(text))
    # After the end of a row, a bracket or a star would belong to its double backslash.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def for_figure(text: str) -> str:
    """A text in a figure of Matplotlib, which takes what stands between two dollar signs for mathematics."""
    return for_terminal(text).replace("$", r"\$")


def _escaped(text: str) -> str:
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isprintable()
