"""Translation scores: sacreBLEU's BLEU and chrF, and both ROUGE-L variants of the sign language literature."""

from __future__ import annotations

import dataclasses
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sacrebleu
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.bleu import BLEUScore

from pipeline.evaluate.protocols import UNICODE_FORM, Protocol, get_protocol
from shards.errors import DataError

logger = logging.getLogger(__name__)

MSCOCO_BETA = 1.2
"""Weight of recall in the ROUGE-L of coco-caption, nlg-eval and neccam/slt."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Corpus scores in percent (0 to 100), with all that is needed to compare them."""

    bleu1: float
    bleu2: float
    bleu3: float
    bleu4: float
    """Cumulative BLEU-n with brevity penalty, not n-gram precisions."""
    chrf: float
    """chrF2 (Popovic 2015)."""
    rouge_l: float
    """Mean sentence F (beta = 1) over lower-cased words without punctuation, as `rouge-score`'s rougeL gives on
    ASCII text (and as it should on others); over characters in character protocols."""
    rouge_l_mscoco: float
    """Mean sentence F with beta = 1.2 over white-space tokens (coco-caption, neccam/slt); characters likewise."""
    brevity_penalty: float
    hypothesis_tokens: int
    reference_tokens: int
    samples: int
    protocol: str
    signatures: dict[str, str] = field(default_factory=dict)
    """sacreBLEU signatures by metric."""

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def score(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]], protocol: Protocol | str) -> Scores:
    """Score a corpus.

    Args:
        hypotheses: one text per sample; may be empty.
        references: per sample one reference or several; samples may differ in how many they have.
        protocol: how texts are prepared and tokenised, or a protocol's name.

    Raises:
        DataError: no samples, lengths that differ, or a sample without a non-empty reference.
        RecipeError: no protocol of that name.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    _warn_of_other_spellings(hypotheses, references)
    prepared = [protocol.prepare(text) for text in hypotheses]
    targets = _prepare_references(hypotheses, references, protocol)
    # sacreBLEU takes one stream per reference position. None marks positions that a sample does not have: an empty text
    # would count as its closest reference, of length 0, and lift the brevity penalty of short translations.
    streams: Any = [
        [refs[place] if place < len(refs) else None for refs in targets] for place in range(max(map(len, targets)))
    ]
    bleu, chrf = _bleu(protocol), CHRF(lowercase=protocol.lowercase)
    result = bleu.corpus_score(prepared, streams)
    chrf_score = chrf.corpus_score(prepared, streams)
    orders = [_bleu_of_order(bleu, result, order) for order in (1, 2, 3)]
    words, pieces = _rouge_tokenizers(protocol)
    return Scores(
        bleu1=orders[0],
        bleu2=orders[1],
        bleu3=orders[2],
        bleu4=result.score,
        chrf=chrf_score.score,
        rouge_l=_mean_rouge(prepared, targets, words, 1.0),
        rouge_l_mscoco=_mean_rouge(prepared, targets, pieces, MSCOCO_BETA),
        brevity_penalty=result.bp,
        hypothesis_tokens=result.sys_len,
        reference_tokens=result.ref_len,
        samples=len(prepared),
        protocol=protocol.name,
        signatures={"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
    )


def sentence_bleu(hypothesis: str, references: Sequence[str], protocol: Protocol | str) -> float:
    """BLEU-4 of one sentence with effective order (to sort examples; the corpus score is not its mean)."""
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    metric = _bleu(protocol, effective_order=True)
    return metric.sentence_score(protocol.prepare(hypothesis), [protocol.prepare(text) for text in references]).score


def sentence_rouge_l(hypothesis: str, references: Sequence[str], protocol: Protocol | str) -> float:
    """ROUGE-L of one sentence in percent, as `Scores.rouge_l` is the mean of."""
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    words, _ = _rouge_tokenizers(protocol)
    return _mean_rouge([protocol.prepare(hypothesis)], [[protocol.prepare(text) for text in references]], words, 1.0)


def versions() -> dict[str, str]:
    """Versions of the packages that compute the scores."""
    return {"sacrebleu": sacrebleu.__version__}


def _warn_of_other_spellings(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> None:
    """Warn if texts are scored in another spelling of their characters, which sacreBLEU alone would not do."""
    targets = [text for entry in references for text in ([entry] if isinstance(entry, str) else entry)]
    counts = [
        sum(not unicodedata.is_normalized(UNICODE_FORM, text) for text in texts) for texts in (hypotheses, targets)
    ]
    if any(counts):
        logger.warning(
            "%d hypotheses and %d references are not in %s and are scored as if they were; sacreBLEU on the texts as"
            " they are gives another figure",
            *counts,
            UNICODE_FORM,
        )


def _prepare_references(
    hypotheses: Sequence[str], references: Sequence[str | Sequence[str]], protocol: Protocol
) -> list[list[str]]:
    if len(hypotheses) != len(references):
        raise DataError(
            f"{len(hypotheses)} hypotheses but references for {len(references)} samples",
            where="scoring",
            fix="pass exactly one entry of references per hypothesis, in the same order",
        )
    if not hypotheses:
        raise DataError("no samples to score", where="scoring", fix="check the split and corpus filters")
    targets: list[list[str]] = []
    for place, entry in enumerate(references):
        texts = [entry] if isinstance(entry, str) else list(entry)
        kept = [protocol.prepare(text) for text in texts if text.strip()]
        if not kept:
            raise DataError(
                "the reference is empty",
                where=f"scoring, sample {place}",
                fix="drop samples without text when the shards are built",
            )
        targets.append(kept)
    return targets


def sentence_metric(protocol: Protocol) -> BLEU:
    """sacreBLEU's metric of single sentences of a protocol, for texts that were prepared by it."""
    return _bleu(protocol, effective_order=True)


