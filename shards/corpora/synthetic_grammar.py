"""A small made-up sign language and its English: which sign sequences exist, what each means, how each sign is formed.

The order of signs is TIME PLACE SUBJECT MODIFIER OBJECT MODIFIER VERB NOT. The English of it has another order and
needs what no sign shows: tense (decided by the time sign), agreement (decided by MANY), prepositions (decided by the
place), articles (decided by the verb, and by the sound of the next word), possessives (decided by the noun). So one
sign sequence has exactly one right translation, but translating sign by sign is wrong.

In a conversation, a later sentence may point at the subject of the one before (IX). Whether that is *he*, *she*, *it*
or *they* is said nowhere in its own signs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.errors import DataError


@dataclass(frozen=True, slots=True)
class Noun:
    singular: str
    plural: str
    determiner: str = "the"
    places: tuple[str, ...] = ()
    """Where a subject is usually met; drawn more often."""


@dataclass(frozen=True, slots=True)
class Verb:
    base: str
    third: str
    """Third person singular, present."""
    past: str
    progressive: str
    article: str = ""
    """Article of the object; empty for verbs without an object."""
    objects: tuple[str, ...] = ()
    """Usual objects; drawn more often."""


TIMES = {"YESTERDAY": "yesterday", "TODAY": "today", "TOMORROW": "tomorrow"}
PLACES = {
    "GARDEN": "in the garden",
    "MARKET": "at the market",
    "SCHOOL": "at school",
    "BEACH": "on the beach",
    "FOREST": "in the forest",
    "RIVER": "by the river",
}
SUBJECTS = {
    "TEACHER": Noun("teacher", "teachers", places=("SCHOOL", "BEACH")),
    "DOCTOR": Noun("doctor", "doctors", places=("MARKET", "RIVER")),
    "FARMER": Noun("farmer", "farmers", places=("MARKET", "FOREST")),
    "MOTHER": Noun("mother", "mothers", "my", places=("GARDEN", "MARKET")),
    "FRIEND": Noun("friend", "friends", "my", places=("SCHOOL", "BEACH")),
    "NEIGHBOUR": Noun("neighbour", "neighbours", "our", places=("GARDEN", "RIVER")),
    "CHILD": Noun("child", "children", places=("SCHOOL", "GARDEN")),
    "WOMAN": Noun("woman", "women", places=("RIVER", "FOREST")),
    "DOG": Noun("dog", "dogs", places=("BEACH", "RIVER")),
    "CAT": Noun("cat", "cats", places=("GARDEN", "FOREST")),
}
OBJECTS = {
    "CAR": Noun("car", "cars"),
    "BALL": Noun("ball", "balls"),
    "BOOK": Noun("book", "books"),
    "APPLE": Noun("apple", "apples"),
    "FLOWER": Noun("flower", "flowers"),
    "LETTER": Noun("letter", "letters"),
    "UMBRELLA": Noun("umbrella", "umbrellas"),
    "KNIFE": Noun("knife", "knives"),
}
ADJECTIVES = {
    "OLD": "old",
    "BIG": "big",
    "SMALL": "small",
    "HAPPY": "happy",
    "RED": "red",
    "BLUE": "blue",
    "GREEN": "green",
}
VERBS = {
    "BUY": Verb("buy", "buys", "bought", "buying", "a", ("CAR", "APPLE", "UMBRELLA")),
    "SELL": Verb("sell", "sells", "sold", "selling", "a", ("FLOWER", "KNIFE", "BOOK")),
    "FIND": Verb("find", "finds", "found", "finding", "the", ("BALL", "LETTER", "KNIFE")),
    "LOSE": Verb("lose", "loses", "lost", "losing", "the", ("BOOK", "UMBRELLA", "BALL")),
    "BRING": Verb("bring", "brings", "brought", "bringing", "a", ("LETTER", "FLOWER", "BALL")),
    "DRAW": Verb("draw", "draws", "drew", "drawing", "the", ("CAR", "APPLE", "FLOWER")),
    "WAIT": Verb("wait", "waits", "waited", "waiting"),
    "DANCE": Verb("dance", "dances", "danced", "dancing"),
}
MANY, NOT = "MANY", "NOT"
SUBJECT_MODIFIERS = ("OLD", "BIG", "SMALL", "HAPPY", MANY)
OBJECT_MODIFIERS = ("OLD", "BIG", "SMALL", "RED", "BLUE", "GREEN", MANY)

POINT = "IX"
"""The pointing sign of conversations: who is meant was said in the sentence before."""
PRONOUNS = {
    "TEACHER": "he", "DOCTOR": "she", "FARMER": "he", "MOTHER": "she", "FRIEND": "he", "NEIGHBOUR": "she",
    "CHILD": "it", "WOMAN": "she", "DOG": "it", "CAT": "it",
}  # fmt: skip
"""What the pointing sign is in English, by whom it points at; *they* for many."""

VOCABULARY: tuple[str, ...] = (*TIMES, *PLACES, *SUBJECTS, *OBJECTS, *ADJECTIVES, *VERBS, MANY, NOT)
"""Every sign of single sentences, in a fixed order."""

FUNCTION_WORDS: frozenset[str] = frozenset(
    ["a", "an", "the", "my", "our", "in", "at", "on", "by", "did", "do", "does", "is", "are", "will"]
)
"""Words of the English that no sign shows; dropping them from a text gives its pseudo-gloss."""

MIN_SIGNS, MAX_SIGNS = 3, 8
USUAL_WEIGHT = 3.0
"""How much more often a usual place or object is drawn than another one."""
TIME_RATE, PLACE_RATE, SUBJECT_MODIFIER_RATE, OBJECT_MODIFIER_RATE, OBJECT_RATE, NOT_RATE = (
    0.5,
    0.4,
    0.3,
    0.35,
    0.8,
    0.2,
)

_WITH_OBJECT = tuple(gloss for gloss, verb in VERBS.items() if verb.article)
_WITHOUT_OBJECT = tuple(gloss for gloss, verb in VERBS.items() if not verb.article)


def sample(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Draw one sentence: its English text and its signs, 3 to 8 of them (4.6 on average)."""
    while True:
        glosses = _sample_glosses(rng)
        if len(glosses) >= MIN_SIGNS:
            return translate(glosses), glosses


