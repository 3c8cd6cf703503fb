"""What text corpora share: every document once per template and pass, with annotated or pseudo glosses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.corpora.rows import read_lines
from shards.errors import DataError, OptionError
from shards.schema import Segment, text_hash
from shards.text import check_template, pseudo_gloss, render_pair, repeat_words, stable_seed

GLOSS_TEMPLATES = '["{text}", "signs: {gloss} sentence: {text}"]'


@dataclass(kw_only=True)
class TextBase:
    """Options of every text corpus. Subclasses call :meth:`prepare` and yield :meth:`rendered` documents."""

    templates: list[str] = field(default_factory=lambda: ["{text}"])
    function_words: list[str] = field(default_factory=list)
    """Words left out of pseudo glosses, or one file with a word per line."""
    repeat_max: int = 1
    """Repeat each word of ``{gloss}`` 1..repeat_max times: one sign covers several visual word tokens."""
    lowercase_gloss: bool = False
    """Write glosses in lower case, so that they share tokens with the words of the sentences."""
    passes: int = 1
    """Variants per document for templates with repeated words."""
    seed: int = 0
    language: str = ""
    corpus: str = "text"
    """Name of the corpus in index and metrics (perplexity is reported per corpus)."""
    settings: dict[str, object] = field(init=False, default_factory=dict)

    def prepare(self, annotated: bool) -> None:
        """Check the options; ``annotated``: documents come with glosses. Raises DataError naming the wrong one."""
        self.name = self.corpus
        where = f"corpus {self.corpus}"
        for template in self.templates:
            check_template(template)
        if not self.templates or min(self.repeat_max, self.passes) < 1:
            raise OptionError("templates, repeat_max and passes must be >= 1", where=where, fix="correct the option")
        if len(self.function_words) == 1 and Path(self.function_words[0]).is_file():
            self.function_words = [line.strip() for _, line in read_lines(Path(self.function_words[0])) if line.strip()]
        self._dropped = frozenset(word.casefold() for word in self.function_words)
        if any("{gloss" in template for template in self.templates) and not (annotated or self._dropped):
            raise OptionError(
                "a template uses {gloss}, but there is neither a gloss field nor function_words",
                where=where,
                fix="add --gloss FIELD, or --function-words FILE for pseudo glosses",
            )
        if (annotated or self._dropped) and not any("{gloss" in template for template in self.templates):
            raise OptionError(
                f"there are glosses, but no template uses them: {self.templates}",
                where=where,
                fix=f"add --templates '{GLOSS_TEMPLATES}', or leave the glosses out",
            )
        names = ("templates", "repeat_max", "lowercase_gloss", "passes", "seed")
        self.settings = {name: getattr(self, name) for name in names}
        self.settings["gloss"] = "annotated" if annotated else "pseudo" if self._dropped else "none"

    def rendered(self, document: str, split: str, text: object, gloss: object, origin: str) -> Iterator[Segment]:
        """One text-only segment per template and pass.

        Args:
            document: unique within the corpus.
            split: of every segment.
            text: the document; None counts as empty.
            gloss: annotated signs, as text or list; None without annotations.
            origin: file and line.
        """
        text = _one_text(text, origin).strip()
        if gloss is None and self._dropped:
            gloss = pseudo_gloss(text, self._dropped, origin)
        words = gloss if isinstance(gloss, list) else _one_text(gloss, origin).split()
        joined = " ".join(map(str, words))
        joined = joined.lower() if self.lowercase_gloss else joined
        for number, template in enumerate(self.templates):
            varied = self.repeat_max > 1 and "{gloss" in template
            for variant in range(self.passes if varied else 1):
                yield Segment(
                    corpus=self.corpus,
                    id=f"{document}#{number}.{variant}",
                    split=split,
                    text=self._fill(template, text, joined, (number, variant)),
                    language=self.language,
                    gloss=joined if "{gloss" in template else "",
                    origin=origin,
                )

    def _fill(self, template: str, text: str, gloss: str, variant: tuple[int, int]) -> str:
        """The document; empty, hence a counted skip, if a field of the template is empty."""
        fields = {"text": text, "gloss": gloss}
        if any(not value for name, value in fields.items() if "{" + name in template):
            return ""
        if self.repeat_max > 1:
            seed = stable_seed(self.seed, text_hash(text), *variant)
            fields["gloss"] = repeat_words(gloss, seed, self.repeat_max)
        return render_pair(template, fields)


def _one_text(value: object, origin: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise DataError(
            f"a document is a {type(value).__name__}, not text", where=origin, fix="name the field inside it: a.b"
        )
    return str(value)
