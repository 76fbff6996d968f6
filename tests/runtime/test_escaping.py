"""Escaping of free text for a terminal, Markdown, CSV, LaTeX and figures, which then show it literally."""

import pytest

from ema_seg.runtime.escaping import for_csv, for_figure, for_latex, for_markdown, for_markdown_code, for_terminal


@pytest.mark.parametrize(
    ("escape", "text", "expected"),
    [
        (for_terminal, "Blatt 🌱\tlinks\n", "Blatt 🌱\tlinks\n"),
        (for_terminal, "\x1b]0;x\x07\r\x9b2J", r"\x1b]0;x\x07\r\x9b2J"),
        (for_terminal, "\u202egnp.exe\udcff", r"\u202egnp.exe\udcff"),
        (for_markdown, "my_run-2 [0.1, 0.2] (3) a.b", "my_run-2 [0.1, 0.2] (3) a.b"),
        (for_markdown, "_a_ *b* `c` ~d~", r"\_a\_ \*b\* \`c\` \~d\~"),
        (for_markdown, "<img src=x>&lt;|$x$\\", r"\<img src=x>\&lt;\|\$x\$\\"),
        (for_markdown, "![a](b) [c][d] [e]: f", r"![a\](b) [c\][d] [e\]: f"),
        (for_markdown, "# a\n\n- b\x1b", r"\# a - b\\x1b"),
        (for_markdown, "- a", r"\- a"),
        (for_markdown_code, "python train.py", "`python train.py`"),
        (for_markdown_code, "a `b`` <c>\n\n", "``` a `b`` <c> ```"),
        (for_csv, "=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        (for_csv, "@SUM(A1)", "'@SUM(A1)"),
        (for_csv, "+a", "'+a"),
        (for_csv, "-a", "'-a"),
        (for_csv, "\t=1", "'\t=1"),
        (for_csv, "\uff1d1", "'\uff1d1"),
        (for_csv, "-1.5e-3", "-1.5e-3"),
        (for_csv, "a=b\x1b", r"a=b\x1b"),
        (
            for_latex,
            "a_b & 50% {x} \\ ~^#$|",
            r"a\_b \& 50\% \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}\#\$\textbar{}",
        ),
        (for_latex, "[a]", "{}[a]"),
        (for_latex, "*a\nb", "{}*a b"),
        (for_figure, "US$ $\\nothing$\x1b", r"US\$ \$\nothing\$\x1b"),
    ],
)
def test_a_text_is_escaped_for_its_destination(escape, text, expected):
    assert escape(text) == expected
