"""Where bytes lie: local disks and object stores, ranged reads, the node's cache, memory-mapped files.

May import: errors, atomic.
Others use: ``storage.store`` (a folder anywhere) and ``storage.access`` (ranges of shards).
"""
