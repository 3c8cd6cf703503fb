"""What happens beside the steps of a run: each observer one file, all of them in `registry.OBSERVERS`."""