def _sample_glosses(rng: random.Random) -> tuple[str, ...]:
    subject = rng.choice(tuple(SUBJECTS))
    glosses = []
    if rng.random() < TIME_RATE:
        glosses.append(rng.choice(tuple(TIMES)))
    if rng.random() < PLACE_RATE:
        glosses.append(_usually(rng, tuple(PLACES), SUBJECTS[subject].places))
    glosses.append(subject)
    if rng.random() < SUBJECT_MODIFIER_RATE:
        glosses.append(rng.choice(SUBJECT_MODIFIERS))
    if rng.random() < OBJECT_RATE:
        verb = rng.choice(_WITH_OBJECT)
        glosses.append(_usually(rng, tuple(OBJECTS), VERBS[verb].objects))
        if rng.random() < OBJECT_MODIFIER_RATE:
            glosses.append(rng.choice(OBJECT_MODIFIERS))
    else:
        verb = rng.choice(_WITHOUT_OBJECT)
    glosses.append(verb)
    if rng.random() < NOT_RATE:
        glosses.append(NOT)
    return tuple(glosses)


def _usually(rng: random.Random, options: tuple[str, ...], usual: tuple[str, ...]) -> str:
    return rng.choices(options, [USUAL_WEIGHT if option in usual else 1.0 for option in options])[0]


