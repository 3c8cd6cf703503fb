"""The stored form: WebDataset tars with an index and a manifest beside them; write, open, verify.

May import: media, storage, schema.
Others use: ``format.opening`` (open a set anywhere), ``format.index``, ``format.writer``, ``format.verify``.
"""
