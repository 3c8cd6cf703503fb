"""Write a corpus into shards: plan which segment goes into which shard, prepare media, write, report.

May import: corpora, filter, load (for feature shards), format, media, storage, text.
Others use: ``build.build`` (the build), ``build.features`` (feature shards), ``build.report`` (counts, missing media).
"""
