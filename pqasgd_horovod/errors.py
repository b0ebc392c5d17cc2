"""Every exception the package raises on purpose, under one root."""


class PqasgdError(Exception):
    """Root of all errors of this package."""


class ArgumentError(PqasgdError, ValueError):
    """An argument has a value that is not allowed; raised before anything is sent."""


class WireFormatError(PqasgdError, ValueError):
    """Received bytes are not a payload of this codec: truncated, corrupted, or from another version."""


class MismatchError(PqasgdError, RuntimeError):
    """The ranks disagree about the configuration; raised on every rank with the same text."""


class DesynchronizedError(MismatchError):
    """A message belongs to another round, step or bucket than the one expected: the ranks are out of step."""


class NonFiniteError(PqasgdError, ArithmeticError):
    """NaN, Inf or a value beyond the codec's range was about to be sent; raised on every rank."""


class NativeLibraryError(PqasgdError, ImportError):
    """The native core is missing or was built for another version."""


class CollectiveTimeoutError(PqasgdError, TimeoutError):
    """A collective did not complete in time: some rank did not take part in it."""


class DeviceError(PqasgdError, RuntimeError):
    """A GPU cannot do what is asked of it: no kernels for it, no memory left, or tensors on several devices."""
