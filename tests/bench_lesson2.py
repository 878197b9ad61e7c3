"""Lesson 2's numbers: test accuracy over seeds, seconds of a training run, what each trick is worth, who is a stranger.

    python tests/bench_lesson2.py               all tables, about 10 minutes on two cores
    python tests/bench_lesson2.py test          the default configuration: 3 seeds, on the test images
    python tests/bench_lesson2.py tricks        one thing changed at a time, on 10,000 validation images
    python tests/bench_lesson2.py clothing      how often a drawing that is no clothing is called strange
"""
import argparse
import dataclasses
import io
import pathlib
import platform
import re
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lesson2_mlp as L


def machine(device="cpu"):
    """What the numbers were measured on; the first line of every benchmark."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text(encoding="utf-8")) if info.exists() else []
    name = torch.cuda.get_device_name() if device == "cuda" else (names or [platform.processor() or platform.machine()])[0]
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def changed(kind, make):
    """The lesson's MLP with every module of `kind` in its body replaced by make()."""
    class Changed(L.MLP):
        def __init__(self, *args):
            super().__init__(*args)
            for i, module in enumerate(self.body):
                if isinstance(module, kind):
                    self.body[i] = make()
                    if kind is nn.BatchNorm1d:          # its bias was the layer's
                        self.body[i - 1] = nn.Linear(self.body[i - 1].in_features, self.body[i - 1].out_features)
    return Changed


class Mirrored(L.Images):
    def __getitems__(self, indices):
        images, labels = super().__getitems__(indices)
        if self.generator is not None:
            mirror = torch.rand(len(images), 1, 1, generator=self.generator) < 0.5
            images = torch.where(mirror, images.flip(2), images)
        return images, labels


def train(config, train, val, **patches):
    """(model, rows, seconds) of a quiet run with the given names of the lesson replaced."""
    before = {name: getattr(L, name) for name in patches}
    began = time.perf_counter()
    try:
        for name, value in patches.items():
            setattr(L, name, value)
        with redirect_stdout(io.StringIO()):
            model, rows = L.fit(config, train, val)
    finally:
        for name, value in before.items():
            setattr(L, name, value)
    return model, rows, time.perf_counter() - began


def on_test(seeds):
    data, (images, labels) = L.load("train"), L.load("test")
    accuracies, seconds = [], []
    for seed in range(seeds):
        config = L.Config(seed=seed)
        model, rows, took = train(config, *L.split(*data, config.images, seed))
        accuracies.append(L.score(model.probabilities(images), labels)[1])
        seconds.append(took)
        print(f"seed {seed}  test {accuracies[-1]:.4f}  validation {rows[-1]['val_acc']:.4f}  {took:.1f} s", flush=True)
    spread = statistics.stdev(accuracies) if seeds > 1 else 0
    print(f"test accuracy {statistics.mean(accuracies):.4f} ± {spread:.4f} (mean ± standard deviation of {seeds} seeds), "
          f"{statistics.median(seconds):.0f} s a run (median)\n")


def variants():
    """(name, config, patches) of the default and of one change each."""
    default = L.Config()
    relu, no_norm = changed(nn.GELU, nn.ReLU), changed(nn.BatchNorm1d, nn.Identity)
    change = lambda **values: dataclasses.replace(default, **values)
    return [("default", default, {}),
            ("not shifted", change(shift=False), {}),
            ("shifted and mirrored", default, dict(Images=Mirrored)),
            ("no label smoothing", change(smoothing=0.0), {}),
            ("ReLU instead of GELU", default, dict(MLP=relu)),
            ("no batch norm", default, dict(MLP=no_norm)),
            ("dropout 0.2", change(dropout=0.2), {}),
            ("not shifted, no smoothing, ReLU", change(shift=False, smoothing=0.0), dict(MLP=relu))]


def tricks(seeds):
    images, labels = L.load("train")
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(99))
    parts = [(images[i], labels[i]) for i in (order[10_000:], order[:10_000])]
    base = None
    for name, config, patches in variants():
        runs = [train(dataclasses.replace(config, seed=seed), *parts, **patches) for seed in range(seeds)]
        accuracy, loss = (statistics.mean(L.score(m.probabilities(parts[1][0]), parts[1][1])[i] for m, *_ in runs) for i in (1, 0))
        base = base or accuracy
        print(f"{name:32} validation {accuracy:.4f} ({100 * (accuracy - base):+.2f} points)  loss {loss:.4f}  "
              f"{statistics.mean(took for *_, took in runs):.0f} s", flush=True)
    print()


def clothing(seeds):
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.truetype(get_data_path() + "/fonts/ttf/DejaVuSans.ttf", 220)
    config = L.Config()
    parts, (images, _) = L.split(*L.load("train"), config.images, 0), L.load("test")
    model, *_ = train(config, *parts)
    model.remember(*parts)
    drawings = []
    with tempfile.TemporaryDirectory() as folder:
        for character in "0123456789ABCDEFGHKMNPRSXagt&@?*★♥☎✈☺☂⚑":
            picture = Image.new("RGB", (300, 300), "white")
            ImageDraw.Draw(picture).text((60, 20), character, fill="black", font=font)
            picture.save(folder + "/a.png")
            drawings.append(L.read_picture(folder + "/a.png"))
    for name, x in (("test images", images), (f"{len(drawings)} letters and signs", torch.stack(drawings))):
        p, strangeness = model.probabilities(x), model.strangeness(x)
        print(f"{name:24} strangeness above 1: {(strangeness > 1).float().mean():.1%}   highest P below 0.5: "
              f"{(p.amax(1) < 0.5).float().mean():.1%}")


def main():
    tables = dict(test=on_test, tricks=tricks, clothing=clothing)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=", ".join(tables) + " (default: all)")
    parser.add_argument("--seeds", type=int, help="default: 3 for test, 1 for tricks")
    args = parser.parse_args()
    print(machine(L.pick_device().type) + "\n")
    for name in args.tables or tables:
        tables[name](args.seeds or (3 if name == "test" else 1))


if __name__ == "__main__":
    main()
