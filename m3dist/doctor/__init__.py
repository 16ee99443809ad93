"""Asking hosts what they are, saying what is wrong with them, and writing hostfiles from it. No MLX."""
