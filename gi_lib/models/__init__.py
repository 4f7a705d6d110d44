"""The survey's models, and `wrap` for anybody's own.

Every model takes images in [0, 1] and normalises them in its first layer. `build` returns it in eval mode, where
batch norm uses its running statistics; call `.train()` to attack a client whose batch norm uses the batch's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gi_lib.models import networks
from gi_lib.models.networks import Shape, Tokens
from gi_lib.types import nearest


class Classifier(nn.Module):
    """net((x - mean) / std), for images x [B, C, H, W] in [0, 1].

    Attributes:
        mean, std: [C, 1, 1].
        num_classes: K.
    """

    def __init__(self, net: nn.Module, *, mean, std, num_classes: int):
        super().__init__()
        self.net, self.num_classes = net, num_classes
        device = next((p.device for p in net.parameters()), None)
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32, device=device)
            self.register_buffer(name, value.reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def wrap(module: nn.Module, *, mean=0.0, std=1.0, num_classes: int) -> Classifier:
    """Make any torchvision, timm or own classifier attackable; the module is used as it is, in its own mode.

    Args:
        module: maps normalised images [B, C, H, W] to logits [B, K].
        mean, std: numbers or one for each channel; the normalisation that the module expects of [0, 1] images.
        num_classes: K.
    """
    if num_classes < 2 or torch.as_tensor(std).le(0).any():
        raise ValueError(f"wrap needs num_classes >= 2 and std > 0, got {num_classes} and {std}")
    return Classifier(module, mean=mean, std=std, num_classes=num_classes)


def build(name: str, *, num_classes: int, image_shape: Shape, seed: int = 0, mean=0.0, std=1.0) -> Classifier:
    """A model of the survey, untrained, in eval mode. The same seed gives the same weights everywhere.

    Args:
        name: a key of MODELS.
        num_classes: K.
        image_shape: (C, H, W).
        seed: of the weights, each layer's initialisation as the model's entry states.
        mean, std: normalisation of the first layer; none by default.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in MODELS:
        raise ValueError(nearest(name, MODELS, "model"))
    with torch.device("meta"):  # layers would draw their default weights from the global generator
        net = MODELS[name].make(num_classes, image_shape)
    net.to_empty(device="cpu")
    rng = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, Tokens):
            nn.init.normal_(layer.first, std=0.02, generator=rng)
            nn.init.normal_(layer.position, std=0.02, generator=rng)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            MODELS[name].initialise(layer, rng)
    return wrap(net, mean=mean, std=std, num_classes=num_classes).eval()


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

    @property
    def about(self) -> str:
        return (self.make.__doc__ or "").strip()


MODELS = {
    "mlp": Architecture(networks.mlp, torch_default, normalised=False),
    "lenet": Architecture(networks.lenet, uniform_half, normalised=False),
    "cnn6": Architecture(networks.cnn6, torch_default, normalised=False),
    "convnet": Architecture(networks.convnet, torch_default, normalised=True),
    "vgg11": Architecture(networks.vgg11, he_fan_out, normalised=True),
    "resnet18": Architecture(networks.resnet18, he_fan_out, normalised=True),
    "resnet50": Architecture(networks.resnet50, he_fan_out, normalised=True),
    "vit": Architecture(networks.vit, small_normal, normalised=True),
    "resnet20": Architecture(networks.resnet20, he_fan_out, normalised=True),
    "resnet56": Architecture(networks.resnet56, he_fan_out, normalised=True),
    "lenet5": Architecture(networks.lenet5, torch_default, normalised=False),
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
