"""Where the metrics of a run go: each sink one file, all of them in `registry.SINKS`."""
