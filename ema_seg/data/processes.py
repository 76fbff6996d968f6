"""The start method of worker processes."""

import multiprocessing

__all__ = ["start_method"]


def start_method() -> str | None:
    """Return the platform's own start method where a launcher has set one of its own; None for the one that is set.

    In joblib's processes it is loky's, which starts only processes that joblib itself has made.
    """
    current = multiprocessing.get_start_method(allow_none=True)
    own = multiprocessing.get_all_start_methods()
    return None if current is None or current in own else own[0]
