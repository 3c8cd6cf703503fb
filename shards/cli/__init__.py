"""``slt shards``: one function per verb; the work is done in the rooms below.

May import every room of ``shards``; nothing of ``shards`` imports it.
Others use: ``cli.app.app``, which the front door mounts as ``slt shards``.
"""
