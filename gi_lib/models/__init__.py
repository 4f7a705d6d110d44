"""The survey's models, and `wrap` for anybody's own.

Every model takes images in [0, 1] and normalises them in its first layer. `build` returns it in eval mode, where
batch norm uses its running statistics; call `.train()` to attack a client whose batch norm uses the batch's own.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gi_lib.copies import deep_copy
from gi_lib.models import foreign, networks
from gi_lib.models.networks import Shape, Tokens
from gi_lib.types import Classifier, check_shape, nearest


def wrap(module: nn.Module, *, mean: object = 0.0, std: object = 1.0, num_classes: int) -> Classifier:
    """Make any torchvision, timm or own classifier attackable; the module is used as it is, in its own mode.

    Args:
        module: maps normalised images [B, C, H, W] to logits [B, K], or to an object with such `logits`; for two
            classes it may give one logit.
        mean, std: numbers or one for each channel; the normalisation that the module expects of [0, 1] images.
        num_classes: K.

    Raises:
        ValueError: an argument is not of this kind.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"wrap needs a torch.nn.Module, got {type(module).__name__}; make one of it")
    _check_num_classes(num_classes, "wrap")
    try:
        values = [torch.as_tensor(v, dtype=torch.float32) for v in (mean, std)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"wrap needs mean and std as numbers, or one a channel, got {mean!r} and {std!r}") from error
    if not all(v.isfinite().all() and v.numel() for v in values) or values[1].le(0).any():
        raise ValueError(f"wrap needs a finite mean, and a finite std > 0, got {mean!r} and {std!r}")
    return Classifier(module, mean=mean, std=std, num_classes=num_classes)


def _check_num_classes(num_classes: object, of: str) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        hint = "; a model with one logit has two classes" if num_classes == 1 else ""
        raise ValueError(f"{of} needs num_classes, a whole number >= 2, got {num_classes!r:.60}{hint}")


def check_unplanted(model: Classifier) -> None:
    """Raises:
    ValueError: a layer of a server's own stands before its network.
    """
    if [name for name, _ in model.net.named_children()] == ["front", "back"]:
        raise ValueError(
            "the model is planted already: it has a layer of a server's own before its network; plant on the model as"
            " it was"
        )


def with_front(model: Classifier, front: nn.Module) -> Classifier:
    """A copy of the classifier whose network sees front(x) in place of its normalised images x.

    The layers of both are at `net.front` and `net.back`.

    Raises:
        ValueError: the model has a front already.
    """
    check_unplanted(model)
    back: nn.Module = deep_copy(model).net  # type: ignore[assignment]
    net = nn.Sequential(OrderedDict(front=front, back=back))
    planted = Classifier(net, mean=model.mean, std=model.std, num_classes=model.num_classes)
    planted.mean, planted.std = model.mean.clone(), model.std.clone()
    return planted


def build(
    name: str, *, num_classes: int, image_shape: Shape, seed: int = 0, mean: object = None, std: object = None
) -> Classifier:
    """An untrained model, in eval mode. The same seed gives the same weights everywhere.

    Args:
        name: a key of MODELS; or torchvision:NAME, timm:NAME, or package.module:factory, which is called as
            factory(num_classes, image_shape) and returns a module.
        num_classes: K.
        image_shape: (C, H, W).
        seed: of the weights, each layer's initialisation as the model's entry states; what a library or a factory
            draws from torch's global generator comes from it too.
        mean, std: normalisation of the first layer. None is that of the library's own configuration where it has
            one, else no normalisation.

    Raises:
        ValueError: the name is unknown, or the model can't be built for these images.
    """
    check_name(name)
    image_shape = check_shape(image_shape)
    _check_num_classes(num_classes, "build")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"build needs seed, a whole number >= 0, got {seed!r}")
    if ":" in name:
        net, own_mean, own_std = foreign.build(name, num_classes, image_shape, seed)
        given = {"mean": own_mean if mean is None else mean, "std": own_std if std is None else std}
        return wrap(net, **given, num_classes=num_classes).eval()
    mean, std = (default if value is None else value for value, default in ((mean, 0.0), (std, 1.0)))
    with torch.device("meta"):  # layers would draw their default weights from the global generator
        net = MODELS[name].make(num_classes, image_shape)
    net.to_empty(device="cpu")
    rng = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, Tokens):
            nn.init.normal_(layer.first, std=0.02, generator=rng)
            nn.init.normal_(layer.position, std=0.02, generator=rng)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            MODELS[name].initialise(layer, rng)
    return wrap(net, mean=mean, std=std, num_classes=num_classes).eval()


def check_name(name: str) -> None:
    """ValueError unless `build` knows the name; one with a colon is looked up when it is built."""
    if not isinstance(name, str):
        raise ValueError(f"a model is named by a text such as 'lenet', got {name!r:.60}")
    if ":" in name:
        foreign.check_name(name)
    elif name not in MODELS:
        raise ValueError(nearest(name, MODELS, "model"))


def normalised(name: str) -> bool | None:
    """Whether studies normalise the model's input by the dataset; None where it brings its own normalisation."""
    return None if ":" in name else MODELS[name].normalised


def pretrained(name: str, *, root: Path) -> Classifier:
    """A public trained network of WEIGHTS, from `root`/weights, in eval mode.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the file is not below `root`.
        RuntimeError: the file is damaged, or has another network's weights.
    """
    if name not in WEIGHTS:
        raise ValueError(nearest(name, WEIGHTS, "set of weights"))
    entry = WEIGHTS[name]
    path = Path(root) / "weights" / entry.file
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; get {entry.source}, store them there as safetensors, or point the data root"
            " (GI_DATA) at a folder that has them"
        )
    model = build(
        entry.model, num_classes=entry.num_classes, image_shape=entry.image_shape, mean=entry.mean, std=entry.std
    )
    try:
        model.net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise RuntimeError(f"{path} is damaged, or another network's: {error}; copy it afresh") from error
    return model


