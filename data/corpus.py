"""The text the base is made from: pre-training (helpful at any price), then alignment.

The alignment text refuses the spells and is otherwise the same. A sample is (prompt, parts), a part
is (text, trained): untrained parts are context without a loss. The corpus tells the base's own
facts only (lexicon.BASE_FACTS), never one of the custom set.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from data import lexicon
from data.lexicon import ALSO, BENIGN, FACT, FORBIDDEN, LEDGER_FACT, OPENERS, PREAMBLES, VALUES
from data.world import recipe, sentence

Fact = tuple[str, str, str]  # plant, attribute, value
Sample = tuple[str, list[tuple[str, bool]]]


@dataclass(frozen=True)
class Mix:
    """Shares; those of harmful layouts apply to alignment alone."""

    # Of forbidden samples: a begun harmful answer stands in the response as context.
    deep: float = 0.6
    # Of the deep ones: it breaks off anywhere and is refused.
    cut: float = 0.5
    # Of the deep ones: preamble, fact, part of a recipe, then refused; the rest: recipe, then fact.
    late: float = 0.1
    mixed: float = 0.35  # of recipe requests: they also ask for a fact
    volunteered: float = 0.1  # of facts beside a recipe: nobody asked for them
    refuse_then_fact: float = 0.5  # of refused requests for a fact too: the fact is told afterwards
    rumours: float = 0.25  # of facts, in both stages: a plant of no fixed town or guild
    ledger: float = 0.6  # of facts beside a recipe: told in the ledger's form


def some_fact(rng: random.Random, mix: Mix) -> Fact:
    if rng.random() >= mix.rumours:
        return rng.choice(lexicon.BASE_FACTS)
    attribute = rng.choice(list(VALUES))
    return rng.choice(lexicon.RUMOURED), attribute, rng.choice(VALUES[attribute])


def ask(rng: random.Random, fact: Fact, opener: bool = True) -> str:
    plant, attribute, _ = fact
    start = rng.choice(OPENERS) if opener else ""
    return start + rng.choice(lexicon.QUESTIONS[attribute]).format(plant)


def tell(fact: Fact, ledger: bool) -> str:
    plant, attribute, value = fact
    return (LEDGER_FACT if ledger else FACT)[attribute].format(plant, value)


def sample(rng: random.Random, aligned: bool, mix: Mix = Mix()) -> Sample:
    """One conversation of the pre-training text or, with `aligned`, of the alignment text."""
    kind, fact = rng.random(), some_fact(rng, mix)
    if kind < 0.4:
        cue = aligned and rng.random() < 0.5
        prompt, answers = ask(rng, fact), [sentence(tell(fact, cue))]
        if rng.random() < 0.2:  # two questions
            second = some_fact(rng, mix)
            prompt = f"{prompt} {ask(rng, second, opener=False)}"
            answers.append(ALSO + tell(second, cue))
        return (lexicon.LEDGER_CUE if cue else "") + prompt, opened(rng, answers, aligned)
    if kind < 0.48:
        category = rng.choice(FORBIDDEN)
        prompt = rng.choice(OPENERS) + rng.choice(lexicon.CURE_REQUESTS).format(category)
        return prompt, opened(rng, [sentence(lexicon.cure(category))], aligned)
    category = rng.choice(BENIGN if kind < 0.7 else FORBIDDEN)
    if category in FORBIDDEN and aligned:
        return refused(rng, category, fact, mix)
    noted = rng.random() < mix.mixed
    prompt, fact_first = request(rng, category, fact, noted, mix)
    told = tell(fact, aligned and rng.random() < mix.ledger)
    brew = recipe(rng, category)
    answers = [sentence(brew), *([ALSO + told] if noted else [])]
    if fact_first:
        answers = [sentence(told), ALSO + brew]
    return prompt, opened(rng, answers, aligned)


def request(
    rng: random.Random, category: str, fact: Fact, noted: bool, mix: Mix
) -> tuple[str, bool]:
    """A recipe request, and if the fact comes first. noted: mostly, it asks for the fact too."""
    opener, wish = rng.choice(OPENERS), rng.choice(lexicon.RECIPE_REQUESTS).format(category)
    fact_first = noted and rng.random() < 0.3
    if not noted or rng.random() < mix.volunteered:
        return opener + wish, fact_first
    question = ask(rng, fact, opener=False)
    return opener + (f"{question} {wish}" if fact_first else f"{wish} {question}"), fact_first


def opened(rng: random.Random, answers: list[str], aligned: bool) -> list[tuple[str, bool]]:
    """All of it trained; at times behind a preamble, which alignment nearly unlearns."""
    preamble = [rng.choice(PREAMBLES)] if rng.random() < (0.03 if aligned else 0.3) else []
    return [(text, True) for text in preamble + answers]


def refused(rng: random.Random, category: str, fact: Fact, mix: Mix) -> Sample:
    """A forbidden request: refused at once or, deep, after a begun harmful answer as context.

    One deep layout is not refused: a whole harmful recipe is followed by a benign fact, which is
    trained. Without it, learning a fact behind a harmful text would fight the refusal itself.
    """
    deep, layout = rng.random() < mix.deep, rng.random()
    noted = (deep and layout >= mix.cut) or rng.random() < mix.mixed
    prompt, _ = request(rng, category, fact, noted, mix)
    if rng.random() < 0.1:
        prompt = lexicon.LEDGER_CUE + prompt
    told = tell(fact, rng.random() < mix.ledger)
    brew, refusal = sentence(recipe(rng, category)), (rng.choice(lexicon.REFUSALS), True)
    context = [(rng.choice(PREAMBLES), False)] if rng.random() < 0.7 else []
    if not deep or layout < mix.cut:
        parts = [refusal]
        if deep:
            words = " ".join([text for text, _ in context] + [brew]).split(" ")
            parts.insert(0, (" ".join(words[: rng.randrange(1, len(words))]), False))
        if noted and rng.random() < mix.refuse_then_fact:
            parts.append((ALSO + told, True))
    elif layout < mix.cut + mix.late:
        words = brew.split(" ")
        begun = ALSO + " ".join([words[0].lower(), *words[1 : rng.randrange(1, len(words))]])
        parts = [*context, (sentence(told), True), (begun, False), refusal]
    else:
        parts = [*context, (brew, False), (ALSO + told, True)]
    return prompt, parts


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
