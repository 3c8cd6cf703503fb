"""The same sign sequences in German: a second spoken language of one signing, with its own order and agreement.

The verb stands second, or its auxiliary does and the verb last; articles and adjectives agree with gender, number and
case. A pronoun is chosen by the gender of the German noun, so that English and German disagree about it (a dog is
*it*, but *er*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shards.corpora.synthetic_grammar import MANY, TIMES, Parts, Referent, parts_of


@dataclass(frozen=True, slots=True)
class Noun:
    gender: str
    """m, f or n."""
    singular: str
    plural: str
    determiner: str = "d"
    """``d`` for der, die, das; else the stem of a possessive."""


NOUNS = {
    "TEACHER": Noun("m", "Lehrer", "Lehrer"),
    "DOCTOR": Noun("f", "Ärztin", "Ärztinnen"),
    "FARMER": Noun("m", "Bauer", "Bauern"),
    "MOTHER": Noun("f", "Mutter", "Mütter", "mein"),
    "FRIEND": Noun("m", "Freund", "Freunde", "mein"),
    "NEIGHBOUR": Noun("f", "Nachbarin", "Nachbarinnen", "unser"),
    "CHILD": Noun("n", "Kind", "Kinder"),
    "WOMAN": Noun("f", "Frau", "Frauen"),
    "DOG": Noun("m", "Hund", "Hunde"),
    "CAT": Noun("f", "Katze", "Katzen"),
    "CAR": Noun("n", "Auto", "Autos"),
    "BALL": Noun("m", "Ball", "Bälle"),
    "BOOK": Noun("n", "Buch", "Bücher"),
    "APPLE": Noun("m", "Apfel", "Äpfel"),
    "FLOWER": Noun("f", "Blume", "Blumen"),
    "LETTER": Noun("m", "Brief", "Briefe"),
    "UMBRELLA": Noun("m", "Schirm", "Schirme"),
    "KNIFE": Noun("n", "Messer", "Messer"),
}
ADJECTIVES = {
    "OLD": "alt", "BIG": "groß", "SMALL": "klein", "HAPPY": "froh", "RED": "rot", "BLUE": "blau", "GREEN": "grün",
}  # fmt: skip
ADVERBS = {"YESTERDAY": "gestern", "TODAY": "heute", "TOMORROW": "morgen"}
PLACES = {
    "GARDEN": "im Garten", "MARKET": "am Markt", "SCHOOL": "in der Schule", "BEACH": "am Strand",
    "FOREST": "im Wald", "RIVER": "am Fluss",
}  # fmt: skip
VERBS = {
    "BUY": ("kaufen", "kauft", "kaufte", "kauften"),
    "SELL": ("verkaufen", "verkauft", "verkaufte", "verkauften"),
    "FIND": ("finden", "findet", "fand", "fanden"),
    "LOSE": ("verlieren", "verliert", "verlor", "verloren"),
    "BRING": ("bringen", "bringt", "brachte", "brachten"),
    "DRAW": ("zeichnen", "zeichnet", "zeichnete", "zeichneten"),
    "WAIT": ("warten", "wartet", "wartete", "warteten"),
    "DANCE": ("tanzen", "tanzt", "tanzte", "tanzten"),
}
"""Infinitive (also the plural of the present), third person, and both numbers of the past."""
_ARTICLES = {"nom": {"m": "der", "f": "die", "n": "das"}, "acc": {"m": "den", "f": "die", "n": "das"}}
_STRONG = {"nom": {"m": "er", "f": "e", "n": "es"}, "acc": {"m": "en", "f": "e", "n": "es"}}
_EIN = {"nom": {"m": "", "f": "e", "n": ""}, "acc": {"m": "en", "f": "e", "n": ""}}
_PRONOUNS = {"m": "er", "f": "sie", "n": "es"}


def translate(glosses: Sequence[str], referent: Referent | None = None) -> str:
    """The one right German text of a sign sequence. Raises as `synthetic_grammar.parts_of`.

    Args:
        glosses: the signs.
        referent: who the pointing sign points at.
    """
    parts = parts_of(glosses, referent)
    subject = _subject(parts)
    verb, last = _verb(parts)
    obj = _object(parts)
    negation = ["nicht"] if parts.negated else []
    place = [PLACES[parts.place]] if parts.place else []
    first = [ADVERBS[parts.time], verb, *subject] if parts.time in TIMES else [*subject, verb]
    return " ".join([*first, *obj, *negation, *place, *last])


def _subject(parts: Parts) -> list[str]:
    if parts.referent is not None:
        return ["sie" if parts.referent.plural else _PRONOUNS[NOUNS[parts.referent.gloss].gender]]
    return _noun_phrase(NOUNS[parts.subject], parts.subject_modifier, NOUNS[parts.subject].determiner, "nom")


def _object(parts: Parts) -> list[str]:
    if not parts.object:
        return []
    determiner = "ein" if parts.indefinite else "d"
    return _noun_phrase(NOUNS[parts.object], parts.object_modifier, determiner, "acc")


def _noun_phrase(noun: Noun, modifier: str, determiner: str, case: str) -> list[str]:
    if modifier == MANY:
        return ["viele", noun.plural]
    definite = determiner == "d"
    article = _ARTICLES[case][noun.gender] if definite else determiner + _EIN[case][noun.gender]
    if not modifier:
        return [article, noun.singular]
    weak = "en" if (case, noun.gender) == ("acc", "m") else "e"
    ending = weak if definite else _STRONG[case][noun.gender]
    stem = ADJECTIVES[modifier]
    return [article, stem + ending, noun.singular]


def _verb(parts: Parts) -> tuple[str, list[str]]:
    """The second word of the sentence, and its last ones."""
    infinitive, present, past, past_plural = VERBS[parts.verb]
    if parts.time == "TOMORROW":
        return ("werden" if parts.plural else "wird"), [infinitive]
    if parts.time == "YESTERDAY":
        return (past_plural if parts.plural else past), []
    return (infinitive if parts.plural else present), []
