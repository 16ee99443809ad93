"""Which MPI library MLX shall load. No MLX."""

import sys
from ctypes.util import find_library


def mpi_library() -> str:
    """What MLX_MPI_LIBNAME shall say: MLX's own default exists only with Open MPI's development files."""
    return find_library("mpi") or ("libmpi.dylib" if sys.platform == "darwin" else "libmpi.so")
