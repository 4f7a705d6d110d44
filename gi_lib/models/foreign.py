"""Models by another's name: torchvision:NAME, timm:NAME, package.module:factory."""

import importlib
import re
from typing import Any

import torch
from torch import nn

from gi_lib.models.networks import Shape
from gi_lib.types import nearest

Built = tuple[nn.Module, object, object]
"""A module, and the mean and std that it expects of [0, 1] images."""


def check_name(name: str) -> None:
    """ValueError unless the name has one of the forms."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w./-]*", name):
        raise ValueError(
            f"{name!r} names no model; write torchvision:NAME, timm:NAME, or package.module:factory, a function of"
            " (num_classes, image_shape) that returns a module"
        )


def build(name: str, num_classes: int, image_shape: Shape, seed: int) -> Built:
    """The untrained module, drawn from `seed`; the global generator is left as it was.

    Raises:
        ValueError: the library or the name is not there, or the model can't be built for these images.
    """
    where, _, what = name.partition(":")
    make = {"torchvision": _torchvision, "timm": _timm}.get(where)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if make is not None:
            return make(what, num_classes, image_shape)
        return _factory(where, what, num_classes, image_shape), 0.0, 1.0


def _torchvision(name: str, num_classes: int, image_shape: Shape) -> Built:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(nearest(name, known, "classifier of torchvision"))
    if image_shape[0] != 3:
        raise ValueError(
            f"torchvision:{name} takes 3 channels, the images have {image_shape[0]}; choose a colour dataset"
        )
    try:
        net = models.get_model(name, weights=None, num_classes=num_classes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"torchvision:{name} can't be built for {num_classes} classes: {error}") from error
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    return net, list(transforms.mean), list(transforms.std)


def _timm(name: str, num_classes: int, image_shape: Shape) -> Built:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm:{name} needs the package timm (pip install timm)") from error
    if not timm.is_model(name):
        raise ValueError(nearest(name, timm.list_models(), "model of timm"))
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": image_shape[0]}
    try:  # transformers and mixers are built for one size
        net = timm.create_model(name, pretrained=False, img_size=image_shape[1:], **settings)
    except TypeError:
        try:
            net = timm.create_model(name, pretrained=False, **settings)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"timm:{name} can't be built for images {list(image_shape)}: {error}") from error
    normalisation = timm.get_pretrained_cfg(name, allow_unregistered=False)
    mean, std = (getattr(normalisation, kind, None) or (default,) for kind, default in (("mean", 0.0), ("std", 1.0)))
    channels = image_shape[0]
    if len(mean) not in (1, channels):  # grey images take the mean over the colours
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return net, list(mean), list(std)


def _factory(module: str, name: str, num_classes: int, image_shape: Shape) -> nn.Module:
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"there is no {name} in a module {module} ({error}); write package.module:factory, and start where Python"
            " finds the module"
        ) from error
    except (Exception, SystemExit) as error:  # it is the user's code, whatever it raises
        raise ValueError(
            f"the module {module} can't be imported: {type(error).__name__}: {error}; mend it, and see that"
            f" `python -c 'import {module}'` runs"
        ) from error
    try:
        net = make(num_classes, image_shape)
    except Exception as error:  # it is the user's code, whatever it raises
        raise ValueError(
            f"{module}:{name}({num_classes}, {image_shape}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{module}:{name} returned {type(net).__name__}, not a torch.nn.Module")
    return net
