"""What computes requests: which of them in which step (no MLX), and the steps on every rank."""
