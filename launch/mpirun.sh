#!/bin/sh
# Open MPI. Several machines: --hostfile hostfiles/two-macs-mpi.txt instead of -n 2. Unbound, because a rank computes
# and communicates in two threads.
cd "$(dirname "$0")/.." || exit
exec mpirun -n 2 --bind-to none "${PYTHON:-python3}" -m m3dist generate --model tiny \
    --temperature 0 --prompt "My cat is called Miro. What is 7 + 5, and what is my cat called?" "$@"
