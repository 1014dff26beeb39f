"""Errors that this package raises on purpose, so that callers can distinguish a user error from a bug.

    MimoError
    ├── ConfigError           (ValueError)          an argument or option that cannot run, or two that do not fit
    │   └── LayoutError                             a layout or batch size that cannot run
    ├── DataError             (ValueError)          a sample, dataset or DataLoader that cannot be used
    ├── CheckpointError       (ValueError)          a checkpoint that cannot be read, or does not fit the run
    ├── CheckpointWriteError  (OSError)             a checkpoint could not be written
    ├── ReplicaError          (ValueError)          ranks that must hold the same weights do not
    └── NonFiniteError        (FloatingPointError)  a loss or gradient is infinite or NaN

Each also derives from the built-in exception in brackets, so code that does not know this package can catch it. The
command line prints a MimoError as one line. Other exceptions keep their traceback.
"""

from __future__ import annotations


class MimoError(Exception):
    """Base class of errors whose message is written for the user."""


class ConfigError(MimoError, ValueError):
    """An argument or option that cannot run, or two that do not fit together. The message says what to change."""


class LayoutError(ConfigError):
    """A layout or a batch size that cannot run. The message says which number to change."""


class DataError(MimoError, ValueError):
    """A sample, dataset or DataLoader that cannot be used. The message names the sample and the key."""


class CheckpointError(MimoError, ValueError):
    """A checkpoint that cannot be read, or does not fit the run."""


class CheckpointWriteError(MimoError, OSError):
    """A checkpoint could not be written. An existing checkpoint at the same path is unchanged."""


class ReplicaError(MimoError, ValueError):
    """Ranks that must hold the same weights do not. The message names the parameter and the ranks."""


class NonFiniteError(MimoError, FloatingPointError):
    """A loss or gradient was infinite or NaN, and ``Checks(on_nonfinite="raise")`` was set."""
