"""What made a number: the versions, the commit, the device and its arithmetic."""

import contextlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gi_lib import __version__

PROFILES = {
    "smoke": "tests: embedded data, seconds a case",
    "quick": "a reader's laptop: about a minute a chapter",
    "survey": "the published numbers; the record says what was spent",
}
"""What a run is for. A profile is written down with its case; each study and chapter says what it means there."""


def versions() -> dict[str, str]:
    """Name -> version of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"gi_lib": __version__}  # what pip remembers may be of another copy


def commit() -> str | None:
    """ "g" and the package's short git hash, with a "+" where it has uncommitted changes; None outside git.

    The letter, as `git describe` writes it, keeps readers of tables from taking a hash of digits for a number.
    """
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie below another checkout
        return "g" + _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent  # the book reaches the package through a link
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def choose_device(device: str | None) -> str:
    """`device` if it works here; for None "cuda" where there is a GPU, else "cpu".

    Raises:
        ValueError: the device is unknown, or not there.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {device!r} can't be used ({reason}); try 'cpu', or leave it out") from error
    return device


def check_parameters(profile: object, device: object, data_root: object, seed: object) -> None:
    """Refuse what a chapter's parameters cell can't mean; papermill and readers write there what they like.

    Raises:
        ValueError: one of them is wrong; it says which, and what it may be.
        FileNotFoundError: the data root is no folder.
    """
    if not isinstance(profile, str) or profile not in PROFILES:
        raise ValueError(f"profile is one of {', '.join(map(repr, PROFILES))}, got {profile!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is a whole number >= 0, such as 0, got {seed!r}")
    if device is not None and not isinstance(device, str):
        raise ValueError(
            f"device is a text such as 'cpu' or 'cuda', or None for a GPU where there is one, got {device!r}"
        )
    choose_device(device)
    if data_root is None:
        return
    if not isinstance(data_root, str | Path):
        raise ValueError(f"data_root is the path of a folder, or None for the default, got {data_root!r}")
    folder = Path(data_root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_root {str(data_root)!r} means {folder.absolute()}, which is no folder; write its whole path, or None"
        )


def device_name(device: str) -> str:
    """The name of a GPU, or of the processor with the number of threads in use."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind != "cpu":
        return device
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def precision(device: str) -> str:
    """float32, and where a GPU may round its products to TF32 (10 bits of mantissa)."""
    if torch.device(device).type != "cuda":
        return "float32"
    flags = {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
    }
    rounded = [name for name, on in flags.items() if on]
    return f"float32, tf32 in {' and '.join(rounded)}" if rounded else "float32"
