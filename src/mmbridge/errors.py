"""Every error that mmbridge raises for bad input.

Each message says what failed, what was given, what is accepted and what to do next, in one sentence or two. The command
line prints the message without a traceback and exits with code 2.
"""


class MMBridgeError(Exception):
    """Base of all errors that are the input's fault, not the library's."""


class ConfigError(MMBridgeError):
    """A recipe, a part's arguments or a name in a registry is wrong."""


class ShapeError(MMBridgeError):
    """Two parts do not fit together, or a tensor has the wrong shape."""


class MediaError(MMBridgeError):
    """A medium can't be read, used or written."""


class MessageError(MMBridgeError):
    """A dialogue does not follow the message schema, or asks for what the bridge lacks."""


class ContextError(MMBridgeError):
    """A prompt is longer than the backbone's context."""


class DataError(MMBridgeError):
    """A data file has a line that can't be used; the message names file and line."""


class CheckpointError(MMBridgeError):
    """Saved weights are missing, altered, incomplete or of the wrong shape."""


class MissingExtraError(MMBridgeError):
    """A feature needs a package that is not installed; the message names the command that installs it."""