@dataclass(frozen=True, slots=True)
class Referent:
    """Who the pointing sign points at: the subject of the sentence before."""

    gloss: str
    plural: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """A sign sequence taken apart; what is not there is empty."""

    time: str
    place: str
    subject: str
    subject_modifier: str
    object: str
    object_modifier: str
    verb: str
    negated: bool
    referent: Referent | None = None
    """In place of a subject."""

    @property
    def plural(self) -> bool:
        """Whether the subject is."""
        return self.referent.plural if self.referent is not None else self.subject_modifier == MANY

    @property
    def indefinite(self) -> bool:
        """Whether the object is new to the listener; the verb decides."""
        return VERBS[self.verb].article == "a"


def parts_of(glosses: Sequence[str], referent: Referent | None = None) -> Parts:
    """A sign sequence taken apart.

    Raises:
        DataError: the grammar does not have it, or the pointing sign points at nobody.
    """
    rest = list(glosses)

    def take(options: Sequence[str] | Mapping[str, object]) -> str:
        return rest.pop(0) if rest and rest[0] in options else ""

    time, place = take(TIMES), take(PLACES)
    pointed = take((POINT,))
    subject = "" if pointed else take(SUBJECTS)
    subject_modifier = "" if pointed else take(SUBJECT_MODIFIERS)
    obj = take(OBJECTS)
    object_modifier = take(OBJECT_MODIFIERS) if obj else ""
    verb, negated = take(VERBS), take((NOT,))
    if rest or not (subject or pointed) or not verb or bool(obj) != bool(VERBS[verb].article):
        raise DataError(
            f"{' '.join(glosses)!r} is not a sentence of the synthetic sign language",
            where="synthetic grammar",
            fix="keep the order TIME PLACE SUBJECT MODIFIER OBJECT MODIFIER VERB NOT; "
            f"{', '.join(_WITHOUT_OBJECT)} take no object, the other verbs need one",
        )
    if pointed and referent is None:
        what = f"{' '.join(glosses)!r} does not say who is meant"
        raise DataError(what, where="synthetic grammar", fix="give the subject of the sentence before")
    whom = referent if pointed else None
    return Parts(time, place, subject, subject_modifier, obj, object_modifier, verb, bool(negated), whom)


def translate(glosses: Sequence[str], referent: Referent | None = None) -> str:
    """The one right English text of a sign sequence. Raises as `parts_of`.

    Args:
        glosses: the signs.
        referent: who the pointing sign points at.
    """
    parts = parts_of(glosses, referent)
    words = [TIMES[parts.time]] if parts.time else []
    if parts.referent is not None:
        words.append("they" if parts.plural else PRONOUNS[parts.referent.gloss])
    else:
        noun = SUBJECTS[parts.subject]
        words += _noun_phrase(noun, parts.subject_modifier, noun.determiner)
    words += _verb_phrase(VERBS[parts.verb], parts.time, parts.plural, parts.negated)
    if parts.object:
        words += _noun_phrase(OBJECTS[parts.object], parts.object_modifier, VERBS[parts.verb].article)
    return " ".join([*words, *([PLACES[parts.place]] if parts.place else [])])


def follow(rng: random.Random, glosses: Sequence[str]) -> tuple[str, tuple[str, ...], Referent]:
    """Draw a sentence about the subject of another one: its English text, its signs, and who they point at."""
    parts = parts_of(glosses)
    referent = Referent(parts.subject, parts.plural)
    while True:
        drawn = parts_of(_sample_glosses(rng))
        rest = (drawn.object, drawn.object_modifier, drawn.verb, NOT if drawn.negated else "")
        signs = tuple(filter(None, (drawn.time, drawn.place, POINT, *rest)))
        if len(signs) >= MIN_SIGNS:
            return translate(signs, referent), signs, referent


def _noun_phrase(noun: Noun, modifier: str, determiner: str) -> list[str]:
    if modifier == MANY:
        return ["many", noun.plural]
    words = [ADJECTIVES[modifier], noun.singular] if modifier else [noun.singular]
    if determiner == "a" and words[0][0] in "aeiou":
        determiner = "an"
    return [determiner, *words]


