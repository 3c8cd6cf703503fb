"""Where bytes lie: local disks and object stores, ranged reads, the node's cache, memory-mapped files.

May import: errors.
Others use: ``storage.store`` (a folder anywhere), ``storage.files`` (small files, whole or absent) and
``storage.access`` (ranges of shards).
"""
