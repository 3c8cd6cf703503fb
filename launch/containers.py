"""Files that build a container with this project: a Dockerfile and an Apptainer definition, from the same parts.

The image holds code and the pinned packages: no data, no model, no secret. torch from the package index is the build
for CUDA and brings its libraries; DeepSpeed's compiled operators need a base image with CUDA's compiler.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from pipeline.config.load import PROJECT_ROOT
from pipeline.errors import RecipeError

HOME = "/opt/llava-slt"
PARTS = (
    "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "shards", "pipeline", "launch", "ds_configs",
)  # fmt: skip
"""What the image needs of the project; nothing else is copied into it."""
_SYSTEM = "apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*"


def dockerfile(base_image: str, command: Sequence[str]) -> str:
    """A Dockerfile whose container runs the command as a user without rights.

    Raises:
        RecipeError: the base image's name cannot be one, or this project's pins are not there.
    """
    folders = "\n".join(f"COPY {part} {HOME}/{part}" for part in PARTS)
    return f"""# Written by `slt launch manifest --kind docker`. In the project's folder, as `Dockerfile`:
#   docker build --tag llava-slt .
#   docker run --gpus all --shm-size 16g --volume DATA:/work llava-slt    # DATA: a folder that user 1000 may write
FROM {_checked(base_image)}
RUN {_SYSTEM}
{folders}
RUN {_install()}
RUN useradd --create-home --uid 1000 slt
USER 1000
ENV PYTHONUNBUFFERED=1
# Recipes name files relative to this folder; mount data and runs here.
WORKDIR /work
# Signals reach the launch, which saves; give it time: docker stop --time 330
ENTRYPOINT {json.dumps(list(command[:1]))}
CMD {json.dumps(list(command[1:]))}
"""


def apptainer_definition(base_image: str, command: Sequence[str]) -> str:
    """An Apptainer definition file whose container runs the command, or ``slt`` with the arguments it is given.

    Raises:
        RecipeError: the base image's name cannot be one, or this project's pins are not there.
    """
    folders = "\n".join(f"    {part} {HOME}/{part}" for part in PARTS)
    return f"""# Written by `slt launch manifest --kind apptainer`. In the project's folder, as `slt.def`:
#   apptainer build slt.sif slt.def
#   apptainer run --nv slt.sif    # as yourself, in the folder you are in
Bootstrap: docker
From: {_checked(base_image)}

%files
{folders}

%post
    {_SYSTEM}
    {_install()}

%environment
    export PYTHONNOUSERSITE=1 PYTHONUNBUFFERED=1

%runscript
    if [ "$#" -gt 0 ]; then exec {command[0]} "$@"; fi
    exec {shlex.join(command)}
"""


def _install() -> str:
    """Packages in the pinned versions; torch by name, as a dependency's range might take another build."""
    pins = PROJECT_ROOT / "constraints.txt"
    found = re.search(r"^torch==(\S+)$", pins.read_text(encoding="utf-8") if pins.is_file() else "", flags=re.MULTILINE)
    if found is None:
        raise RecipeError(f"{pins} pins no torch; write container files in a checkout of the project")
    pip = "pip install --no-cache-dir --constraint constraints.txt"
    return f"cd {HOME} && {pip} torch=={found[1]} --editable '.[gpu,s3]'"


def _checked(image: str) -> str:
    if not re.fullmatch(r"[a-z0-9][\w./:@-]*", image):
        raise RecipeError(f"--base-image {image!r} is not the name of an image, such as python:3.11-slim")
    return image


__all__ = ["HOME", "PARTS", "apptainer_definition", "dockerfile"]
