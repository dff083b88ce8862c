#!/bin/sh
# A clip from a running `nexus-rt serve`, by curl alone.
#
#     sh examples/serve/curl.sh "a red circle moves left on a black background" clip.mp4
#
# OPENAI_BASE_URL and OPENAI_API_KEY say where and who (default: this machine, no key).
set -eu
base=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
ask() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" "$@"; }
field() { printf %s "$2" | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
fail() { printf '%s\n' "$1" >&2; exit 1; }

job=$(ask "$base/videos" --form-string "prompt=$1" -F seed=7) || fail "$job"
id=$(field id "$job")
until [ "$(field status "$job")" = completed ]; do
    [ "$(field status "$job")" != failed ] || fail "$job"
    sleep 0.2
    job=$(ask "$base/videos/$id") || fail "$job"
done
ask "$base/videos/$id/content" -o "$2"
echo "$2: $id"
