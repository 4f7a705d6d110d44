"""Odd input over the public API: each call gives a right answer, or an error that the package itself raises.

    python tests/fuzz.py --count 10000 --seed 0

An error counts as the package's own where the last line of its traceback is a `raise` in gi_lib, of a ValueError, an
OSError, a RuntimeError or a FloatingPointError, with a text. What Python or torch raise from inside it is a finding.
It is a script and not a test, since the tests' checks of types would answer first; test_fuzz.py runs it.
"""

import argparse
import dataclasses
import linecache
import math
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import gi_lib
from gi_lib import (
    SGD,
    Adam,
    Batch,
    Client,
    Observation,
    Reconstruction,
    ThreatModel,
    checkpoints,
    data,
    evaluate,
    labels,
    metrics,
    models,
    observe,
    receive,
    results,
)
from gi_lib.attacks import ATTACKS
from gi_lib.bench import Case, key
from gi_lib.cli import from_spec, parse_indices
from gi_lib.defenses import DEFENSES

PACKAGE = str(Path(gi_lib.__file__).parent)
FOLDER = Path(tempfile.mkdtemp(prefix="gi-fuzz-"))

numbers = st.one_of(
    st.integers(-3, 5),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.sampled_from([True, False, None, "a", "", 0, 1, -1, 2**70, 1e-9, (1,), [], {}, b"x"]),
)
words = st.one_of(
    st.sampled_from(["lenet", "mlp", "digits", "photos", "test", "train", "smoke", "quick", "torchvision:resnet18"]),
    st.text(max_size=8),
    numbers,
)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@st.composite
def tensors(draw, *shapes):
    """Of a likely shape or of any, with values in [0, 1], beyond, or not numbers; or no tensor at all."""
    if draw(st.integers(0, 12)) == 0:
        return draw(st.one_of(numbers, st.just([[0.5]]), st.just(np.ones((1, 1, 8, 8)))))
    any_shape = st.lists(st.integers(0, 3), max_size=5).map(tuple)
    shape = draw(st.one_of(*map(st.just, shapes * 3), any_shape))
    value = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    value = value * draw(st.sampled_from([1.0, 1.0, 1.0, 3.0, -1.0, 1e38]))
    if value.numel() and draw(st.integers(0, 8)) == 0:
        value.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -1e-7, 2.0]))
    dtype = draw(st.sampled_from([torch.float32] * 6 + DTYPES))
    return value.to(dtype)


label_tensors = st.one_of(
    st.lists(st.integers(-1, 12), max_size=3).map(lambda v: torch.tensor(v, dtype=torch.int64)),
    tensors((1,), (2,)),
)


def some_of(names, values=numbers):
    """Some of the keyword arguments, if there are any."""
    if not names:
        return st.just({})
    return st.dictionaries(st.sampled_from(sorted(names)), values, max_size=3)


def fields(cls):
    return [f.name for f in dataclasses.fields(cls)]


def small_model(kind="lenet"):
    return models.build(kind, num_classes=10, image_shape=(1, 8, 8), seed=0)


MODEL = {kind: small_model(kind) for kind in ("lenet", "mlp")}
GOOD = data.load("digits").batch([0, 1])
OBSERVED = observe(MODEL["lenet"], GOOD, rng=torch.Generator().manual_seed(0))
NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 10))
GRADIENT = dict(
    zip(
        dict(NET.named_parameters()),
        torch.autograd.grad(nn.functional.cross_entropy(NET(GOOD.images), GOOD.labels), list(NET.parameters())),
        strict=True,
    )
)
CASE = {"attack": ATTACKS["dlg"](steps=1), "model": "lenet", "dataset": "digits", "indices": (0,)}
ROW = None


def whole_row():
    from tests.test_results import record

    return record()


def make(cls, **arguments):
    made = cls(**arguments)
    assert made == cls(**arguments) or any(v != v for v in arguments.values())
    return made


def call_batch(images, y):
    batch = Batch(images, y)
    assert batch.images.min() >= 0 and batch.images.max() <= 1 and len(batch) == len(batch.labels) > 0


def call_wrap(module, arguments):
    model = models.wrap(module, **arguments)
    assert model.num_classes >= 2 and torch.isfinite(model.mean).all() and (model.std > 0).all()


