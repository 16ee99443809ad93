#!/bin/sh
# Several processes on this machine, started by m3dist itself. Flags given to this script come last and win.
cd "$(dirname "$0")/.." || exit
exec m3dist generate --model tiny -n 2 --temperature 0 \
    --prompt "My cat is called Miro. What is 7 + 5, and what is my cat called?" "$@"
