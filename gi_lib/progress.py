"""Progress bars: in a terminal and in a notebook, and nowhere else. TQDM_DISABLE=1 turns them off."""

import os
import sys
from typing import Any


def bar(iterable: Any = None, **settings: Any) -> Any:
    """A tqdm bar, as the place where it runs shows one."""
    from tqdm.auto import tqdm

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    seen = hasattr(shell, "kernel") or (sys.stderr is not None and sys.stderr.isatty())
    wanted = os.environ.get("TQDM_DISABLE", "0") in ("", "0")
    return tqdm(iterable, disable=not (seen and wanted), **settings)
