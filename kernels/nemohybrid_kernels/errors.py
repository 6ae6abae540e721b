"""What can go wrong in a call of an operator. This package stands alone, so its errors do too."""


class BackendError(RuntimeError):
    """A backend that does not exist, or that cannot run on this machine; the message says what to do."""


class ShapeError(ValueError):
    """A tensor whose shape does not fit the others of the call."""
