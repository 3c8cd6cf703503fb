"""From a plan to batches: read the bytes of samples, decode or pack them, in worker processes, and resume exactly.

May import: order, format, media, storage. Torch is imported by ``load.loader`` alone.
Others use: ``load.loader`` (training and evaluation loaders) and ``load.reader.Reader`` (one sample by its number).
"""
