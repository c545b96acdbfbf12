"""What a user did not expect of a checkpoint."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file, tensor or setting."""
