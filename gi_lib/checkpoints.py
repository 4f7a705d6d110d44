"""Tensors that were trained once: found again by name and hash, or by the hash of what makes them.

A checkpoint is a safetensors file `<name>@<hash>.safetensors`; the hash is of its bytes, so that a name with its hash
stands for one set of numbers for ever. `cached` computes what is not there yet, and keeps it under the hash of what
went into it: recipe, data and seed.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "checkpoints"
"""Where the project's own are, in a checkout."""

Tensors = dict[str, Tensor]
_DIGITS = 8


def save(name: str, tensors: Tensors, folder: Path = FOLDER, *, origin: str | None = None) -> str:
    """Keep tensors as a checkpoint; returns its reference, `name@hash`.

    Args:
        name: of what they are.
        tensors: by their own names.
        folder: where it is kept.
        origin: a text that the file holds beside them, such as the hash of the data that they come from.

    Raises:
        ValueError: the name has more than letters, digits, "_" and "-".
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"a checkpoint's name is made of letters, digits, _ and -, got {name!r}")
    kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    content = safetensors.torch.save(kept, None if origin is None else {"origin": origin})
    reference = f"{name}@{_digest(content)}"
    _write(Path(folder) / f"{reference}.safetensors", content)
    return reference


def load(reference: str, folder: Path = FOLDER) -> Tensors:
    """The tensors of `name@hash`.

    Raises:
        ValueError: the reference has another form, or the file's content is not what its hash says.
        FileNotFoundError: there is no such checkpoint.
    """
    name, _, digest = check_reference(reference).partition("@")
    path = Path(folder) / f"{reference}.safetensors"
    if not path.is_file():
        others = ", ".join(sorted(p.stem for p in Path(folder).glob(f"{name}@*.safetensors"))) or "none"
        raise FileNotFoundError(f"there is no checkpoint {path}; of this name there are: {others}")
    content = path.read_bytes()
    if _digest(content) != digest:
        raise ValueError(f"{path} has changed since it was made: its content is @{_digest(content)}; copy it afresh")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); copy it afresh") from error


def origin(reference: str, folder: Path = FOLDER) -> str | None:
    """What `save` was told of where the tensors come from.

    Raises:
        ValueError, FileNotFoundError: as `load`.
    """
    load(reference, folder)
    with safetensors.safe_open(Path(folder) / f"{reference}.safetensors", "pt") as file:
        return (file.metadata() or {}).get("origin")


def check_reference(reference: str) -> str:
    """The reference, if it has the form name@hash; else ValueError."""
    if not isinstance(reference, str) or not re.fullmatch(rf"[\w-]+@[0-9a-f]{{{_DIGITS}}}", reference):
        raise ValueError(f"{reference!r} names no checkpoint; write name@hash, with {_DIGITS} hexadecimal digits")
    return reference


def cached(name: str, parts: tuple[str, ...], make: Callable[[], Tensors], folder: Path) -> tuple[Tensors, str]:
    """What `make` computes from `parts`, made once and then found again.

    Args:
        name: of what is made.
        parts: texts that say all that it depends on: the recipe with its revision, the hash of the data, the seed.
        make: () -> tensors, the same for the same parts.
        folder: where it is kept.

    Returns:
        The tensors, and their reference, `name@hash` of the bytes, to be written into a record.
    """
    recipe = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    reference = made(name, recipe, folder)
    if reference is None:
        reference = save(name, make(), folder)
        point(name, recipe, reference, folder)
    return load(reference, folder), reference


def made(name: str, recipe: str, folder: Path = FOLDER) -> str | None:
    """The reference of what was made by a recipe, named by its hash; None where it is not there, or is damaged."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        reference = _pointer(name, recipe, folder).read_text(encoding="utf-8").strip()
        load(reference, folder)
        return reference
    return None


def point(name: str, recipe: str, reference: str, folder: Path = FOLDER) -> None:
    """Write down that a recipe, named by its hash, has made this; `made` finds it."""
    _write(_pointer(name, recipe, folder), f"{check_reference(reference)}\n".encode())


def _pointer(name: str, recipe: str, folder: Path) -> Path:
    return Path(folder) / f"{name}-{recipe}.made"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    temporary.replace(path)
