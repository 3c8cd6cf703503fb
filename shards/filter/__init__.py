"""Decide which segments and documents of a corpus are left out, and say why: rules, duplicates, overlap with test sets.

May import: corpora, format, storage, text.
Others use: ``filter.corpus`` (a corpus behind filters), ``filter.options``, ``filter.known_texts`` (training asks it
which evaluation sentences a language model has seen).
"""
