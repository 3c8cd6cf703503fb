"""Scores against sacreBLEU's documented example, rouge-score, and values worked out by hand."""

from __future__ import annotations

import random
import unicodedata

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from pipeline.evaluate.metrics import lcs_length, rouge_l, score, sentence_bleu, sentence_rouge_l
from pipeline.evaluate.protocols import PROTOCOLS, get_protocol
from shards.errors import DataError

DEFAULT = get_protocol("default")
# The example of sacreBLEU's README, with the scores printed there.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_sacrebleu_readme_example() -> None:
    scores = score(SYSTEM, REFERENCES, DEFAULT)
    assert scores.bleu4 == pytest.approx(48.530827009929865, abs=1e-9)
    assert scores.chrf == pytest.approx(59.73, abs=0.005)
    assert scores.signatures["bleu"] == f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert scores.signatures["chrf"].startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no")
    assert (scores.samples, scores.protocol) == (3, "default")


def test_lower_orders_are_cumulative_bleu() -> None:
    scores = score(SYSTEM, REFERENCES, DEFAULT)
    streams = list(map(list, zip(*REFERENCES, strict=True)))
    for order, value in enumerate([scores.bleu1, scores.bleu2, scores.bleu3, scores.bleu4], start=1):
        expected = sacrebleu.BLEU(max_ngram_order=order).corpus_score(SYSTEM, streams).score
        assert value == pytest.approx(expected, abs=1e-9)


def test_brevity_penalty_by_hand() -> None:
    scores = score(["a b c d"], ["a b c d e"], DEFAULT)
    penalty = 2.718281828459045 ** (1 - 5 / 4)
    assert scores.brevity_penalty == pytest.approx(penalty)
    assert scores.bleu4 == pytest.approx(100 * penalty)
    assert (scores.hypothesis_tokens, scores.reference_tokens) == (4, 5)


def test_single_and_ragged_references() -> None:
    assert score(SYSTEM, [refs[0] for refs in REFERENCES], DEFAULT) == score(
        SYSTEM, [refs[:1] for refs in REFERENCES], DEFAULT
    )
    ragged = score(["the cat", "a dog"], [["a cat", "the cat"], "a dog"], DEFAULT)
    assert (ragged.bleu2, ragged.rouge_l) == (pytest.approx(100.0), pytest.approx(100.0))


def test_empty_hypotheses_score_zero() -> None:
    scores = score(["", "  "], ["a b c", "d"], DEFAULT)
    assert (scores.bleu1, scores.bleu4, scores.chrf, scores.rouge_l, scores.rouge_l_mscoco) == (0, 0, 0, 0, 0)
    some = score(["", "the dog bit the man"], ["a b c", "the dog bit the man"], DEFAULT)
    assert 0 < some.bleu4 < 100


def test_perfect_is_100() -> None:
    scores = score(["am tag scheint die sonne"], ["am tag scheint die sonne"], get_protocol("phoenix14t"))
    values = (scores.bleu1, scores.bleu4, scores.chrf, scores.rouge_l, scores.rouge_l_mscoco)
    assert values == tuple([pytest.approx(100.0)] * 5)


