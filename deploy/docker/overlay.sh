#!/bin/sh
# Make TARGET, a virtual environment over the one BASE_PYTHON belongs to: it sees all of it, and what is installed here comes first.
# The base stays as it is. Usage: overlay.sh BASE_PYTHON TARGET PIP_ARGUMENT...
set -eu
base=$1 target=$2
shift 2
"$base" -m venv --without-pip "$target"
site=$("$target/bin/python" -c 'import site; print(site.getsitepackages()[0])')
# addsitedir, not a bare path: the base's own .pth files (editable installs) count too
"$base" -c 'import site; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' >"$site/base.pth"
"$base" -m pip --python "$target/bin/python" install --no-cache-dir --no-deps "$@"
