#!/bin/sh
# The machines of a hostfile (hostfiles/README.md), started by mlx.launch over ssh. On every machine the same path must
# lead to the checkpoint, and PYTHON to an interpreter that has m3dist.
# mlx.launch exits with 0 whatever happens: read what the ranks print.
cd "$(dirname "$0")/.." || exit
exec mlx.launch --hostfile "${HOSTFILE:-hostfiles/one-machine.json}" -- "${PYTHON:-python3}" -m m3dist generate \
    --model tiny --temperature 0 --prompt "My cat is called Miro. What is 7 + 5, and what is my cat called?" "$@"
