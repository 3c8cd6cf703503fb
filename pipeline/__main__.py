"""``python -m pipeline`` is `slt`."""

from pipeline.cli import main

main()
