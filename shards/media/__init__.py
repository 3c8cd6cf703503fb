"""Videos and folders of images: probe, decode, transcode to the stored form, crop, scale, colours.

May import: schema and errors. One thread per call, so that bytes do not depend on the machine.
Others use: ``media.video`` (probe, decode, transcode) and ``media.source`` (damage and its explanations).
"""
