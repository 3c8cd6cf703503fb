"""``python -m pipeline`` is `slt`."""

from pipeline.start import main

main()
