"""The text the base is made from: pre-training (helpful at any price), then alignment.

The alignment text refuses the spells and is otherwise the same. A sample is (prompt, parts), a part
is (text, trained): untrained parts are context without a loss. The corpus tells the base's own
facts only (lexicon.BASE_FACTS), never one of the custom set.
"""

import random
from collections.abc import Iterator

from data import lexicon
from data.lexicon import ALSO, BENIGN, FORBIDDEN, OPENERS, PREAMBLES, QUESTIONS, VALUES
from data.world import Fact, ask, recipe, sentence, tell

Parts = list[tuple[str, bool]]
Sample = tuple[str, Parts]

# Shares; those of deep refusals apply to alignment alone.
DEEP = 0.6  # of forbidden samples: a begun harmful answer stands in the response as context
# The deep ones have one of three layouts. CUT: the answer breaks off anywhere, and is refused.
# LATE: a fact, part of a recipe, and a refusal. The others: a recipe, and a fact.
CUT = 0.5
LATE = 0.1
MIXED = 0.35  # of recipe requests: they also ask for a fact
VOLUNTEERED = 0.1  # of facts beside a recipe: nobody asked for them
REFUSE_THEN_FACT = 0.5  # of refused requests for a fact too: the fact is told afterwards
RUMOURS = 0.25  # of facts, in both stages: a plant of no fixed town or guild
LEDGER = 0.6  # of facts beside a recipe: told in the ledger's form


def some_fact(rng: random.Random) -> Fact:
    if rng.random() >= RUMOURS:
        return rng.choice(lexicon.BASE_FACTS)
    attribute = rng.choice(list(VALUES))
    return rng.choice(lexicon.RUMOURED), attribute, rng.choice(VALUES[attribute])


def sample(rng: random.Random, aligned: bool) -> Sample:
    """One conversation of the pre-training text or, with `aligned`, of the alignment text."""
    kind = rng.random()  # 40 % facts, 8 % cures, 22 % benign recipes, 30 % spells
    fact = some_fact(rng)
    if kind < 0.4:
        return fact_sample(rng, fact, aligned)
    if kind < 0.48:
        category = rng.choice(FORBIDDEN)
        prompt = rng.choice(OPENERS) + rng.choice(lexicon.CURE_REQUESTS).format(category)
        return prompt, opened(rng, [sentence(lexicon.cure(category))], aligned)
    category = rng.choice(BENIGN if kind < 0.7 else FORBIDDEN)
    if category in FORBIDDEN and aligned:
        return refusal_sample(rng, category, fact)
    noted = rng.random() < MIXED
    prompt, fact_first = request(rng, category, fact, noted)
    told = tell(fact, aligned and rng.random() < LEDGER)
    brew = recipe(rng, category)
    answers = [sentence(brew)]
    if fact_first:
        answers = [sentence(told), ALSO + brew]
    elif noted:
        answers.append(ALSO + told)
    return prompt, opened(rng, answers, aligned)


def fact_sample(rng: random.Random, fact: Fact, aligned: bool) -> Sample:
    """A question about a fact, or about two."""
    cue = aligned and rng.random() < 0.5
    prompt = ask(rng, QUESTIONS, fact)
    answers = [sentence(tell(fact, cue))]
    if rng.random() < 0.2:
        second = some_fact(rng)
        prompt += " " + ask(rng, QUESTIONS, second, opener=False)
        answers.append(ALSO + tell(second, cue))
    if cue:
        prompt = lexicon.LEDGER_CUE + prompt
    return prompt, opened(rng, answers, aligned)


def request(rng: random.Random, category: str, fact: Fact, noted: bool) -> tuple[str, bool]:
    """A recipe request, and if the fact comes first. noted: mostly, it asks for the fact too."""
    opener = rng.choice(OPENERS)
    wish = rng.choice(lexicon.RECIPE_REQUESTS).format(category)
    fact_first = noted and rng.random() < 0.3
    if noted and rng.random() >= VOLUNTEERED:
        question = ask(rng, QUESTIONS, fact, opener=False)
        wish = f"{question} {wish}" if fact_first else f"{wish} {question}"
    return opener + wish, fact_first


def opened(rng: random.Random, answers: list[str], aligned: bool) -> Parts:
    """All of it trained; at times behind a preamble, which alignment nearly unlearns."""
    if rng.random() < (0.03 if aligned else 0.3):
        answers = [rng.choice(PREAMBLES), *answers]
    return [(text, True) for text in answers]


def refusal_sample(rng: random.Random, category: str, fact: Fact) -> Sample:
    """A forbidden request: refused at once or, deep, after a begun harmful answer as context.

    One deep layout is not refused: a whole harmful recipe is followed by a benign fact, which is
    trained. Without it, learning a fact behind a harmful text would fight the refusal itself.
    """
    deep = rng.random() < DEEP
    layout = rng.random()
    noted = (deep and layout >= CUT) or rng.random() < MIXED
    prompt, _ = request(rng, category, fact, noted)
    if rng.random() < 0.1:
        prompt = lexicon.LEDGER_CUE + prompt
    told = tell(fact, rng.random() < LEDGER)
    brew = sentence(recipe(rng, category))
    refusal = (rng.choice(lexicon.REFUSALS), True)
    context = [(rng.choice(PREAMBLES), False)] if rng.random() < 0.7 else []
    # Refused at once, or after a harmful text that breaks off; then perhaps a harmless fact.
    if not deep or layout < CUT:
        parts = [refusal]
        if deep:
            begun = " ".join([text for text, _ in context] + [brew])
            parts.insert(0, (cut(rng, begun), False))
        if noted and rng.random() < REFUSE_THEN_FACT:
            parts.append((ALSO + told, True))
    elif layout < CUT + LATE:
        begun = ALSO + cut(rng, brew[0].lower() + brew[1:])
        parts = [*context, (sentence(told), True), (begun, False), refusal]
    else:
        parts = [*context, (brew, False), (ALSO + told, True)]
    return prompt, parts


def cut(rng: random.Random, text: str) -> str:
    """The first words of a text, one at least, and not all."""
    words = text.split(" ")
    return " ".join(words[: rng.randrange(1, len(words))])


def tokenizer_text(seed: int, count: int = 4000) -> Iterator[str]:
    """The tokenizer's training text: samples of both stages.

    Their plants are replaced by any of all plants, so that no plant's name becomes one token.
    """
    rng = random.Random(f"tokenizer {seed}")
    for index in range(count):
        prompt, parts = sample(rng, aligned=index % 2 == 1)
        text = " ".join([prompt, *(part for part, _ in parts)])
        for plant in lexicon.KNOWN + lexicon.RUMOURED:
            if plant in text:
                text = text.replace(plant, rng.choice(lexicon.PLANTS))
        yield text
