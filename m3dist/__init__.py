"""MiniMax-M3 split over several machines with MLX."""

__version__ = "0.1.0"
