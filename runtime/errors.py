"""Every error that LeanVLM raises on purpose: one line that says what was wrong and what would be right."""

from typing import ClassVar


class LeanVLMError(Exception):
    """The base of every error below; its message is one line meant for the user.

    Attributes:
        exit_status: What the command line exits with when the error reaches it.
    """

    exit_status: ClassVar[int] = 2


class LeanVLMWarning(UserWarning):
    """Something that works, but not as well as the user may expect; its message is one line."""


class InputError(LeanVLMError):
    """An option, an image or a prompt is wrong."""


class ContextOverflowError(InputError):
    """The prompt and the answer asked for do not fit into the model's context."""


class BundleError(LeanVLMError):
    """A bundle cannot be used."""


class ManifestError(BundleError):
    """A bundle's `leanvlm.json` is missing, unreadable or of another schema."""


class GraphError(BundleError):
    """A graph file's inputs or outputs differ from what the manifest declares."""


class SessionClosedError(LeanVLMError):
    """A session was used after it had been closed."""


class CheckpointError(LeanVLMError):
    """A checkpoint cannot be found, read or loaded completely."""


class UnsupportedModelError(LeanVLMError):
    """A checkpoint is of a kind, or has a part, that LeanVLM does not handle."""


class UnsupportedPrunerError(LeanVLMError):
    """A pruner is unknown, or cannot be used with this model or target."""


class MissingExtraError(LeanVLMError):
    """An optional dependency is not installed."""


class BackendError(LeanVLMError):
    """The engine that runs the graphs failed, or returned values that cannot be used."""


class VerificationError(LeanVLMError):
    """An exported graph does not reproduce the model that it was made from."""


class QueueFullError(LeanVLMError):
    """As many requests wait at a server as may."""


class ShuttingDownError(LeanVLMError):
    """A server takes no more requests."""


class TimeLimitError(LeanVLMError):
    """A request took longer than a server allows."""
