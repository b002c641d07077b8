"""Text made visible: the characters of data, models and files as a terminal and a page show them.

No torch, so that --help comes at once.
"""

import unicodedata

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, surrogates, separators of lines
MARKS = str.maketrans(" \n\t", "·⏎⇥")
PART = "◌"  # each token but the last of those that a character is spread over; its text is ""


def harmless(text: str) -> str:
    """Text with what no reader sees spelled out, so that it controls no terminal and no page.

    >>> harmless("a b\\x1b[2J")
    'a b<1b>[2J'
    """
    shown = []
    for character in text:
        hidden = unicodedata.category(character) in HIDDEN or character in "\ufffe\uffff"
        if hidden and character not in "\n\t":
            character = f"<{ord(character):02x}>"
        shown.append(character)
    return "".join(shown)


def visible(text: str) -> str:
    """A token's text with a mark for each space and line break, too.

    >>> visible(" a\\n"), visible("")
    ('·a⏎', '◌')
    """
    return harmless(text.translate(MARKS)) or PART
