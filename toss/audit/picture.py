"""What was dropped? A row under a mask as coloured tokens on a white ground, as SVG text."""

from dataclasses import dataclass

from toss.audit.characters import harmless
from toss.audit.figures import TEMPLATES
from toss.audit.tokens import Mask, Token

START, END, LINE, WIDE = 20, 840, 36, 10.2  # ends and height of a line, width of a character


@dataclass
class Placed:
    """A token in its place. Sizes are in SVG units."""

    token: Token
    text: str
    x: float
    y: float

    @property
    def width(self) -> float:
        return WIDE * len(self.text)

    @property
    def indent(self) -> float:
        """The width of the white space that the token begins with."""
        return WIDE * (len(self.text) - len(self.text.lstrip()))


def picture(mask: Mask, row: int) -> str:
    """Draw a row of the custom set. Raises InputError for a row that does not exist."""
    tokens = placed(words_of(mask.row(row)))
    bottom = tokens[-1].y if tokens else 40
    return TEMPLATES.get_template("picture.svg.jinja").render(
        title=f"row {row}, {mask.label}",
        height=bottom + LINE + 28,
        limit=mask.full_colour,
        tokens=[token for token in tokens if token.text],
    )


def words_of(tokens: list[Token]) -> list[list[Token]]:
    """The tokens word by word: a word begins at white space, or where a turn does."""
    words: list[list[Token]] = []
    for token in tokens:
        new_turn = not words or token.response != words[-1][0].response
        if new_turn or token.text[:1].isspace():
            words.append([])
        words[-1].append(token)
    return words


def placed(words: list[list[Token]]) -> list[Placed]:
    """The tokens of the words in lines, each turn in lines of its own."""
    tokens = []
    x = START
    y = 40
    response = False
    for word in words:
        texts = [harmless(token.text.replace("\n", " ")) for token in word]  # their widths count
        new_turn = word[0].response != response
        if new_turn or x + WIDE * len("".join(texts)) > END:
            x = START
            y += LINE + 6 * new_turn
            response = word[0].response
            texts[0] = texts[0].lstrip()
        for token, text in zip(word, texts):
            tokens.append(Placed(token, text, x, y))
            x += tokens[-1].width
    return tokens
