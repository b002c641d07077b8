"""One row of a run as coloured tokens: an SVG picture on a white ground."""

from toss.audit.figures import TEMPLATES
from toss.audit.tokens import Mask, Token, harmless

START, END, LINE = 20, 840, 36  # left and right end of the lines, and their height
CHARACTER = 10.2  # the width of each character


def picture(mask: Mask, row: int) -> str:
    """A row under a mask, as SVG text."""
    words: list[list[Token]] = []
    for token in mask.row(row):
        turn = not words or token.response != words[-1][0].response
        if turn or token.text[:1].isspace():
            words.append([])
        words[-1].append(token)
    tokens, x, y, response = [], START, 40, False
    for word in words:
        texts = [harmless(token.text.replace("\n", " ")) for token in word]  # their widths count
        turn = word[0].response != response
        if turn or x + CHARACTER * len("".join(texts)) > END:
            x, y, response = START, y + LINE + 6 * turn, word[0].response
            texts[0] = texts[0].lstrip()
        for token, text in zip(word, texts):
            wide, skipped = CHARACTER * len(text), CHARACTER * (len(text) - len(text.lstrip()))
            tokens += [(token, text, x, y, wide, skipped)] if text else []
            x += wide
    values = {"title": f"row {row}, {mask.label}", "height": y + LINE + 28}
    template = TEMPLATES.get_template("picture.svg.jinja")
    return template.render(tokens=tokens, limit=mask.full, **values)
