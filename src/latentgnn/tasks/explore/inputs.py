"""Which inputs the page offers where none is named."""

from collections.abc import Iterator
from contextlib import contextmanager

from latentgnn.errors import UserError

MOST_INPUTS = 200
"""Of a validation set that the page offers."""


@contextmanager
def noting_no_set(kind: str) -> Iterator[None]:
    """A validation set that is not there, as that of a model from elsewhere, is no fault: a file can be dropped.

    Args:
        kind: of the inputs.
    """
    try:
        yield
    except UserError as error:
        print(f"note: no validation set ({error}); name {kind}s after the run, or drop them on the page")
