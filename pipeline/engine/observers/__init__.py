"""What happens beside the steps of a run: one file per observer, listed in `registry.OBSERVERS`."""
