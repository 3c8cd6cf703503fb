#!/usr/bin/env bash
# Wheels for a bare GPU machine: Python 3.12 on x86-64 Linux with torch, transformers, peft and pyarrow, no network.
#
#   benchmarks/gpu/prepare.sh [FOLDER]      # default benchmarks/gpu/wheels, which git ignores
#
# Says what the folder holds and what to type on that machine. Works with any Python >= 3.11 that has pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-benchmarks/gpu/wheels}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
limit_mib=64 # wheels and working tree together: what a machine without network may be sent in one go

# In the order of their use; PyAV last, being larger than all others together. liger-kernel belongs to no environment
# of ours that lacks a GPU, so its version stands here and not in constraints.txt.
wheels=(
  hjson pydantic pydantic-core annotated-types typing-inspection webdataset braceexpand isal py3langid
  wikitextparser wcwidth nltk defusedxml liger-kernel==0.8.5 av
)
sources=(deepspeed rouge-score) # published as source only; pure Python, but for kernels that DeepSpeed would compile
pip=("$python" -m pip --disable-pip-version-check --quiet)
platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)

rm -rf "$folder"
mkdir -p "$folder"
# No kernel of DeepSpeed's is used with torch's own optimizers.
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-build-isolation -c constraints.txt --wheel-dir "$folder" "${sources[@]}"
for name in "${wheels[@]}"; do
  "${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -c constraints.txt --dest "$folder" "$name"
done

mib() { awk '{ printf "%.1f", $1 / 1048576 }'; }
echo "$folder:"
find "$folder" -name '*.whl' -printf '%s %f\n' | sort -n | awk '{ printf "  %6.2f MiB  %s\n", $1 / 1048576, $2 }'
wheels_mib=$(find "$folder" -name '*.whl' -printf '%s\n' | awk '{ sum += $1 } END { print sum }' | mib)
tree_mib=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s -- 2>/dev/null |
  awk '{ sum += $1 } END { print sum }' | mib)
echo "  wheels $wheels_mib MiB and the tree $tree_mib MiB, of $limit_mib MiB"
if awk "BEGIN { exit !($wheels_mib + $tree_mib > $limit_mib) }"; then
  echo "error: more than $limit_mib MiB; leave out the largest wheel that you can do without" >&2
  exit 1
fi

commit=$(git rev-parse HEAD)$([[ -z $(git status --porcelain) ]] || echo +changes)
cat <<TEXT
On the GPU machine, from the root of the same tree:
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site $folder/*.whl
  PYTHONPATH=/tmp/site python3 benchmarks/gpu/probe.py --commit $commit --out gpu-probe.jsonl
TEXT
