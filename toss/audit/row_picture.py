"""What was dropped? A row under a mask as coloured tokens on a white ground, as SVG text."""

from toss.audit.characters import harmless
from toss.audit.figures import TEMPLATES
from toss.audit.tokens import Mask, Token

START, END, LINE, WIDE = 20, 840, 36, 10.2  # ends and height of a line, width of a character
LONG = 40  # characters


def picture(mask: Mask, row: int) -> str:
    """Draw a row of the custom set. Raises InputError for a row that does not exist."""
    placed = []  # (token, text, x, y)
    x = START
    y = 40
    response = False
    for word in words_of(mask.row(row)):
        texts = [harmless(token.text.replace("\n", " ")) for token in word]  # their widths count
        new_turn = word[0].response != response
        if new_turn or x + WIDE * len("".join(texts)) > END:
            x = START
            y += LINE + 6 * new_turn
            response = word[0].response
            texts[0] = texts[0].lstrip()
        for token, text in zip(word, texts):
            placed.append((token, text, x, y))
            x += WIDE * len(text)
    return TEMPLATES.get_template("row_picture.svg.jinja").render(
        title=f"row {row}, {mask.label}",
        height=y + LINE + 28,
        limit=mask.full_colour,
        wide=WIDE,
        placed=placed,
    )


def words_of(tokens: list[Token]) -> list[list[Token]]:
    """The tokens word by word: a word begins at white space, where a turn does, or where the one
    before is LONG: some languages have no spaces."""
    words = []
    length = 0
    for token in tokens:
        new_turn = not words or token.response != words[-1][0].response
        if new_turn or token.text[:1].isspace() or length + len(token.text) > LONG:
            words.append([])
            length = 0
        length += len(token.text)
        words[-1].append(token)
    return words