def call_build(name, num_classes, shape, number):
    if isinstance(num_classes, int) and num_classes > 1000:
        return
    model = models.build(name, num_classes=num_classes, image_shape=shape, seed=number)
    assert model(torch.rand(1, *shape)).shape == (1, num_classes)


def call_load(name, split, size):
    found = data.load(name, split=split, size=size, root=FOLDER, download=False)
    assert len(found) > 0 and (size is None or found.image_shape[1:] == (size, size))


def call_take(indices):
    batch = data.load("digits").batch(indices)
    assert len(batch) == len(indices)


def call_reconstruction(images, y, loss):
    rec = Reconstruction(images, y, loss)
    assert torch.isfinite(rec.images).all() and rec.images.ndim == 4


def call_evaluate(images, truth):
    rec = Reconstruction(images, None, 0.0)
    size = len(truth) if isinstance(truth, torch.Tensor) and truth.ndim else 1
    scores = evaluate(rec, Batch(truth, torch.zeros(size, dtype=torch.int64)), download=False)
    assert len(scores.psnr) == len(truth) and 0 <= scores.recall <= 1
    assert (scores.psnr.nan_to_num(0) <= metrics.PSNR_CAP).all() and str(scores)


def call_metric(name, a, b):
    value = getattr(metrics, name)(a, b)
    assert len(value) == len(b) and (name == "align" or torch.isfinite(value).all())


def call_identified(a, b, c):
    assert len(metrics.identified(a, b, c)) == len(b)


def call_label_accuracy(a, b):
    assert 0 <= metrics.label_accuracy(a, b) <= 1


def call_rows(content):
    path = FOLDER / "fuzzed.jsonl"
    path.write_bytes(content)
    for row in results.rows(path):
        assert len(row["indices"]) == row["batch_size"]


def call_append(change):
    path = FOLDER / "appended.jsonl"
    path.unlink(missing_ok=True)
    results.append(path, whole_row() | change)
    assert len(results.rows(path)) == 1


def call_case(change):
    case = Case(**CASE | change)
    assert len(key(case)) == 12


def call_observe(images, y, facts, client, kind):
    threat = ThreatModel(**facts)
    obs = observe(MODEL[kind], Batch(images, y), client=client, threat=threat, rng=torch.Generator())
    assert (obs.labels is None) != threat.knows_labels and obs.gradient


def call_attack(name, arguments, facts, kind, number):
    attack = ATTACKS[name](**{"steps": 2, "restarts": 1} | arguments if "steps" in fields(ATTACKS[name]) else arguments)
    if any(isinstance(v, int) and v > 5 for v in arguments.values()):
        return
    obs = observe(MODEL[kind], GOOD, threat=ThreatModel(**facts), rng=torch.Generator())
    rec = attack(obs, torch.Generator().manual_seed(number))
    assert rec.images.shape[1:] == (1, 8, 8) and 0 <= rec.images.min() <= rec.images.max() <= 1


def call_receive(update, shape, more):
    obs = receive(NET, update, image_shape=shape, **more)
    assert obs.gradient.keys() == {f"net.{name}" for name in GRADIENT} and isinstance(obs, Observation)


def call_simulate(images, y):
    g = OBSERVED.simulate(images, y)
    assert g.keys() == OBSERVED.gradient.keys()


def call_labels(size, y, rule):
    obs = observe(MODEL["lenet"], Batch(GOOD.images[:1].expand(size, -1, -1, -1), y[:size]), rng=torch.Generator())
    assert len(getattr(labels, rule)(obs)) == size


def call_checkpoint(name, reference):
    folder = FOLDER / "checkpoints"
    made = checkpoints.save(name, {"a": torch.ones(2)}, folder)
    assert checkpoints.load(made, folder)["a"].tolist() == [1, 1]
    checkpoints.load(reference, folder)


def call_indices(text):
    assert all(i >= 0 for i in parse_indices(text))


def call_spec(text):
    from_spec(text, ATTACKS, "attack")


def call_summary(by):
    row = whole_row()
    path = FOLDER / "summary.jsonl"
    path.unlink(missing_ok=True)
    results.append(path, row)
    assert len(results.summarise(results.read(path), by)) == 1


