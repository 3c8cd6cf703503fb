"""From a plan to batches: read the bytes of samples, decode or pack them in worker processes, and resume exactly.

May import: order, format, media, storage. Only ``load.loader`` imports torch.
Others use: ``load.loader`` (loaders of training and evaluation) and ``load.reader`` (one sample by its number).
"""
