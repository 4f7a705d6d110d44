"""The networks themselves: (num_classes, image_shape) -> module, its weights as PyTorch draws them."""

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models import ResNet

Shape = tuple[int, int, int]


def mlp(num_classes: int, image_shape: Shape, width: int = 1024) -> nn.Module:
    """Three dense ReLU layers of 1,024 units and a dense classifier."""
    sizes = [torch.Size(image_shape).numel(), width, width, width]
    hidden = [layer for i in range(3) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


def dense6(num_classes: int, image_shape: Shape, width: int = 200) -> nn.Module:
    """Six dense layers, five of 200 units with ReLU and a classifier."""
    sizes = [torch.Size(image_shape).numel(), *[width] * 5]
    hidden = [layer for i in range(5) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


def dense6_wide(num_classes: int, image_shape: Shape) -> nn.Module:
    """Six dense layers, five of 1,000 units with ReLU and a classifier."""
    return dense6(num_classes, image_shape, 1000)


def fc2(num_classes: int, image_shape: Shape) -> nn.Module:
    """Two dense layers, 256 units with ReLU and a classifier, as in the cocktail party attack's README."""
    pixels = torch.Size(image_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, num_classes))


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
    if min(h, w) < 9:
        raise ValueError(f"convnet pools by 9 and takes images from 9 x 9 pixels on, got {h} x {w}; load them larger")
    layers: list[nn.Module] = []
    for i, out in enumerate([1, 2, 2, 4, 4, 4, 4, 4]):
        layers += [nn.Conv2d(c, out * width, 3, padding=1), nn.BatchNorm2d(out * width), nn.ReLU()]
        layers += [nn.MaxPool2d(3)] if i in (5, 7) else []
        c = out * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * (h // 9) * (w // 9), num_classes))


def cnn6(
    num_classes: int, image_shape: Shape, activation: nn.Module | None = None, widths: tuple[int, int] = (12, 36)
) -> nn.Module:
    """R-GAP's CNN6: six convolutions and a dense classifier without biases, LeakyReLU with slope 0.2."""
    c, h, w = image_shape
    layers: list[nn.Module] = []
    for out, kernel, stride, padding in [
        *((widths[0], 4, 2, 2), (widths[1], 3, 2, 1), (36, 3, 1, 1)),
        *((36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)),
    ]:
        layers += [nn.Conv2d(c, out, kernel, stride, padding, bias=False), activation or nn.LeakyReLU(0.2)]
        c, h, w = out, (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * h * w, num_classes, bias=False))


def cnn6_relu(num_classes: int, image_shape: Shape) -> nn.Module:
    """CNN6 with ReLU in place of LeakyReLU."""
    return cnn6(num_classes, image_shape, nn.ReLU())


def cnn6_relu_wide(num_classes: int, image_shape: Shape) -> nn.Module:
    """CNN6 with ReLU, and with 24 and 96 channels in its first two convolutions instead of 12 and 36."""
    return cnn6(num_classes, image_shape, nn.ReLU(), (24, 96))


def cnn2(num_classes: int, image_shape: Shape) -> nn.Module:
    """SME's CNN: two 3x3 convolutions with ReLU, each with a mean over 2x2 pixels, and two dense layers; 32 and 64
    channels and 100 units for one channel, twice as many for colour."""
    c, h, w = image_shape
    wide = 1 if c == 1 else 2
    return nn.Sequential(
        nn.Conv2d(c, 32 * wide, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32 * wide, 64 * wide, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * wide * (h // 4) * (w // 4), 100 * wide),
        nn.ReLU(),
        nn.Linear(100 * wide, num_classes),
    )


def cnn2_norm(num_classes: int, image_shape: Shape) -> nn.Module:
    """A small CNN with batch norm: two 3x3 convolutions of stride 2 with 8 and 32 channels, two dense layers of 64
    units, each with batch norm and ReLU, and a dense classifier."""
    c, h, w = image_shape
    features = 32 * -(-h // 4) * -(-w // 4)
    return nn.Sequential(
        *(nn.Conv2d(c, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Flatten(),
        *(nn.Linear(features, 64), nn.BatchNorm1d(64), nn.ReLU()),
        *(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, num_classes),
    )


def vgg11(num_classes: int, image_shape: Shape) -> nn.Module:
    """torchvision's VGG-11; up to 64 px its pools round sizes up and one dense layer takes the place of three."""
    from torchvision.models import vgg11  # slow to import

    net = vgg11(num_classes=num_classes)
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
    """torchvision's ResNet-18; under 64 px its stem is one 3x3 convolution of stride 1, without a pool."""
    from torchvision.models import resnet18

    net = _grey(resnet18(num_classes=num_classes), image_shape)
    if image_shape[1] < 64:
        net.conv1, net.maxpool = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False), nn.Identity()
    return net


def resnet18_group(num_classes: int, image_shape: Shape) -> nn.Module:
    """resnet18 with group norm of 32 groups (Wu, He, ECCV 2018) in place of each batch norm."""
    net = resnet18(num_classes, image_shape)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(32, child.num_features))
    return net


def resnet50(num_classes: int, image_shape: Shape) -> nn.Module:
    """torchvision's ResNet-50, at every size with its stem: a 7x7 convolution of stride 2 and a pool of stride 2."""
    from torchvision.models import resnet50

    return _grey(resnet50(num_classes=num_classes), image_shape)


def _grey(net: "ResNet", image_shape: Shape) -> "ResNet":
    """The network for images of other than three channels."""
    if image_shape[0] != 3:
        net.conv1 = nn.Conv2d(image_shape[0], 64, 7, stride=2, padding=3, bias=False)
    return net


class Tokens(nn.Module):
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
        self.tokens = Tokens((h // patch) * (w // patch), width)
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


def resnet56(num_classes: int, image_shape: Shape) -> nn.Module:
    """The CIFAR ResNet-56 with parameter-free shortcuts."""
    return _CifarResNet(image_shape[0], 9, num_classes)


def resnet20_4(num_classes: int, image_shape: Shape) -> nn.Module:
    """The ResNet20-4 of Inverting Gradients: three stages of three of torchvision's blocks, 64 to 256 channels."""
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    net = ResNet(BasicBlock, [3, 3, 3, 1], num_classes=num_classes)
    net.conv1, net.maxpool = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False), nn.Identity()
    net.layer4, net.fc = nn.Identity(), nn.Linear(256, num_classes)
    return net


class _LeNet5(nn.Module):
    """Its layers have the names of the original figure (LeCun et al., 1998): C1, C3, C5, F6."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        pool = nn.MaxPool2d(2)
        convolutions = {
            "c1": nn.Conv2d(channels, 6, 5),
            "relu1": nn.ReLU(),
            "s2": pool,
            "c3": nn.Conv2d(6, 16, 5),
            "relu3": nn.ReLU(),
            "s4": pool,
            "c5": nn.Conv2d(16, 120, 5),
            "relu5": nn.ReLU(),
        }
        self.convnet = nn.Sequential(OrderedDict(convolutions))
        dense = {"f6": nn.Linear(120, 84), "relu6": nn.ReLU(), "f7": nn.Linear(84, num_classes)}
        self.fc = nn.Sequential(OrderedDict(dense))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.convnet(x).flatten(1))


def lenet5(num_classes: int, image_shape: Shape) -> nn.Module:
    """LeNet-5 with ReLU and max pools in place of squashing and subsampling; images of 32 x 32 pixels."""
    if image_shape[1:] != (32, 32):
        raise ValueError(
            f"lenet5 takes images of 32 x 32 pixels, got {image_shape[1]} x {image_shape[2]}; load them so"
        )
    return _LeNet5(image_shape[0], num_classes)


def squeezenet(num_classes: int, image_shape: Shape) -> nn.Module:
    """torchvision's SqueezeNet 1.1, which ends in a convolution, a ReLU and a mean."""
    from torchvision.models import squeezenet1_1

    net = squeezenet1_1(num_classes=num_classes)
    if image_shape[0] != 3:
        net.features[0] = nn.Conv2d(image_shape[0], 64, 3, stride=2)
    return net