FACTS = [f for f in fields(ThreatModel) if f not in ("has_auxiliary_data", "many_rounds")]
truths = st.one_of(st.booleans(), st.booleans(), numbers)
clients = st.sampled_from(
    [Client(), Client(steps=2, lr=0.1), Client(steps=3, lr=0.1, local_batch=1), Client(optimiser=Adam())]
)
line = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.sampled_from(["key", "psnr", "indices", "seed", "curve", "versions", "identified"]).flatmap(
        lambda name: st.one_of(numbers, st.lists(numbers, max_size=3)).map(lambda v: (name, v))
    ),
)


def rows_of(parts):
    """Lines of a file: bytes, or a whole record with one field changed."""
    import json

    found = []
    for part in parts:
        if isinstance(part, bytes):
            found.append(part)
        else:
            name, value = part
            found.append(json.dumps(whole_row() | {name: value}, default=str).encode())
    return b"\n".join(found) + b"\n"


updates = st.one_of(
    st.just(GRADIENT),
    st.just(list(GRADIENT.values())),
    st.dictionaries(
        st.one_of(st.sampled_from(list(GRADIENT)), st.text(max_size=6)), tensors((8,), (10,)), max_size=2
    ).map(lambda change: GRADIENT | change),
    st.sampled_from(list(GRADIENT)).map(lambda left: {k: v for k, v in GRADIENT.items() if k != left}),
    st.lists(tensors((8, 64), (8,), (10, 8), (10,)), max_size=4),
    st.sampled_from(["module.", "_orig_mod.", "net.", "_module."]).map(
        lambda p: {p + k: v for k, v in GRADIENT.items()}
    ),
    st.sampled_from([FOLDER / "no.safetensors", str(FOLDER), {}, [], ()]),
)
images = tensors((1, 1, 8, 8), (2, 1, 8, 8))

