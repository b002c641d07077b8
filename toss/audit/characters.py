"""Text made visible: the characters of data, models and files as a terminal and a page show them.

No torch, so that --help comes at once.
"""

import unicodedata

# "": the first tokens of a character that is spread over several tokens
MARKS = {"": "◌", " ": "·", "\n": "⏎", "\t": "⇥"}
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories of invisible characters
NOT_IN_XML = "\ufffe\uffff"


def is_hidden(character: str) -> bool:
    """True for what no reader sees, and a terminal or a page might obey."""
    if character in "\n\t":
        return False
    return character in NOT_IN_XML or unicodedata.category(character) in HIDDEN


def harmless(text: str) -> str:
    """Text with invisible characters spelled out, so that they control no terminal and no page.

    >>> harmless("a b\\x1b[2J")
    'a b<1b>[2J'
    """
    shown = []
    for character in text:
        if is_hidden(character):
            character = f"<{ord(character):02x}>"
        shown.append(character)
    return "".join(shown)


def visible(text: str) -> str:
    """A token's text with a mark for each space and line break, too.

    >>> visible(" a\\n"), visible("")
    ('·a⏎', '◌')
    """
    if text == "":
        return MARKS[""]
    for character in (" ", "\n", "\t"):
        text = text.replace(character, MARKS[character])
    return harmless(text)
