"""Where the metrics of a run go: one file per sink, listed in `registry.SINKS`."""
