"""The first script on every host: ``python -I arrive.py PARCEL [WORD...]``. It needs only the standard library.

The parcel (`launch/carry.py` packs it) holds a command, its variables and its folder. It is one word without any
character that pdsh or a shell would change, so that every value arrives as it was sent, byte for byte.
"""

from __future__ import annotations

import base64
import json
import os
import sys

EXIT_CLUSTER = 3  # as in pipeline.errors, which this script cannot import yet


def unpack(parcel: str) -> tuple[list[bytes], list[bytes], dict[bytes, bytes], bytes]:
    """The command's parts before and after the WORDs, its variables, and its folder (empty: stay here)."""
    content = json.loads(base64.urlsafe_b64decode(parcel))
    before, after = ([part.encode("latin-1") for part in content[name]] for name in ("before", "after"))
    env = {name.encode("latin-1"): value.encode("latin-1") for name, value in content["env"].items()}
    return before, after, env, content["folder"].encode("latin-1")


def main(arguments: list[str]) -> int:
    """Become the command; returns only when that fails."""
    before, after, env, folder = unpack(arguments[0])
    argv = [*before, *(os.fsencode(word) for word in arguments[1:]), *after]
    try:
        if folder:
            os.chdir(folder)
            env[b"PWD"] = folder  # the login's PWD still names its first folder
        os.execve(argv[0], argv, {**os.environb, **env})
    except OSError as error:
        sys.stderr.write(f"cannot start {os.fsdecode(argv[0])} in {os.fsdecode(folder)}: {error}\n")
    return EXIT_CLUSTER


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

__all__ = ["main", "unpack"]
