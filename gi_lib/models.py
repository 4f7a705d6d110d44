"""The survey's models, and `wrap` for anybody's own.

Every model takes images in [0, 1] and normalises them in its first layer. `build` returns it in eval mode, where
batch norm uses its running statistics; call `.train()` to attack a client whose batch norm uses the batch's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from gi_lib.types import nearest

Shape = tuple[int, int, int]


class Classifier(nn.Module):
    """net((x - mean) / std), for images x [B, C, H, W] in [0, 1].

    Attributes:
        mean, std: [C, 1, 1].
        num_classes: K.
    """

    def __init__(self, net: nn.Module, *, mean, std, num_classes: int):
        super().__init__()
        self.net, self.num_classes = net, num_classes
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1))

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
        elif isinstance(layer, _Tokens):
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
    model.net.load_state_dict(load_file(path), strict=False)
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
    """Convolutions N(0, 2 / fan_out) (He et al., 2015) with biases 0, dense layers PyTorch's own; torchvision's."""
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


def mlp(num_classes: int, image_shape: Shape, width: int = 1024) -> nn.Module:
    """Three dense ReLU layers of 1,024 units and a dense classifier."""
    sizes = [torch.Size(image_shape).numel(), width, width, width]
    hidden = [layer for i in range(3) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


def lenet(num_classes: int, image_shape: Shape) -> nn.Module:
    """DLG's LeNet: three 5x5 convolutions of 12 channels, strides 2, 2 and 1, sigmoids, a dense classifier."""
    c, h, w = image_shape
    features = 12 * -(-h // 4) * -(-w // 4)
    return nn.Sequential(
        nn.Conv2d(c, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(features, num_classes),
    )


def convnet(num_classes: int, image_shape: Shape, width: int = 64) -> nn.Module:
    """The ConvNet of Inverting Gradients: eight 3x3 convolutions with batch norm and ReLU, two 3x3 max pools."""
    c, h, w = image_shape
    layers: list[nn.Module] = []
    for i, out in enumerate([1, 2, 2, 4, 4, 4, 4, 4]):
        layers += [nn.Conv2d(c, out * width, 3, padding=1), nn.BatchNorm2d(out * width), nn.ReLU()]
        layers += [nn.MaxPool2d(3)] if i in (5, 7) else []
        c = out * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * (h // 9) * (w // 9), num_classes))


def cnn6(num_classes: int, image_shape: Shape) -> nn.Module:
    """R-GAP's CNN6: six convolutions and a dense classifier without biases, LeakyReLU with slope 0.2."""
    c, h, w = image_shape
    layers: list[nn.Module] = []
    for out, kernel, stride, padding in [
        *((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1)),
        *((36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)),
    ]:
        layers += [nn.Conv2d(c, out, kernel, stride, padding, bias=False), nn.LeakyReLU(0.2)]
        c, h, w = out, (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * h * w, num_classes, bias=False))


def vgg11(num_classes: int, image_shape: Shape) -> nn.Module:
    """torchvision's VGG-11; up to 64 px its pools round sizes up and one dense layer takes the place of three."""
    net = torchvision.models.vgg11(num_classes=num_classes)
    c, h, _ = image_shape
    if c != 3:
        net.features[0] = nn.Conv2d(c, 64, 3, padding=1)
    if h <= 64:
        for layer in net.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    return net


def resnet18(num_classes: int, image_shape: Shape) -> nn.Module:
    """torchvision's ResNet-18; up to 64 px its stem is one 3x3 convolution of stride 1, without a pool."""
    return _stem(torchvision.models.resnet18(num_classes=num_classes), image_shape)


def resnet50(num_classes: int, image_shape: Shape) -> nn.Module:
    """torchvision's ResNet-50, its stem as that of ResNet-18."""
    return _stem(torchvision.models.resnet50(num_classes=num_classes), image_shape)


def _stem(net: torchvision.models.ResNet, image_shape: Shape) -> nn.Module:
    c, h, _ = image_shape
    if h <= 64:
        net.conv1, net.maxpool = nn.Conv2d(c, 64, 3, padding=1, bias=False), nn.Identity()
    elif c != 3:
        net.conv1 = nn.Conv2d(c, 64, 7, stride=2, padding=3, bias=False)
    return net


class _Tokens(nn.Module):
    """[B, width, h, w] -> [B, 1 + h w, width]: the class token first, learned positions added."""

    def __init__(self, number: int, width: int):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 1 + number, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.position


class _Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _VisionTransformer(nn.Module):
    """The ViT of Dosovitskiy et al. (ICLR 2021), which classifies by its first token."""

    def __init__(self, num_classes: int, image_shape: Shape, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        c, h, w = image_shape
        if h % patch or w % patch:
            raise ValueError(
                f"vit cuts images into patches of {patch} x {patch} pixels, which {h} x {w} is not made of"
            )
        self.patches = nn.Conv2d(c, width, patch, stride=patch)
        self.tokens = _Tokens((h // patch) * (w // patch), width)
        self.blocks = nn.Sequential(*(_EncoderBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(self.patches(x))))[:, 0])


def vit(num_classes: int, image_shape: Shape) -> nn.Module:
    """A small vision transformer: width 192, 6 blocks of 3 heads, patches of 4 pixels, above 64 px of 16."""
    patch = 4 if image_shape[1] <= 64 else 16
    return _VisionTransformer(num_classes, image_shape, patch, width=192, depth=6, heads=3)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that strides and pads with zero channels (option A of He et al.)."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.stride, self.padding = stride, (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return self.relu(out + nn.functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class _CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (CVPR 2016, section 4.2): three stages of 16, 32 and 64 channels."""

    def __init__(self, channels: int, blocks: int, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [_BasicBlock(planes, planes, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_BasicBlock(in_planes, planes, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet20(num_classes: int, image_shape: Shape) -> nn.Module:
    """The CIFAR ResNet-20 with parameter-free shortcuts."""
    return _CifarResNet(image_shape[0], 3, num_classes)


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
    "mlp": Architecture(mlp, torch_default, normalised=False),
    "lenet": Architecture(lenet, uniform_half, normalised=False),
    "cnn6": Architecture(cnn6, torch_default, normalised=False),
    "convnet": Architecture(convnet, torch_default, normalised=True),
    "vgg11": Architecture(vgg11, he_fan_out, normalised=True),
    "resnet18": Architecture(resnet18, he_fan_out, normalised=True),
    "resnet50": Architecture(resnet50, he_fan_out, normalised=True),
    "vit": Architecture(vit, small_normal, normalised=True),
    "resnet20": Architecture(resnet20, he_fan_out, normalised=True),
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
}