CALLS = st.one_of(
    *(
        st.tuples(st.just(make), st.just((cls,)), some_of(fields(cls)))
        for cls in (Client, SGD, Adam, ThreatModel, *ATTACKS.values(), *DEFENSES.values())
    ),
    st.tuples(st.just(call_batch), st.tuples(images, label_tensors), st.just({})),
    st.tuples(
        st.just(call_wrap),
        st.tuples(
            st.one_of(st.just(NET), numbers),
            some_of(("mean", "std"), st.one_of(numbers, st.lists(numbers, max_size=3))).flatmap(
                lambda more: st.one_of(st.just(10), numbers).map(lambda k: more | {"num_classes": k})
            ),
        ),
        st.just({}),
    ),
    st.tuples(
        st.just(call_build),
        st.tuples(
            words,
            st.one_of(st.integers(2, 4), numbers),
            st.one_of(
                st.sampled_from([(1, 8, 8), (3, 12, 9)]), st.lists(st.integers(-1, 12), max_size=4).map(tuple), numbers
            ),
            st.one_of(st.integers(0, 3), numbers),
        ),
        st.just({}),
    ),
    st.tuples(
        st.just(call_load), st.tuples(words, words, st.one_of(st.none(), st.integers(0, 40), numbers)), st.just({})
    ),
    st.tuples(st.just(call_take), st.tuples(st.one_of(st.lists(numbers, max_size=3), numbers)), st.just({})),
    st.tuples(
        st.just(call_reconstruction), st.tuples(images, st.one_of(st.none(), label_tensors), numbers), st.just({})
    ),
    st.tuples(st.just(call_evaluate), st.tuples(images, images), st.just({})),
    st.tuples(
        st.just(call_metric), st.tuples(st.sampled_from(["align", "mse", "psnr", "ssim"]), images, images), st.just({})
    ),
    st.tuples(st.just(call_identified), st.tuples(images, images, images), st.just({})),
    st.tuples(st.just(call_label_accuracy), st.tuples(label_tensors, label_tensors), st.just({})),
    st.tuples(st.just(call_rows), st.tuples(st.lists(line, max_size=3).map(rows_of)), st.just({})),
    st.tuples(
        st.just(call_append),
        st.tuples(
            some_of(["psnr", "key", "seed", "curve", "loss", "x"], st.one_of(numbers, st.lists(numbers, max_size=2)))
        ),
        st.just({}),
    ),
    st.tuples(
        st.just(call_case),
        st.tuples(some_of(fields(Case), st.one_of(words, numbers, st.lists(numbers, max_size=2).map(tuple)))),
        st.just({}),
    ),
    st.tuples(
        st.just(call_observe),
        st.tuples(images, label_tensors, some_of(FACTS, truths), clients, st.sampled_from(["lenet", "mlp"])),
        st.just({}),
    ),
    st.sampled_from(sorted(ATTACKS)).flatmap(
        lambda name: st.tuples(
            st.just(call_attack),
            st.tuples(
                st.just(name),
                some_of([*fields(ATTACKS[name]), "restarts"], numbers).map(
                    lambda given, name=name: {k: v for k, v in given.items() if k in fields(ATTACKS[name])}
                ),
                some_of(FACTS, st.booleans()),
                st.sampled_from(["lenet", "mlp"]),
                st.integers(0, 3),
            ),
            st.just({}),
        )
    ),
    st.tuples(
        st.just(call_receive),
        st.tuples(
            updates,
            st.one_of(st.just((1, 8, 8)), st.lists(st.integers(0, 9), max_size=4).map(tuple), numbers),
            st.fixed_dictionaries(
                {}, optional={"batch_size": numbers, "num_classes": numbers, "labels": label_tensors}
            ),
        ),
        st.just({}),
    ),
    st.tuples(st.just(call_simulate), st.tuples(images, label_tensors), st.just({})),
    st.tuples(
        st.just(call_labels),
        st.tuples(
            st.integers(1, 2),
            st.lists(st.integers(0, 9), min_size=2, max_size=2).map(torch.tensor),
            st.sampled_from(["idlg", "column_min", "infer"]),
        ),
        st.just({}),
    ),
    st.tuples(
        st.just(call_checkpoint),
        st.tuples(words, st.one_of(words, st.text(max_size=12).map(lambda t: f"a@{t}"))),
        st.just({}),
    ),
    st.tuples(st.just(call_indices), st.tuples(st.text("0123456789-, a", max_size=12)), st.just({})),
    st.tuples(
        st.just(call_spec),
        st.tuples(
            st.tuples(st.sampled_from([*ATTACKS, "dgl"]), st.text("lrsteps=,:.0123456789aN-", max_size=16)).map(
                ":".join
            )
        ),
        st.just({}),
    ),
    st.tuples(
        st.just(call_summary),
        st.tuples(st.lists(st.one_of(st.sampled_from(["attack", "psnr"]), st.text(max_size=4)), max_size=2)),
        st.just({}),
    ),
)

OWN = (ValueError, OSError, RuntimeError, FloatingPointError)


def verdict(error):
    """None for an error of the package's own, else what is wrong with it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, AssertionError) or not isinstance(error, OWN):
        return "a wrong answer" if isinstance(error, AssertionError) else "not an error of the package's"
    if not last.filename.startswith(PACKAGE) or "raise" not in linecache.getline(last.filename, last.lineno):
        return "raised from inside"
    return None if str(error).strip() else "no text"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seen, findings = Counter(), {}

    @seed(options.seed)
    @settings(
        max_examples=options.count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CALLS)
    def fuzz(call):
        function, arguments, more = call
        name = f"{function.__name__} {arguments[0].__name__}" if function is make else function.__name__
        try:
            function(*arguments, **more)
        except Exception as error:  # noqa: BLE001
            wrong = verdict(error)
            seen["errors of the package's own" if wrong is None else "findings"] += 1
            if wrong:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                asked = f"{name}{arguments!r:.300} {more!r:.200}"
                said = f"{wrong}: {asked}\n    {type(error).__name__} at {where}: {error!s:.200}"
                findings.setdefault((name, type(error).__name__, where), said)
        else:
            seen["right answers"] += 1

    fuzz()
    print(", ".join(f"{n} {what}" for what, n in seen.most_common()), f"of {sum(seen.values())}, seed {options.seed}")
    for said in findings.values():
        print(said)
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
