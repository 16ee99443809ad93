"""The errors a user can meet. Each message names the thing (file, tensor, field, flag, rank) and what to do."""


class M3Error(Exception):
    """Base of every error m3dist raises on purpose; the command line prints its text without a traceback."""


class ConfigError(M3Error):
    """A config.json that is not a MiniMax-M3 this program can run; names the field."""


class CheckpointError(M3Error):
    """A checkpoint that lies, is damaged, or does not match its config; names the file and the tensor."""


class PlanError(M3Error):
    """A cut that cannot be made; names the tensor or the unit, and the world that would work."""


class StoreError(M3Error):
    """What is kept of a checkpoint is damaged, in use, or cannot be written; names the file and the field."""


class CommunicationError(M3Error):
    """A rank was lost, never came, belongs to another job, or computed something else than the others."""
