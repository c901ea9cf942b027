"""What errors of others say, in short.

This is a file of its own since loading and the checks both need it, and neither is about errors.
"""


def first_sentence(error: Exception) -> str:
    """The message up to its first full stop, on one line and without the stop; the error's kind where it is empty."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
