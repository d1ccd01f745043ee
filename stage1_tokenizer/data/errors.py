"""The errors of this room."""


class DataError(ValueError):
    """Data that cannot be used; one line that names the field, the file or the index."""


class BadFileError(DataError):
    """An image file that cannot be decoded. ``replaceable``: a run that meets it goes on with another file in its place: it is none of
    those whose content the run knows its data by."""

    def __init__(self, message: str, replaceable: bool) -> None:
        super().__init__(message)
        self.replaceable = replaceable
