"""The kernel of a chapter in a build: IPython's own, which also notes the files and folders that the chapter reads.

Their names go to the file in $GI_NOTE, one a line. The build compares these files to decide whether a chapter is stale.
"""

import os
import runpy
import sys
from importlib.util import source_from_cache


def note(descriptor: int) -> None:
    """From now on write down what is opened for reading and which folders are listed, each once."""
    seen = set()

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & os.O_ACCMODE != os.O_RDONLY:
                return
        elif event in ("os.listdir", "os.scandir"):
            path = "." if arguments[0] is None else arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor: what it stands for was opened by its name
        path = os.path.abspath(os.fsdecode(path))
        if path.endswith(".pyc"):
            try:
                path = source_from_cache(path)
            except ValueError:
                return
        if path not in seen:
            seen.add(path)
            os.write(descriptor, f"{path}\n".encode("utf-8", "surrogateescape"))

    sys.addaudithook(hook)


if __name__ == "__main__":
    note(os.open(os.environ["GI_NOTE"], os.O_WRONLY | os.O_APPEND))
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]  # as no chapter imports from this folder
    runpy.run_module("ipykernel_launcher", run_name="__main__")
