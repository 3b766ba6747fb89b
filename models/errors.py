"""The one exception of this package, for what the caller can put right."""


class ModelError(ValueError):
    """A wrong name, size or weights file; its text is one sentence that says what to do."""
