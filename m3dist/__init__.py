"""MiniMax-M3 split over several machines with MLX."""

import os

__version__ = "0.1.0"

# Before anything imports numpy. The idle threads of its BLAS spin: two ranks on two cores took four times as long with
# two threads each as with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