def test_spellings_of_one_character_are_one_text(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["café au lait froid", "jahody a čerešne, prosím"]
    apart = [unicodedata.normalize("NFD", text) for text in texts]
    assert sacrebleu.corpus_bleu(apart, [texts]).score < 32, "sacreBLEU compares code points"
    for protocol in PROTOCOLS.values():
        same = score(texts, texts, protocol)
        assert score(apart, texts, protocol) == score(texts, [[text] for text in apart], protocol) == same
    assert score(apart, texts, DEFAULT).bleu4 == pytest.approx(100)
    assert sentence_bleu(apart[0], texts[:1], DEFAULT) == pytest.approx(100)
    assert "2 hypotheses and 0 references are not in NFC and are scored as if they were" in caplog.text
    caplog.clear()
    assert score(texts, texts, DEFAULT).bleu4 == pytest.approx(100) and not caplog.text


def test_phoenix_lower_cases_and_says_so() -> None:
    protocol = get_protocol("phoenix14t")
    scores = score(["Am Tag Regen im Süden"], ["am tag regen im süden"], protocol)
    assert scores.bleu4 == pytest.approx(100.0) and scores.rouge_l_mscoco == pytest.approx(100.0)
    assert "case:lc" in scores.signatures["bleu"]


def test_the_dot_convention_raises_bleu() -> None:
    hypotheses, references = ["am tag regen", "im süden sonne"], ["am tag schnee", "im norden sonne"]
    plain, dotted = (score(hypotheses, references, get_protocol(name)) for name in ("phoenix14t", "phoenix14t_dot"))
    assert dotted.bleu4 > plain.bleu4 and dotted.rouge_l_mscoco > plain.rouge_l_mscoco


def test_csl_daily_counts_characters() -> None:
    hypotheses, references = ["你 去哪里？", "我们明天3.5点去"], ["你去 那里?", "我明天3.5点去"]
    scores = score(hypotheses, references, get_protocol("csl_daily"))
    apart = [[" ".join(t.replace(" ", "").replace("？", "?")) for t in side] for side in (hypotheses, references)]
    # the published convention: split characters, then 13a
    assert scores.bleu4 == pytest.approx(sacrebleu.corpus_bleu(apart[0], [apart[1]]).score, abs=1e-9)
    assert "tok:char" in scores.signatures["bleu"]
    assert rouge_l("你去哪里?", ["你去那里?"], 1.0) == pytest.approx(4 / 5)
    names = ("csl_daily", "csl_daily_zh")
    latin = [score(["买iPhone手机吧"], ["买iPad手机吧"], get_protocol(name)).hypothesis_tokens for name in names]
    assert latin == [10, 5]


def test_rouge_l_equals_rouge_score_on_ascii() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rng = random.Random(0)
    words = ["The", "dog", "can't", "run-away", "3.5", "miles,", "a_b", "end."]
    pairs = [(" ".join(rng.choices(words, k=rng.randint(0, 9))), " ".join(rng.choices(words, k=6))) for _ in range(40)]
    for hypothesis, reference in pairs:
        expected = 100 * scorer.score(reference, hypothesis)["rougeL"].fmeasure
        assert score([hypothesis], [reference], DEFAULT).rouge_l == pytest.approx(expected, abs=1e-9)


def test_rouge_l_keeps_letters_outside_ascii() -> None:
    assert score(["große übung"], ["kleine übung"], DEFAULT).rouge_l == pytest.approx(50.0)


def test_mscoco_rouge_by_hand() -> None:
    # LCS "a c" = 2, precision 2/2, recall 2/3
    expected = (1 + 1.44) * 1 * (2 / 3) / (2 / 3 + 1.44 * 1)
    assert rouge_l(["a", "c"], [["a", "b", "c"]], 1.2) == pytest.approx(expected)
    # several references: best precision and best recall, which may come from different ones
    many = rouge_l(["a", "c"], [["a", "b", "c"], ["a"], []], 1.2)
    assert many == pytest.approx(1.0)
    assert score(["a c"], ["a b c"], DEFAULT).rouge_l_mscoco == pytest.approx(100 * expected)


def test_lcs_against_dynamic_programming() -> None:
    def slow(first: list[str], second: list[str]) -> int:
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    rng = random.Random(1)
    for _ in range(200):
        first, second = (rng.choices("abcd", k=rng.randint(0, 80)) for _ in range(2))
        assert lcs_length(first, second) == slow(first, second)


def test_sentence_bleu() -> None:
    assert sentence_bleu("the dog", ["the dog"], DEFAULT) == pytest.approx(100.0)
    assert sentence_bleu("", ["the dog"], DEFAULT) == 0.0
    assert 0 < sentence_bleu("the dog bit", ["the dog ran"], DEFAULT) < 100


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a"], ["a", "b"], "scoring: 1 hypotheses but references for 2 samples\n  fix:"),
        ([], [], "no samples to score\n  fix: check the split"),
        (["a", "b"], ["a", " "], "scoring, sample 1: the reference is empty\n  fix: drop samples without text"),
        (["a"], [[]], "scoring, sample 0: the reference is empty"),
    ],
)
def test_errors(hypotheses: list[str], references: list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        score(hypotheses, references, DEFAULT)
    assert message in str(caught.value)


def test_samples_with_fewer_references_are_not_scored_against_an_empty_one() -> None:
    """A translation of one word is closer in length to an empty text than to its only reference of eight words."""
    pairs = ["regen", "der wind weht schwach"], [["im norden regen und im sueden sonne ."], ["der wind weht", "wind"]]
    scores = score(*pairs, "default")
    assert scores.reference_tokens == 8 + 3 and "nrefs:var" in scores.signatures["bleu"]


@pytest.mark.parametrize("protocol", ["default", "phoenix14t", "csl_daily"])
def test_rouge_of_a_sentence_is_what_the_corpus_figure_is_the_mean_of(protocol: str) -> None:
    pairs = [("morgen regnet es", "morgen regnet es im norden"), ("", "hier"), ("im norden", "im norden")]
    each = [sentence_rouge_l(text, [reference], protocol) for text, reference in pairs]
    whole = score([text for text, _ in pairs], [reference for _, reference in pairs], protocol)
    assert sum(each) / len(each) == pytest.approx(whole.rouge_l)
