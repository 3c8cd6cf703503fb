"""The command line of a launch, written again: for a batch script or a container that runs it somewhere else."""

from __future__ import annotations

import dataclasses

from launch.run_options import RunOptions

_SPELLED = {"sets": "--set"}


def arguments_of(options: RunOptions, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The options of `slt launch run` that differ from their defaults, without those named in ``leave_out``."""
    arguments: list[str] = []
    for field in dataclasses.fields(RunOptions):
        value = getattr(options, field.name)
        if field.name in ("recipe", *leave_out) or value == field.default:
            continue
        name = _SPELLED.get(field.name) or f"--{field.name.replace('_', '-')}"
        if value is True:
            arguments.append(name)
        else:
            for item in value if isinstance(value, list) else [value]:
                arguments += [name, str(item)]
    return arguments


__all__ = ["arguments_of"]
