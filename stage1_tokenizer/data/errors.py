"""The error of this room."""


class DataError(ValueError):
    """Data that cannot be used; one line that names the field, the file or the index."""
