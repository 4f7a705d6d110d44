"""Writes the two pictures that open the project, after a change of what they show.

    python book/readme.py          # book/_static/readme.png and book/_static/opening.html

readme.png, of README.md, is made from the studies' records: above the private images, below what the attack made of
their gradient; the first eight of each study. opening.html, of book/index.md, is made by running three attacks on
photographs that come with scikit-image: private, gradient, rebuilt; some minutes on one core.
"""

from html import escape
from pathlib import Path

import torch
from PIL import Image

from gi_lib import Batch, ThreatModel, data, metrics, models, observe, pages, results
from gi_lib.attacks import BiasRatio, InvertingGradients, RobbingTheFed

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "book" / "_static"
SCALE = 3  # pixels shown for one pixel

CAT, CUP = 8, 23
MANY = [CAT, CUP, 3, 4, 10, 19, 26, 17]  # a batch in which each photograph is alone in its bin; the first two are shown


def sheet(study: str, **values: str) -> torch.Tensor:
    """Two rows of eight images [3, H, W]: private, reconstructed."""
    path = ROOT / "results" / f"{study}.jsonl"
    frame = results.read(path)
    for column, value in values.items():
        frame = frame[frame[column] == value]
    frame = frame.sort_values("indices").head(8)
    pairs = [results.read_picture(results.picture_path(path, key), 1) for key in frame["key"]]
    columns = [torch.nn.functional.pad(torch.cat([x[0], y[0]], 1), (0, 1, 0, 1), value=1.0) for x, y in pairs]
    return torch.cat(columns, 2)


def readme() -> None:
    pictures = torch.cat([sheet("dlg", threat_letter="B"), sheet("inverting_gradients", model="convnet")], 1)
    pixels = (pictures * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture = picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)
    picture.save(STATIC / "readme.png", optimize=True)


def drawn(gradient: dict[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
    """A gradient as a grey picture [1, 3, height, width]: entries at equal distances, negative ones dark."""
    flat = torch.cat([g.flatten() for g in gradient.values()])
    chosen = flat[torch.linspace(0, len(flat) - 1, height * width).long()]
    size = chosen.abs().quantile(0.9)
    return (0.5 + 0.5 * torch.tanh(chosen / size)).reshape(1, 1, height, width).expand(-1, 3, -1, -1)


def client(name: str, attack, batch: Batch):
    """What the server sees of a client with this batch; a malicious one sends a model that it has planted."""
    rng = torch.Generator().manual_seed(0)
    photos = data.load("photos")
    scale = {"mean": photos.mean, "std": photos.std} if models.MODELS[name].normalised else {}
    model = models.build(name, num_classes=photos.num_classes, image_shape=photos.image_shape, seed=0, **scale)
    if not hasattr(attack, "plant"):
        return observe(model, batch, rng=rng)
    own = data.Surrogate(data.load("photos", split="train"))
    planted, trapdoor = attack.plant(model, photos.image_shape, own, rng)
    threat = ThreatModel(malicious_server=True)
    return observe(planted, batch, threat=threat, trapdoor=trapdoor, rng=rng)


def card(title: str, page: str, setting: str, name: str, attack, batches: list[list[int]]) -> str:
    """One technique: two private photographs, the gradient, what came of it and how near that is."""
    private, gradients, rebuilt = [], [], []
    shown = 2 // len(batches)
    for indices in batches:
        batch = data.load("photos").batch(indices)
        obs = client(name, attack, batch)
        rec = attack(obs, torch.Generator().manual_seed(0))
        order = metrics.align(rec.images, batch.images)[:shown]
        private.append(batch.images[:shown])
        rebuilt.append(rec.images[order])
        gradients.append(drawn(obs.gradient, batch.images.shape[-2], shown * batch.images.shape[-1]))
    count = sum(g.numel() for g in obs.gradient.values())
    said = " and ".join(f"{value:.0f}" for value in metrics.psnr(torch.cat(rebuilt), torch.cat(private)).tolist())
    print(f"{title}: {said} dB", flush=True)
    rows = (
        ("private", torch.cat(private), "Two private photographs, a cat and a cup of coffee"),
        (
            f"gradient, {count:,} numbers",
            torch.cat(gradients),
            "The gradient as a grey picture, which looks like noise",
        ),
        (f"rebuilt, {said} dB", torch.cat(rebuilt), f"The two photographs as {title} rebuilds them from the gradient"),
    )
    pictures = "".join(
        f"<figure>{pages.picture(images, alt, shown=128)}<figcaption>{label}</figcaption></figure>"
        for label, images, alt in rows
    )
    head = f'<p><a href="{page}"><b>{escape(title)}</b></a><br>{escape(setting)}</p>'
    return f'<div class="gi-card">{head}{pictures}</div>\n'


def opening() -> None:
    alone = [[CAT], [CUP]]
    angle, imprint = InvertingGradients(steps=600, tv=0.1), RobbingTheFed(bins=28)
    planted = f"a layer planted before a ResNet-18, a batch of {len(MANY)}"
    cards = [
        card("Bias ratio", "closed_form.html", "one division, a dense network", "mlp", BiasRatio(), alone),
        card(
            "Inverting Gradients",
            "inverting_gradients.html",
            f"{angle.steps} steps, a network of six convolutions",
            "cnn6",
            angle,
            alone,
        ),
        card("Robbing the Fed", "map.html#tech-robbing-the-fed", planted, "resnet18", imprint, [MANY]),
    ]
    opening = f'<div class="gi-opening">\n{"".join(cards)}</div>\n'
    (STATIC / "opening.html").write_text(opening, encoding="utf-8")


if __name__ == "__main__":
    readme()
    opening()
