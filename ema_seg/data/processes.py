"""Start method of worker processes."""

import multiprocessing

__all__ = ["start_method"]


def start_method() -> str | None:
    """Return the platform's default start method if a launcher has set a custom one; None to keep the current one.

    In joblib's processes the current one is loky's, which starts only joblib's own processes.
    """
    current = multiprocessing.get_start_method(allow_none=True)
    own = multiprocessing.get_all_start_methods()
    return None if current is None or current in own else own[0]
