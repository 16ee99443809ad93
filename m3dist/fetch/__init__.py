"""Getting a checkpoint: each byte from the hub once, turned into what every rank keeps, written into its store."""
