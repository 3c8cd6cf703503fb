"""The written form: WebDataset tars with an index and a manifest beside them; write, open, verify.

May import: media, storage, schema.
Others use: ``format.opening.open_set``-style access through ``format.index.ShardSet``, ``format.writer``, ``format.verify``.
"""
