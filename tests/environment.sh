#!/bin/sh
# Make an environment: environment.sh PYTHON FOLDER ARGUMENTS-OF-PIP-INSTALL. With uv it takes some seconds. Without
# uv, or where uv does not reach what pip reaches (pip has settings of its own), pip takes about a minute.
set -eu
python=$1 folder=$2
shift 2
if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
    echo "Installing into $folder with uv."
    "$python" -m venv --clear --without-pip "$folder"
    uv pip install --quiet --python "$folder/bin/python" "$@" && exit
fi
echo "Installing into $folder with pip, which takes about a minute."
"$python" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
