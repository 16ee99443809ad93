#!/bin/sh
# A server over the machines of a hostfile (hostfiles/README.md): http://127.0.0.1:8080, or elsewhere by --host and
# --port; for other machines too: --host 0.0.0.0 --api-key-file FILE, a key in each line. Ranks that fail are started
# again. Ctrl-C, or SIGTERM, lets running answers finish; a second one ends all at once.
cd "$(dirname "$0")/.." || exit
exec m3dist serve --hostfile "${HOSTFILE:-hostfiles/one-machine.json}" --model tiny "$@"