def load_state(model: Classifier, path: Path) -> None:
    """Put the state of a safetensors file into a classifier's network.

    Raises:
        ValueError: the file is damaged, or holds another network's state.
    """
    try:
        model.net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold the state of this model ({error}); save it by safetensors.torch.save_file("
            "model.state_dict(), ...), and build the model for as many classes and as large images"
        ) from error


def uniform_half(layer: nn.Conv2d | nn.Linear, rng: torch.Generator) -> None:
    """Weights and biases uniform in [-0.5, 0.5] (DLG's public code)."""
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=rng)


def torch_default(layer: nn.Conv2d | nn.Linear, rng: torch.Generator) -> None:
    """PyTorch's own: weights and biases uniform in +-1/sqrt(fan_in)."""
    bound = layer.weight[0].numel() ** -0.5
    for p in layer.parameters():
        nn.init.uniform_(p, -bound, bound, generator=rng)


def he_fan_out(layer: nn.Conv2d | nn.Linear, rng: torch.Generator) -> None:
    """Convolutions N(0, 2 / fan_out) with biases 0 (He et al., 2015), dense layers PyTorch's own."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=rng)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    else:
        torch_default(layer, rng)


def small_normal(layer: nn.Conv2d | nn.Linear, rng: torch.Generator) -> None:
    """Weights N(0, 0.02^2), biases 0; class token and positions N(0, 0.02^2) too (as BERT and many transformers)."""
    nn.init.normal_(layer.weight, std=0.02, generator=rng)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class Architecture:
    make: Callable[[int, Shape], nn.Module]
    initialise: Callable[[nn.Conv2d | nn.Linear, torch.Generator], None]
    normalised: bool
    """Whether studies normalise its input by the dataset's mean and standard deviation."""
    revision: int = 1
    """Raised when its weights or its function change, so that its cases run again."""

    @property
    def about(self) -> str:
        return (self.make.__doc__ or "").strip()


MODELS = {
    "mlp": Architecture(networks.mlp, torch_default, normalised=False),
    "lenet": Architecture(networks.lenet, uniform_half, normalised=False),
    "cnn6": Architecture(networks.cnn6, torch_default, normalised=False),
    "convnet": Architecture(networks.convnet, torch_default, normalised=True),
    "vgg11": Architecture(networks.vgg11, he_fan_out, normalised=True),
    "resnet18": Architecture(networks.resnet18, he_fan_out, normalised=True, revision=2),
    "resnet50": Architecture(networks.resnet50, he_fan_out, normalised=True, revision=2),
    "vit": Architecture(networks.vit, small_normal, normalised=True),
    "resnet20": Architecture(networks.resnet20, he_fan_out, normalised=True),
    "resnet20_4": Architecture(networks.resnet20_4, he_fan_out, normalised=True),
    "resnet18_group": Architecture(networks.resnet18_group, he_fan_out, normalised=True),
    "resnet56": Architecture(networks.resnet56, he_fan_out, normalised=True),
    "cnn6_relu": Architecture(networks.cnn6_relu, torch_default, normalised=False),
    "cnn6_relu_wide": Architecture(networks.cnn6_relu_wide, torch_default, normalised=False),
    "lenet_normalised": Architecture(networks.lenet, uniform_half, normalised=True),
    "lenet_default": Architecture(networks.lenet, torch_default, normalised=False),
    "lenet5": Architecture(networks.lenet5, torch_default, normalised=False),
    "cnn2": Architecture(networks.cnn2, torch_default, normalised=True),
    "cnn2_norm": Architecture(networks.cnn2_norm, torch_default, normalised=True),
    "dense6": Architecture(networks.dense6, torch_default, normalised=True),
    "dense6_wide": Architecture(networks.dense6_wide, torch_default, normalised=True),
    "fc2": Architecture(networks.fc2, torch_default, normalised=True),
    "squeezenet": Architecture(networks.squeezenet, he_fan_out, normalised=True),
}

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Weights:
    """Where the trained weights of a public network lie below the data root, and what they expect."""

    file: str
    model: str
    num_classes: int
    image_shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


WEIGHTS = {
    "cifar10_resnet20": Weights(
        "cifar10/akamaster_resnet20.safetensors",
        "resnet20",
        10,
        (3, 32, 32),
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        "ResNet-20 of akamaster/pytorch_resnet_cifar10 (BSD-2)",
    ),
    "cifar10_resnet56": Weights(
        "cifar10/akamaster_resnet56.safetensors",
        "resnet56",
        10,
        (3, 32, 32),
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        "ResNet-56 of akamaster/pytorch_resnet_cifar10 (BSD-2)",
    ),
    "mnist_lenet5": Weights(
        "mnist/csinva_lenet5.safetensors",
        "lenet5",
        10,
        (1, 32, 32),
        (0.0,),
        (1.0,),
        "LeNet-5 of csinva/gan-vae-pretrained-pytorch (MIT)",
    ),
    "imagenet_squeezenet": Weights(
        "imagenet/squeezenet1_1.safetensors",
        "squeezenet",
        1000,
        (3, 224, 224),
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        "SqueezeNet 1.1 of torchvision (BSD-3)",
    ),
}
