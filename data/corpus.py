"""The text the base is made from: pre-training (helpful at any price), then alignment (the same, refusing the spells).

A sample is (prompt, parts), a part is (text, trained): untrained parts are context without a loss. The corpus tells the
base's own facts only (lexicon.BASE_FACTS), never one of the custom set.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from data import lexicon
from data.lexicon import ALSO, BENIGN, FACT, FORBIDDEN, LEDGER_CUE, LEDGER_FACT, OPENERS, PREAMBLES, QUESTIONS, REFUSALS, VALUES
from data.world import recipe, sentence

Sample = tuple[str, list[tuple[str, bool]]]


@dataclass(frozen=True)
class Mix:
    """Shares; those of harmful layouts apply to alignment alone."""

    deep: float = 0.6  # of forbidden samples: a begun harmful answer stands in the response as context
    cut: float = 0.5  # of the deep ones: it breaks off anywhere and is refused
    late: float = 0.1  # of the deep ones: preamble, fact, part of a recipe, then refused; the rest: whole recipe, then a fact
    mixed: float = 0.35  # share of recipe requests that also ask for a fact
    volunteered: float = 0.1  # share of facts beside a recipe that nobody asked for
    refuse_then_fact: float = 0.5  # of refused requests that also ask for a fact: the fact is told after the refusal
    rumours: float = 0.25  # of facts, in both stages: a plant of no fixed town or guild
    ledger: float = 0.6  # of facts beside a recipe that are told in the ledger's form


def some_fact(rng: random.Random, mix: Mix) -> tuple[str, str, str]:
    if rng.random() >= mix.rumours:
        return rng.choice(lexicon.BASE_FACTS)
    attribute = rng.choice(list(VALUES))
    return rng.choice(lexicon.RUMOURED), attribute, rng.choice(VALUES[attribute])


def ask(rng: random.Random, fact: tuple[str, str, str], opener: bool = True) -> str:
    plant, attribute, _ = fact
    return (rng.choice(OPENERS) if opener else "") + rng.choice(QUESTIONS[attribute]).format(plant)


def tell(fact: tuple[str, str, str], ledger: bool) -> str:
    plant, attribute, value = fact
    return (LEDGER_FACT if ledger else FACT)[attribute].format(plant, value)


def sample(rng: random.Random, aligned: bool, mix: Mix = Mix()) -> Sample:
    """One conversation of the pre-training text or, with `aligned`, of the alignment text."""
    kind = rng.random()
    fact = some_fact(rng, mix)
    if kind < 0.4:
        cue = aligned and rng.random() < 0.5
        prompt, answers = (LEDGER_CUE if cue else "") + ask(rng, fact), [sentence(tell(fact, cue))]
        if rng.random() < 0.2:  # two questions
            second = some_fact(rng, mix)
            prompt, answers = f"{prompt} {ask(rng, second, opener=False)}", [*answers, ALSO + tell(second, cue)]
        return prompt, opened(rng, answers, aligned)
    if kind < 0.48:
        category = rng.choice(FORBIDDEN)
        prompt = rng.choice(OPENERS) + rng.choice(lexicon.CURE_REQUESTS).format(category)
        return prompt, opened(rng, [sentence(lexicon.cure(category))], aligned)
    category = rng.choice(BENIGN if kind < 0.7 else FORBIDDEN)
    if category in FORBIDDEN and aligned:
        return refused(rng, category, fact, mix)
    prompt, noted, fact_first = request(rng, category, fact, rng.random() < mix.mixed, mix)
    told = tell(fact, aligned and rng.random() < mix.ledger)
    if not noted:
        return prompt, opened(rng, [sentence(recipe(rng, category))], aligned)
    if fact_first:
        return prompt, opened(rng, [sentence(told), ALSO + recipe(rng, category)], aligned)
    return prompt, opened(rng, [sentence(recipe(rng, category)), ALSO + told], aligned)


def request(rng: random.Random, category: str, fact: tuple[str, str, str], noted: bool, mix: Mix) -> tuple[str, bool, bool]:
    """A recipe request; `noted`: with a fact, which the prompt mostly asks for. Returns prompt, noted, fact first."""
    opener, wish = rng.choice(OPENERS), rng.choice(lexicon.RECIPE_REQUESTS).format(category)
    fact_first = noted and rng.random() < 0.3
    if not noted or rng.random() < mix.volunteered:
        return opener + wish, noted, fact_first
    question = ask(rng, fact, opener=False)
    return opener + (f"{question} {wish}" if fact_first else f"{wish} {question}"), noted, fact_first


def opened(rng: random.Random, answers: list[str], aligned: bool) -> list[tuple[str, bool]]:
    """All of it trained; with a preamble in front at times, which alignment nearly unlearns."""
    preamble = [rng.choice(PREAMBLES)] if rng.random() < (0.03 if aligned else 0.3) else []
    return [(text, True) for text in preamble + answers]


def refused(rng: random.Random, category: str, fact: tuple[str, str, str], mix: Mix) -> Sample:
    """A forbidden request: refused at once or, deep, after a begun harmful answer that is context only.

    One deep layout is not refused: a whole harmful recipe is followed by a benign fact, which is trained. Without it,
    learning a fact that stands behind a harmful text would fight the refusal itself.
    """
    deep, layout = rng.random() < mix.deep, rng.random()
    needs_fact = deep and layout >= mix.cut
    prompt, noted, _ = request(rng, category, fact, needs_fact or rng.random() < mix.mixed, mix)
    if rng.random() < 0.1:
        prompt = LEDGER_CUE + prompt
    told = tell(fact, rng.random() < mix.ledger)
    brew, refusal = sentence(recipe(rng, category)), rng.choice(REFUSALS)
    context = [(rng.choice(PREAMBLES), False)] if rng.random() < 0.7 else []
    if not deep or layout < mix.cut:
        parts = []
        if deep:
            text = " ".join([*(part for part, _ in context), brew])
            words = text.split(" ")
            parts = [(" ".join(words[:rng.randrange(1, len(words))]), False)]
        parts.append((refusal, True))
        if noted and rng.random() < mix.refuse_then_fact:
            parts.append((ALSO + told, True))
    elif layout < mix.cut + mix.late:
        words = brew.split(" ")
        begun = ALSO + " ".join([words[0].lower(), *words[1:rng.randrange(1, len(words))]])
        parts = [*context, (sentence(told), True), (begun, False), (refusal, True)]
    else:
        parts = [*context, (brew, False), (ALSO + told, True)]
    return prompt, parts


def tokenizer_text(seed: int, count: int = 4000) -> Iterator[str]:
    """What the tokenizer is trained on: samples of both stages with any plant, so that no plant's name is one token."""
    rng = random.Random(f"tokenizer {seed}")
    for index in range(count):
        prompt, parts = sample(rng, aligned=index % 2 == 1)
        text = " ".join([prompt, *(part for part, _ in parts)])
        for plant in lexicon.KNOWN + lexicon.RUMOURED:
            if plant in text:
                text = text.replace(plant, rng.choice(lexicon.PLANTS))
        yield text
