#!/bin/sh
# Print the named packages of a lock, versions and hashes, for pip's --require-hashes. Usage: locked.sh LOCK NAME...
set -eu
lock=$1
shift
for name in "$@"; do
    awk -v name="$name" '/^[^ #]/ { kept = index($0, name "==") == 1 } kept { print; found = 1 } END { exit !found }' "$lock" || {
        echo "$lock has no $name" >&2
        exit 1
    }
done
