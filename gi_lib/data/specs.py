"""What is known of each dataset before it is loaded: the table behind `gi list`."""

from dataclasses import dataclass


class DataError(ValueError):
    """A dataset is missing, damaged, or can't be downloaded."""


@dataclass(frozen=True)
class Spec:
    """One dataset.

    Args:
        about: one line.
        licence: as its source states it.
        source: where it comes from.
        num_classes: K.
        image_shape: (C, H, W) without a `size`.
        mean, std: of each channel over the train images, in units of [0, 1].
        class_names: K names, or None where the data brings its own names, or has none.
    """

    about: str
    licence: str
    source: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None


PHOTOGRAPHS = (
    *("astronaut", "chelsea", "coffee", "rocket"),
    *("hubble_deep_field", "retina", "immunohistochemistry"),
)

# Each mean and standard deviation was computed once over all pixels of the train split: of the packs (20,000
# images of mnist and cifar10, 6,000 of cifar100, 280 of faces), of digits, and of photos at 32x32.
# imagenet has no train pack; its values are torchvision's, which trained ImageNet models expect. Those of svhn and
# fashion_mnist are the ones in common use, and celeba takes one half: none of the three was computed here.
DATASETS: dict[str, Spec] = {
    "digits": Spec(
        about="handwritten digits, 8x8 grey, 10 classes; embedded: 1,200 train, 597 test",
        licence="CC BY 4.0",
        source="UCI: Optical Recognition of Handwritten Digits, test set (Alpaydin, Kaynak 1998)",
        num_classes=10,
        image_shape=(1, 8, 8),
        mean=(0.3064,),
        std=(0.3753,),
        class_names=tuple("0123456789"),
    ),
    "photos": Spec(
        about="crops of 7 colour photographs, 32x32 or any size up to 224, the photograph is the class;"
        " embedded: 28 train, 28 test",
        licence="astronaut, rocket, hubble_deep_field: public domain; chelsea, coffee, retina: CC0;"
        " immunohistochemistry: no known copyright restrictions (as scikit-image states them)",
        source="skimage.data: NASA (astronaut, hubble_deep_field), S. van der Walt (chelsea), R. Michetti"
        " (coffee), SpaceX (rocket), M. Häggström (retina), CMMI (immunohistochemistry)",
        num_classes=len(PHOTOGRAPHS),
        image_shape=(3, 32, 32),
        mean=(0.4624, 0.3230, 0.2820),
        std=(0.3163, 0.2471, 0.2427),
        class_names=PHOTOGRAPHS,
    ),
    "mnist": Spec(
        about="handwritten digits, 28x28 grey, 10 classes",
        licence="CC BY-SA 3.0",
        source="MNIST (LeCun, Cortes, Burges)",
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(0.1314,),
        std=(0.3087,),
        class_names=tuple("0123456789"),
    ),
    "cifar10": Spec(
        about="small colour photographs, 32x32, 10 classes",
        licence="no formal licence",
        source="CIFAR-10 (Krizhevsky 2009)",
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=(0.4916, 0.4831, 0.4479),
        std=(0.2480, 0.2442, 0.2623),
    ),
    "cifar100": Spec(
        about="small colour photographs, 32x32, 100 classes (fine labels)",
        licence="no formal licence",
        source="CIFAR-100 (Krizhevsky 2009)",
        num_classes=100,
        image_shape=(3, 32, 32),
        mean=(0.5044, 0.4854, 0.4408),
        std=(0.2656, 0.2542, 0.2749),
    ),
    "imagenet": Spec(
        about="colour photographs, 224x224 unless asked otherwise, 1,000 classes; no download",
        licence="ImageNet's research terms",
        source="ImageNet: sample images, or the class folders of ILSVRC 2012",
        num_classes=1000,
        image_shape=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "faces": Spec(
        about="faces of 40 people, 112x92 grey, the person is the class; no download",
        licence="credit to Olivetti Research Laboratory",
        source="AT&T (ORL) faces (Samaria and Harter 1994)",
        num_classes=40,
        image_shape=(1, 112, 92),
        mean=(0.4413,),
        std=(0.1945,),
    ),
    "fashion_mnist": Spec(
        about="photographs of clothes, 28x28 grey, 10 classes",
        licence="MIT",
        source="Fashion-MNIST (Xiao, Rasul, Vollgraf 2017)",
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "svhn": Spec(
        about="house numbers in photographs, 32x32, the middle digit is the class",
        licence="for non-commercial use only",
        source="SVHN, cropped digits (Netzer et al. 2011)",
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        class_names=tuple("0123456789"),
    ),
    "celeba": Spec(
        about="faces of celebrities, 64x64 unless asked otherwise, smiling or not is the class; no download",
        licence="for non-commercial research only",
        source="CelebA, aligned and cropped (Liu et al. 2015)",
        num_classes=2,
        image_shape=(3, 64, 64),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_names=("not smiling", "smiling"),
    ),
}
NAMES = tuple(DATASETS)