def _verb_phrase(verb: Verb, time: str, plural: bool, negated: bool) -> list[str]:
    negation = ["not"] if negated else []
    if time == "TOMORROW":
        return ["will", *negation, verb.base]
    if time == "TODAY":
        return ["are" if plural else "is", *negation, verb.progressive]
    if time == "YESTERDAY":
        return ["did", "not", verb.base] if negated else [verb.past]
    if negated:
        return ["do" if plural else "does", "not", verb.base]
    return [verb.base if plural else verb.third]


Point = tuple[float, float]
LOCATIONS: dict[str, Point] = {
    "high": (-0.33, 0.15),
    "temple": (-0.15, 0.21),
    "chin": (-0.01, 0.37),
    "side": (-0.38, 0.46),
    "chest": (-0.10, 0.57),
    "across": (0.22, 0.50),
    "low": (-0.27, 0.78),
}
"""Where the dominant hand is; the signer's right hand is on the left of the picture."""
TWO_HANDED_LOCATIONS = ("high", "side", "chest", "low")
"""Where two mirrored hands do not cover each other or the face."""
HANDSHAPES = ("fist", "flat_vertical", "flat_horizontal", "point", "vee", "star", "ring", "wye")
ONE_PLACE_PATHS: tuple[str, ...] = ("hold", "circle", "shake", "tap")
TRAVELLING_PATHS: tuple[str, ...] = ("line", "arc")


@dataclass(frozen=True, slots=True)
class Sign:
    hands: int
    handshape: str
    start: str
    end: str
    path: str

    def differences(self, other: Sign) -> int:
        """How many of hands, handshape, location and movement two signs differ in."""
        return (
            (self.hands != other.hands)
            + (self.handshape != other.handshape)
            + ((self.start, self.end) != (other.start, other.end))
            + (self.path != other.path)
        )


MINIMAL_PAIRS = {
    "DOG": Sign(1, "wye", "chin", "chin", "tap"),
    "CAT": Sign(1, "wye", "chest", "chest", "tap"),
    "RED": Sign(1, "point", "temple", "temple", "shake"),
    "BLUE": Sign(1, "star", "temple", "temple", "shake"),
    "BUY": Sign(2, "ring", "side", "chest", "line"),
    "SELL": Sign(2, "ring", "chest", "side", "line"),
}
"""Confusable on purpose: DOG/CAT differ only in location, RED/BLUE only in handshape, BUY/SELL only in direction."""


def _lexicon(seed: int) -> dict[str, Sign]:
    """The minimal pairs, and random signs that differ from all others in at least two parts."""
    rng = random.Random(f"lexicon/{seed}")
    signs = dict(MINIMAL_PAIRS)
    for index, gloss in enumerate((*VOCABULARY, POINT)):
        while gloss not in signs:
            sign = _draw_sign(rng, HANDSHAPES[index % len(HANDSHAPES)])
            if all(sign.differences(other) >= 2 for other in signs.values()):
                signs[gloss] = sign
    return signs


def _draw_sign(rng: random.Random, handshape: str) -> Sign:
    hands = 2 if rng.random() < 0.35 else 1
    places = TWO_HANDED_LOCATIONS if hands == 2 else tuple(LOCATIONS)
    start = rng.choice(places)
    path = rng.choice(ONE_PLACE_PATHS + TRAVELLING_PATHS)
    end = start
    if path in TRAVELLING_PATHS:
        far = [place for place in places if math.dist(LOCATIONS[place], LOCATIONS[start]) > 0.24]
        end = rng.choice(far)
    return Sign(hands, handshape, start, end, path)


LEXICON: dict[str, Sign] = _lexicon(seed=7)
"""The form of every sign: one language, whatever the seed of a corpus."""
