"""What talks to clients: HTTP, the APIs of OpenAI and Anthropic, text and tokens. A process of its own, without MLX."""
