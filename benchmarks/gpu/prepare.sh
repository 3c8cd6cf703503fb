#!/usr/bin/env bash
# Wheels for a bare GPU machine: Python 3.12 on x86-64 Linux with torch, transformers, peft and pyarrow, no network.
#
#   benchmarks/gpu/prepare.sh [--fa4] [FOLDER]      # default benchmarks/gpu/wheels, which git ignores
#
# --fa4: flash-attn 4 and its compiler instead, which leave room for nothing but the attention sections.
# Says what the folder holds and what to type on that machine. Works with any Python >= 3.11 that has pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fa4=
if [[ ${1:-} == --fa4 ]]; then
  fa4=yes
  shift
fi
folder=${1:-benchmarks/gpu/wheels}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
limit_mib=64 # wheels and working tree together: what a machine without network may be sent in one go

# In the order of their use; PyAV last, being larger than all others together. What belongs to no environment of ours
# that lacks a GPU has its version here and not in constraints.txt.
needed=(pydantic pydantic-core annotated-types typing-inspection)
wheels=(
  "${needed[@]}" hjson accelerate webdataset braceexpand isal py3langid wikitextparser wcwidth nltk defusedxml
  liger-kernel==0.8.5 pytest pluggy iniconfig pygments hypothesis sortedcontainers av
)
sources=(deepspeed rouge-score) # published as source only; pure Python, but for kernels that DeepSpeed would compile
if [[ $fa4 ]]; then
  wheels=(
    "${needed[@]}" flash-attn-4==4.0.0b36 quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1
    nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1
    apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
  )
  sources=()
fi
pip=("$python" -m pip --disable-pip-version-check --quiet)
platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
for_target=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}")

rm -rf "$folder"
mkdir -p "$folder"
if ((${#sources[@]})); then
  # No kernel of DeepSpeed's is used with torch's own optimizers.
  DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-build-isolation -c constraints.txt --wheel-dir "$folder" "${sources[@]}"
fi
for name in "${wheels[@]}"; do
  "${pip[@]}" download "${for_target[@]}" -c constraints.txt --dest "$folder" "$name"
done

install="python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site $folder/*.whl"
sections=
if [[ $fa4 ]]; then
  # The wheels are larger than the limit, what they unpack to is not once xz has packed it.
  site=$(mktemp -d)
  "${pip[@]}" install --no-index --no-compile --target "$site" "${for_target[@]}" "$folder"/*.whl
  rm "$folder"/*.whl
  tar -C "$site" --exclude=stubs --exclude='*.a' -cf - . |
    xz --x86 --lzma2=preset=9,dict=256MiB -T1 >"$folder/site.tar.xz" # takes minutes
  rm -r "$site"
  install="mkdir -p /tmp/site && tar -C /tmp/site -xJf $folder/site.tar.xz"
  sections=" --only environment,attention,attention_speed"
fi

mib() { awk '{ printf "%.1f", $1 / 1048576 }'; }
echo "$folder:"
find "$folder" -type f -printf '%s %f\n' | sort -n | awk '{ printf "  %6.2f MiB  %s\n", $1 / 1048576, $2 }'
wheels_mib=$(find "$folder" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum }' | mib)
tree_mib=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s -- 2>/dev/null |
  awk '{ sum += $1 } END { print sum }' | mib)
echo "  together $wheels_mib MiB and the tree $tree_mib MiB, of $limit_mib MiB"
if awk "BEGIN { exit !($wheels_mib + $tree_mib > $limit_mib) }"; then
  echo "error: more than $limit_mib MiB; leave out the largest wheel that you can do without" >&2
  exit 1
fi

commit=$(git rev-parse HEAD)$([[ -z $(git status --porcelain) ]] || echo +changes)
cat <<TEXT
On the GPU machine, from the root of the same tree:
  $install
  PYTHONPATH=/tmp/site python3 benchmarks/gpu/run_all.py --commit $commit --out gpu.jsonl$sections
TEXT
[[ $fa4 ]] || echo "  PYTHONPATH=/tmp/site python3 -m pytest -m gpu tests/gpu"
