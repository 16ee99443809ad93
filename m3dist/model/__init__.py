"""MiniMax-M3's text model on MLX: `Model`, and `ModelArgs`, its configuration (`ModelArgs.from_dict(config)`)."""

from m3dist.config import ModelConfig as ModelArgs
from m3dist.model.text import Model

__all__ = ["Model", "ModelArgs"]
