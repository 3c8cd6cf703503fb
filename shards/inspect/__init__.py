"""Look at finished sets: lint, statistics, plots, and a preview page in the browser.

May import: build, filter, order, format, media, storage, text.
Others use: the verbs ``lint``, ``stats`` and ``preview`` of ``slt shards``.
"""
