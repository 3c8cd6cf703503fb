"""Decide which segments and documents of a corpus are left out, and why: rules, duplicates, overlap with test sets.

May import: corpora, format, storage, text.
Others use: ``filter.corpus`` (a corpus behind filters), ``filter.options``, and ``filter.known_texts`` (training asks
it which evaluation sentences a language model has seen).
"""
