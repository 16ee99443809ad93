#!/bin/sh
# The machines of a hostfile (hostfiles/README.md), started, watched and ended by m3dist over ssh. On every machine the
# same path must lead to the checkpoint; m3dist after the -- is each machine's own. Every line of output has its rank.
# Ends with the status of the rank that failed; --restart 5 before the -- starts again then.
cd "$(dirname "$0")/.." || exit
exec m3dist launch --hostfile "${HOSTFILE:-hostfiles/one-machine.json}" -- m3dist generate --model tiny \
    --temperature 0 --prompt "My cat is called Miro. What is 7 + 5, and what is my cat called?" "$@"
