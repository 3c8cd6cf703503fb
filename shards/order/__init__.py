"""The order of training as a pure function of (index, recipe, seed, epoch): mixing, shuffling, packing, grouping.

May import: format, schema. It reads no data and keeps no state: one cursor says where a run is.
Others use: ``order.plan`` and ``order.options`` (what decides the order).
"""