def _bleu(protocol: Protocol, effective_order: bool = False) -> BLEU:
    # `force` only silences a warning about tokenised input, which PHOENIX's " ." convention triggers.
    return BLEU(lowercase=protocol.lowercase, tokenize=protocol.tokenize, effective_order=effective_order, force=True)


def _bleu_of_order(metric: BLEU, result: BLEUScore, order: int) -> float:
    """Cumulative BLEU of a lower order from the counts of BLEU-4."""
    return BLEU.compute_bleu(
        correct=list(result.counts[:order]),
        total=list(result.totals[:order]),
        sys_len=result.sys_len,
        ref_len=result.ref_len,
        smooth_method=metric.smooth_method,
        smooth_value=metric.smooth_value,
        max_ngram_order=order,
    ).score


# --- ROUGE-L ----------------------------------------------------------------------------------------------------

Tokenizer = Callable[[str], list[str]]


def _rouge_tokenizers(protocol: Protocol) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers of the beta = 1 and of the mscoco variant."""
    if protocol.unit == "character":
        return _characters, _characters
    return _words, (lambda text: text.lower().split()) if protocol.lowercase else str.split


def _words(text: str) -> list[str]:
    # rouge-score's own tokenizer drops every letter outside a-z, which breaks up German or Slovak words.
    return re.findall(r"[^\W_]+", text.lower())


def _characters(text: str) -> list[str]:
    return list("".join(text.split()))


def _mean_rouge(hypotheses: list[str], targets: list[list[str]], tokenizer: Tokenizer, beta: float) -> float:
    values = [
        rouge_l(tokenizer(hypothesis), [tokenizer(text) for text in texts], beta)
        for hypothesis, texts in zip(hypotheses, targets, strict=True)
    ]
    return 100.0 * sum(values) / len(values)


def rouge_l(hypothesis: Sequence[str], references: Sequence[Sequence[str]], beta: float) -> float:
    """Longest-common-subsequence F measure (Lin 2004) of one sentence, 0 to 1.

    With several references, precision and recall are each the best over the references (coco-caption).
    """
    common = [lcs_length(hypothesis, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(hypothesis)
    recall = max(count / len(reference) for count, reference in zip(common, references, strict=True) if count)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel: one big-integer addition per token of ``second``.

    Algorithm of Hyyro (2004), "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()
