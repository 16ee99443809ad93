"""Getting the processes running and keeping them honest. Never imports MLX."""
