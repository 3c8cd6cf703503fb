"""Experiments: a matrix of settings and seeds -> runs through the launcher -> one table.

`matrix` reads and checks the file, `steps` says what has to be run, `run` runs what is missing, `table` compares the
arms. Others use the command (`cli`).
"""
