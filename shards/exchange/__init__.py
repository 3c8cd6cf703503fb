"""Shard sets from and to elsewhere: adopt foreign tars, convert LMDB and MDS, take a head or split of a set.

May import: build, corpora, format, media, storage, text.
Others use: the verbs of ``slt shards`` (``index``, ``convert``, ``head``, ``split``).
"""
