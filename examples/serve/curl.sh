#!/bin/sh
# A clip from a running `nexus-rt serve`, by curl alone.
#
#     sh examples/serve/curl.sh "a red circle moves left on a black background" clip.mp4
#
# OPENAI_BASE_URL and OPENAI_API_KEY say where and who (default: this machine, no key).
set -eu
base=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
ask() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" "$@"; }
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }

id=$(ask "$base/videos" --form-string "prompt=$1" -F seed=7 | field id)
while :; do
    job=$(ask "$base/videos/$id")
    case $(printf %s "$job" | field status) in
    completed) break ;;
    failed) printf '%s\n' "$job" >&2; exit 1 ;;
    esac
    sleep 0.2
done
ask "$base/videos/$id/content" -o "$2"
echo "$2: $id"
