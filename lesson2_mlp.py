"""Lesson 2: a multilayer perceptron that knows ten kinds of clothing (Fashion-MNIST), and a command that uses it.

    python lesson2_mlp.py                               the whole story, about a minute on two CPU cores
    python lesson2_mlp.py predict shoe.jpg shirt.png    the three likeliest labels of pictures of your own
    python lesson2_mlp.py predict --show shoe.jpg       and what the network was given to see
    python lesson2_mlp.py --hidden 256 --epochs 5       any field of Config is a flag

You will see: what a DataLoader adds to a Dataset; a network overfitting; loss and accuracy falling and rising; a test
accuracy above 90 % (the best MLP in the data set's own table has 88.3 %, people 83.5 %). out/lesson2 then holds
model.safetensors, config.json, training.png (numbers: two .csv), confusion.png, mistakes.png. PASS/FAIL lines end it.
Left out on purpose: convolutions (92 to 97 %), and resuming a run (lesson 3): a minute can be repeated.
Sources: Xiao et al. 2017 (the data), Ioffe and Szegedy 2015 (batch norm), Szegedy et al. 2016 (label smoothing), Smith
and Topin 2018 (one-cycle schedule), Lee et al. 2018 (telling strangers by the distance of their features).
Letters for shapes: N images, B images in a batch, H hidden units; an image is 28x28, flattened 784; 10 classes.
"""
import argparse                         # --help shows the text above as it is
import dataclasses                      # the config, as JSON beside the weights
import gzip                             # the data files are compressed
import http.client                      # how a download may fail
import json                             # config.json, predict --json
import math                             # product of a shape, log
import pathlib                          # paths on every system
import shutil                           # how wide is the terminal?
import sys                              # is stdout a terminal?
import time                             # speed, time left
import urllib.request                   # the download
import zlib                             # the error of a damaged gzip file

import numpy as np                      # bytes and pictures to arrays
import torch                            # tensors, autograd
import torch.nn.functional as F         # cross_entropy, pad
from safetensors import SafetensorError # the error of a damaged weight file
from safetensors.torch import load_file, save           # weights as plain arrays: loading them runs no code
from torch import nn                    # layers
from torch.utils.data import DataLoader, Dataset        # samples, and batches of them

from lesson1_linreg import BadInput, Parser, cli, flag, given, new_figure, replacing, report, save_csv, save_figure

ROOT = pathlib.Path(__file__).resolve().parent
OUT = ROOT / "out" / "lesson2"

# ---- shared by lessons 2 to 6: device, progress ---------------------------------------------------

def pick_device(name="auto"):
    """'auto' is the best device present, cuda then mps then cpu; any other name must be one torch can use."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name) # whoever asks for "the" GPU, say for its random state, means this one
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {name} is not available here; leave it out, or try cpu") from None


class Progress:
    """One line, rewritten in place on a terminal, printed every few seconds in a log:
    `step  400/2000  loss 1.7312  val 1.8021  15.2k tok/s  0:42 left`."""

    def __init__(self, total, start=0, name="step", unit="tok", every=10.0):
        self.total, self.start, self.name, self.unit = total, start, name, unit
        self.tty = sys.stdout.isatty()
        self.every = 0.2 if self.tty else every
        self.began = self.shown = time.perf_counter()
        self.width = 0                  # of the line on the terminal, to blank it out

    def __call__(self, step, units, **values):
        """Step `step` (counted from 1) is done; `units` were processed since the start; values are printed by name."""
        now, last = time.perf_counter(), step >= self.total
        if now - self.shown < self.every and not last:
            return
        self.shown, elapsed = now, max(now - self.began, 1e-9)
        rate = units / elapsed
        left = elapsed / max(step - self.start, 1) * (self.total - step)
        text = "  ".join([f"{self.name} {step:>{len(str(self.total))}}/{self.total}"]
                         + [f"{k} {v:.4f}" for k, v in values.items() if v is not None]
                         + [f"{rate / 1000:.1f}k {self.unit}/s" if rate >= 1000 else f"{rate:.0f} {self.unit}/s",
                            f"{elapsed:.0f} s in all" if last else f"{int(left) // 60}:{int(left) % 60:02d} left"])
        if self.tty:                    # longer than the terminal, the line would wrap and could not be rewritten
            text = text[:shutil.get_terminal_size().columns - 1]
        print("\r" * self.tty + text.ljust(self.width), end="\n" if last or not self.tty else "", flush=True)
        self.width = len(text) if self.tty else 0


# ---- config ---------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    hidden: int = flag(512, "H, units of the first hidden layer; the second has half", 2, 65536)
    dropout: float = flag(0.0, "share of hidden units switched off in training; shifting makes it needless", 0, 0.95)
    shift: bool = flag(True, "move the training images by up to a pixel at random")
    smoothing: float = flag(0.05, "label smoothing: share of the target that all classes get alike", 0, 0.9)
    images: int = flag(55000, "training images to use, of 55,000; the other 5,000 are for validation", 100, 55000)
    batch_size: int = flag(500, "B, images per update", 2, 50000)
    epochs: int = flag(30, "passes over the training images", 1, 10000)
    lr: float = flag(4e-3, "highest learning rate of the one-cycle schedule", 1e-8, 10)
    weight_decay: float = flag(0.01, "AdamW's decay of the weights", 0, 10)
    seed: int = flag(0, "seed of the split, the weights, the order and the shifts", 0, 2**63 - 1)
    data: str = flag("", "folder of the four Fashion-MNIST files; empty: look for them, else download")
    device: str = flag("auto", "cuda, mps, cpu, or auto: the best there is")


# ---- data: four IDX files -------------------------------------------------------------------------

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FILES = {"train": ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"],
         "test": ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]}
LOCAL, DEBIAN = ROOT / "data" / "fashion-mnist", pathlib.Path("/usr/share/datasets/fashion-mnist")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


def read_idx(path):
    """The uint8 tensor in an IDX file, gzipped or not: bytes 0 0, a type code (8: uint8), the number of axes, each axis
    as a big-endian uint32, then the values row by row. Raises BadInput."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot read {path} ({e}); delete it and run again to fetch it anew") from None
    start = 4 + 4 * raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    if not 4 < start <= len(raw):
        raise BadInput(f"{path} is no IDX file of bytes: it begins with {raw[:4].hex(' ') or 'nothing'}, not 00 00 08; "
                       "if it was downloaded, delete it and run again")
    shape = [int.from_bytes(raw[i:i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise BadInput(f"{path} holds {len(raw) - start} values, but its header announces {shape}: fetch it anew")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def load(part, folder=""):
    """Images (N,28,28) and labels (N,), uint8, of part "train" or "test": from `folder` if given, else from the first
    to have them of our own folder, the Debian package's, and a download into our own. Raises BadInput."""
    def there(folder, name):            # compressed or not
        return next((p for p in (folder / name, folder / name[:-3]) if p.is_file()), None)

    folders = [pathlib.Path(folder)] if folder else [LOCAL, DEBIAN]
    folder = next((f for f in folders if all(there(f, name) for name in FILES[part])), folders[0])
    try:
        for name in FILES[part]:
            if not there(folder, name):
                if folder != LOCAL:
                    raise BadInput(f"{folder} has no {name}, nor that without .gz")
                download(URL + name, folder / name)
    except (OSError, http.client.HTTPException) as e:
        raise BadInput(f"no Fashion-MNIST: put {', '.join(FILES['train'] + FILES['test'])} into {LOCAL} (or a folder "
                       "named by --data), or install the Debian package dataset-fashion-mnist, or let this reach "
                       f"{URL} ({e})") from None
    images, labels = (read_idx(there(folder, name)) for name in FILES[part])
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or len(labels) < 10 or labels.max() > 9:
        raise BadInput(f"{folder}: shapes {list(images.shape)} and {list(labels.shape)} are no labelled 28x28 pictures")
    return images, labels


class SameHost(urllib.request.HTTPRedirectHandler):
    """A hub redirects to itself and then to a CDN: a token goes along to the same host only."""

    def redirect_request(self, request, *answer):
        new = super().redirect_request(request, *answer)
        if new and (new.type, new.host) == (request.type, request.host) and request.has_header("Authorization"):
            new.add_unredirected_header("Authorization", request.get_header("Authorization"))
        return new


def download(url, path, token=None):
    """Fetch url to path. What an interrupted call has left in path.part is continued, not fetched again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as f:
        f.truncate(max(0, f.tell() - 1))        # one byte again, so that there always is one to ask for
        had = f.seek(0, 2)
        request = urllib.request.Request(url, headers={"Range": f"bytes={had}-"} if had else {})
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urllib.request.build_opener(SameHost).open(request, timeout=30) as answer:
            if answer.status != 206:            # 206: the rest, as asked; 200: all, the server cannot continue
                f.truncate(had := 0)
            total = had + int(answer.headers["Content-Length"] or 0)
            progress, done = Progress(total // 1000, had // 1000, f"{path.name}  kB", "kB"), had
            while block := answer.read(1 << 16):
                done += f.write(block)
                progress(done // 1000, (done - had) // 1000)
    if done != total and answer.headers["Content-Length"]:  # without it the answer came in chunks, the last one marked
        raise OSError(f"{url} broke off after {done} of {total} bytes; run again to continue")
    part.replace(path)


class Images(Dataset):
    """A Dataset answers two questions: how many samples are there, and what is sample i? Here: image (28,28) and label.

    With a generator, the image is moved at random by -1, 0 or 1 pixel each way: still the same shirt, and nine images
    for one that was labelled. Mirroring, the other classic, hurts: in these data every shoe points to the left."""

    def __init__(self, images, labels, generator=None):
        padded = F.pad(images, (1, 1, 1, 1))                    # (N,28,28) -> (N,30,30)
        self.windows = padded.unfold(1, 28, 1).unfold(2, 28, 1)     # -> (N,3,3,28,28), a view: strides alone say where
        self.labels, self.generator = labels.long(), generator

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        images, labels = self.__getitems__([i])
        return images[0], labels[0]

    def __getitems__(self, indices):
        """A whole batch, (B,28,28) and (B,). A loader calls this, if there is one, instead of __getitem__ B times."""
        shape = 2, len(indices)
        dy, dx = torch.ones(shape, dtype=torch.long) if self.generator is None else torch.randint(
            3, shape, generator=self.generator)                                     # (2,B) -> (B,), (B,)
        return self.windows[indices, dy, dx], self.labels[indices]                  # -> (B,28,28), (B,)


def loader(dataset, size, shuffle=None):
    """What a DataLoader adds to a Dataset: batches, a new order every epoch (drawn from the generator `shuffle`), and,
    if asked for (num_workers), processes that prepare batches ahead; ours are ready too fast for that to pay."""
    stacked = lambda batch: batch       # by default collate_fn stacks B samples; __getitems__ has stacked them already
    return DataLoader(dataset, size, shuffle=shuffle is not None, generator=shuffle, collate_fn=stacked,
                      drop_last=len(dataset) % size == 1)       # batch norm needs two for a deviation


def split(images, labels, count, seed):
    """((images, labels) to train on, at most `count`; 5,000 others to validate on), drawn at random.

    All choices (how wide, how long) are made by the validation images. The test images are looked at once, at the end:
    what was chosen by them would be fitted to them, and their verdict no longer about new images."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = min(5000, len(labels) // 5)
    return [(images[i], labels[i]) for i in (order[held:held + count], order[:held])]


# ---- model ----------------------------------------------------------------------------------------

class MLP(nn.Module):
    """784 -> H -> H/2 -> 10 scores (logits). Without GELU, a smooth max(x, 0), between them two layers would be one.

    Beside its weights it has buffers: what `remember` saw in its last hidden layer, to tell strangers from clothing."""

    def __init__(self, hidden, dropout=0.0):
        super().__init__()
        sizes, layers = [784, hidden, hidden // 2], [nn.Flatten()]                  # (B,28,28) -> (B,784)
        for n, m in zip(sizes, sizes[1:]):      # batch norm: each unit to mean 0, deviation 1, then a scale and a bias
            layers += [nn.Linear(n, m, bias=False), nn.BatchNorm1d(m), nn.GELU(), nn.Dropout(dropout)]  # (B,n) -> (B,m)
        self.body, self.head = nn.Sequential(*layers), nn.Linear(sizes[-1], 10)     # (B,H/2) -> (B,10)
        self.register_buffer("means", torch.zeros(10, sizes[-1]))
        self.register_buffer("precision", torch.zeros(sizes[-1], sizes[-1]))
        self.register_buffer("far", torch.ones(()))

    def features(self, images):
        """uint8 (B,28,28) -> (B,H/2). Pixels get mean 0 and deviation 1 here, where no caller can forget it."""
        return self.body((images.to(self.far.device).float() / 255 - 0.286) / 0.353)

    def forward(self, images):
        return self.head(self.features(images))

    @torch.no_grad()
    def probabilities(self, images):
        """P(class) of uint8 images (N,28,28): (N,10), on the CPU. Softmax: e^logit over the sum of all e^logit."""
        self.eval()                     # dropout off; batch norm by the averages of training, not by this batch
        return torch.cat([self(batch).softmax(1).cpu() for batch in images.split(2000)])

    @torch.no_grad()
    def strangeness(self, images):
        """(N,): how far the features of images (N,28,28) are from those of the nearest class, 1 being far for clothing.

        P cannot tell: it sums to 1 for the photo of a cat too. In each direction the distance is measured by how far
        clothing scatters in that direction (Mahalanobis)."""
        self.eval()
        h = torch.cat([self.features(batch) for batch in images.split(2000)])                   # (N,H/2)
        squares = [((h - mean) @ self.precision * (h - mean)).sum(1) for mean in self.means]    # (N,H/2) -> (N,)
        return (torch.stack(squares).amin(0).clamp_min(0).sqrt() / self.far).cpu()              # (10,N) -> (N,)

    @torch.no_grad()
    def remember(self, train, val):
        """Set the buffers; `far` so that 2 % of the validation images have a strangeness above 1."""
        self.eval()
        images, labels = (t[:20000] for t in train)
        h = torch.cat([self.features(batch).cpu() for batch in images.split(2000)])             # (N,H/2)
        means = torch.stack([h[labels == c].mean(0) for c in range(10)])                        # (10,H/2)
        covariance = (h - means[labels.long()]).T.cov()         # (H/2,N) -> (H/2,H/2), the scatter within classes
        covariance += 1e-3 * covariance.diag().mean() * torch.eye(len(covariance))  # some units never fire: no scatter
        self.means.copy_(means)
        self.precision.copy_(torch.linalg.inv(covariance))
        self.far.fill_(1)
        self.far.copy_(self.strangeness(val[0]).quantile(0.98))


def score(p, labels):
    """(loss: mean -log P of the right class, in nats, as natural logarithms are; accuracy: share of images whose right
    class has the highest P)."""
    right = p[torch.arange(len(labels)), labels.long()]         # (N,10) -> (N,)
    return -right.clamp_min(1e-9).log().mean().item(), (p.argmax(1) == labels).float().mean().item()


# ---- training -------------------------------------------------------------------------------------

def fit(config, train, val):
    """Train on (images, labels) `train`, score `val` after every epoch. Returns the model and the rows of the curve."""
    torch.manual_seed(config.seed)      # the first weights and dropout draw from torch's own generator
    device, generator = pick_device(config.device), torch.Generator().manual_seed(config.seed)
    model = MLP(config.hidden, config.dropout).to(device)
    batches = loader(Images(*train, generator if config.shift else None), config.batch_size, generator)
    # AdamW keeps two running means for each weight: of its gradient (momentum) and of the gradient's square. A step is
    # the first divided by the root of the second, about lr whatever the gradient; weight decay pulls weights towards 0
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps)     # up to lr, then down to almost 0
    progress, rows, step = Progress(steps, unit="images"), [], 0
    for epoch in range(1, config.epochs + 1):
        model.train()                   # dropout on, batch norm by the batch
        total = 0.0
        for images, labels in batches:  # (B,28,28), (B,)
            # cross entropy: -log of the probability that the right class got, 0 if it is certain and right
            optimizer.zero_grad()                                               # 1. zero
            loss = F.cross_entropy(model(images), labels.to(device), label_smoothing=config.smoothing)  # 2. forward
            loss.backward()                                                     # 3. backward
            optimizer.step()                                                    # 4. update
            schedule.step()
            step, total = step + 1, total + loss.item()
            progress(step, step * config.batch_size, loss=loss.item(), val=rows[-1]["val_loss"] if rows else None)
        row = dict(epoch=epoch, loss=total / len(batches))
        for name, (x, y) in dict(train=train, val=val).items():     # both not shifted, without dropout and smoothing
            row[f"{name}_loss"], row[f"{name}_acc"] = score(model.probabilities(x[:5000]), y[:5000])
        rows.append(row)
        if not row["train_loss"] < 2 * math.log(10):                # guessing costs log(10); nan is not below anything
            raise BadInput(f"training diverged: loss {row['train_loss']:.3g} after epoch {epoch}, guessing has "
                           f"{math.log(10):.2f}; try a lower --lr (now {config.lr:g})")
    return model, rows


def save_model(folder, model, config, **more):
    """Weights as safetensors and, beside them as JSON, what they are."""
    with replacing(folder / "model.safetensors") as tmp:
        tmp.write_bytes(save(model.state_dict()))
    about = dict(dataclasses.asdict(config), classes=CLASSES, **more)
    with replacing(folder / "config.json") as tmp:
        tmp.write_text(json.dumps(about, indent=2), encoding="utf-8")


def load_model(folder):
    """The model that save_model wrote to `folder`, on the CPU. Raises BadInput."""
    weights, about = folder / "model.safetensors", folder / "config.json"
    try:
        model = MLP(json.loads(about.read_text(encoding="utf-8"))["hidden"])
        model.load_state_dict(load_file(weights))
        return model
    except FileNotFoundError:
        raise BadInput(f"no trained model: {weights} or config.json is missing; run lesson2_mlp.py without arguments "
                       "first") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        why = "the weights have other shapes than config.json says" if isinstance(e, RuntimeError) else str(e)[:80]
        raise BadInput(f"{weights} and config.json cannot be used ({why}); train again") from None


# ---- use ------------------------------------------------------------------------------------------

def read_picture(path):
    """A PNG or JPEG of any size and mode as (28,28) uint8, prepared as the authors of the data prepared theirs: grey,
    on white where transparent; negated if the corners are light, so that the item is light on black; background 0,
    brightest pixel 255; cut to the item, its longer side 28 pixels, centred (28x28 is taken to be cut already).
    Raises BadInput."""
    from PIL import Image, ImageOps     # comes with matplotlib; only pictures need it
    Image.MAX_IMAGE_PIXELS = None       # our own limit is below, and costs one line
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as picture:
            if picture.format == "PNG" and picture.n_frames > 1:
                raise ValueError("it is an animation; save one frame of it")
            if not (8 <= min(picture.size) and max(picture.size) <= 12000):
                raise ValueError(f"it has {picture.width}x{picture.height} pixels, 8 to 12000 a side can be used")
            picture = ImageOps.exif_transpose(picture)          # a phone only notes how it was held
            if picture.mode.startswith("I"):                    # 16 bits a pixel; convert("L") would clip them
                picture = picture.convert("I").point(lambda v: v * (1 / 257)).convert("L")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L")
            picture.thumbnail((1000, 1000))
    except (OSError, SyntaxError, ValueError) as e:             # Pillow says SyntaxError to a broken PNG
        why = "it is no PNG or JPEG" if "cannot identify" in str(e) else getattr(e, "strerror", None) or e
        raise BadInput(f"cannot use {path}: {why}") from None
    grey = np.asarray(picture, np.float32)
    k = max(1, min(grey.shape) // 28)
    corners = np.median([grey[:k, :k], grey[:k, -k:], grey[-k:, :k], grey[-k:, -k:]])
    grey = (corners - grey if corners > 127 else grey - corners).clip(0)
    rows, columns = ((grey > 13).mean(axis=a).nonzero()[0] for a in (1, 0))         # 5 % above the background
    if not len(rows):
        raise BadInput(f"cannot use {path}: it is blank, nothing stands out from the background")
    if grey.shape != (28, 28):
        item = Image.fromarray(grey[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])
        scale = 28 / max(item.size)
        item = np.asarray(item.resize([max(1, round(n * scale)) for n in item.size],
                                      Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC))
        before = [(29 - n) // 2 for n in item.shape]
        grey = np.pad(item, [(b, 28 - n - b) for b, n in zip(before, item.shape)])
    return torch.from_numpy((grey.clip(0) * 255 / grey.max()).round().astype(np.uint8))


def predict(args):
    """Print the three likeliest labels of every picture. Returns the exit status: 2 if any could not be used."""
    model, answers, status = load_model(pathlib.Path(args.model)), [], 0
    for path in args.pictures:
        try:
            image = read_picture(path)
        except BadInput as e:           # the others still get their answer
            print(f"lesson2_mlp.py: {e}", file=sys.stderr)
            status = 2
            continue
        p, strangeness = model.probabilities(image[None])[0], model.strangeness(image[None])[0]     # (10,), ()
        top = [dict(label=CLASSES[i], probability=round(p[i].item(), 4)) for i in p.argsort(descending=True)[:3]]
        answers.append(dict(file=path, labels=top, strangeness=round(strangeness.item(), 2),
                            confident=bool(strangeness <= 1 and top[0]["probability"] >= 0.5)))
        if args.show:
            shades = [[" .:-=+*#%@"[v * 10 // 256] * 2 for v in row] for row in image.tolist()]
            print("\n".join(map("".join, shades)), file=sys.stderr if args.json else sys.stdout)
        if not args.json:
            print(f"{path}: " + ", ".join(f"{t['label']} {t['probability']:.1%}" for t in top)
                  + ("" if answers[-1]["confident"] else "  (low confidence: " + (
                      f"{strangeness:.1f} times as far from the training images as 98 % of clothing; perhaps none)"
                      if strangeness > 1 else "no label has half of the probability)")))
    if args.json:
        print(json.dumps(answers, indent=2, ensure_ascii=False))
    return status


# ---- plots ----------------------------------------------------------------------------------------

def plot_curves(path, rows, small):
    """Loss and accuracy of the run by epoch, and the loss of the run that overfits."""
    figure, axes = new_figure(1, 3, (16, 4))
    worse = min(small, key=lambda r: r["val_loss"])["epoch"] + 1
    for ax, data, name, unit, title in [
            (axes[0], rows, "loss", "loss, nats per image", "The losses fall together"),
            (axes[1], rows, "acc", "accuracy", f"{rows[-1]['val_acc']:.1%} of validation images are right"),
            (axes[2], small, "loss", "loss, nats per image", f"5,000 images: overfitting from epoch {worse} on")]:
        for part, style, label in (("train", "k--", "training"), ("val", "k-", "validation")):
            ax.plot([r["epoch"] for r in data], [r[f"{part}_{name}"] for r in data], style, label=label)
        if ax is axes[0]:               # its own scale of difficulty: shifted images, smoothed labels
            ax.plot([r["epoch"] for r in data], [r["loss"] for r in data], "k:", label="training, as minimised")
        ax.set(title=title, xlabel="epoch", ylabel=unit)
        ax.legend()
    save_figure(path, figure)


def plot_confusion(path, matrix):
    """matrix (10,10): how many test images of class [row] were called [column]."""
    wrong = matrix - matrix.diag().diag()
    row, column = divmod(wrong.argmax().item(), 10)
    figure, ax = new_figure(size=(7, 6))
    ax.imshow(wrong, cmap="Greys", vmax=2 * wrong.max())        # errors only: the diagonal would outshine them
    for i, j in np.ndindex(10, 10):
        ax.text(j, i, matrix[i, j].item(), ha="center", va="center", size=8)
    ax.set(title=f"{CLASSES[row]} called {CLASSES[column]} is the most frequent error", xlabel="predicted",
           ylabel="true", xticks=range(10), yticks=range(10), yticklabels=CLASSES)
    ax.set_xticklabels(CLASSES, rotation=45, ha="right")
    save_figure(path, figure)


def plot_mistakes(path, images, labels, p):
    """The 24 test images that the network was most certainly wrong about."""
    certainty = p.amax(1) * (p.argmax(1) != labels)             # (N,10) -> (N,)
    figure, axes = new_figure(3, 8, (15, 7))
    for ax, i in zip(axes.flat, certainty.argsort(descending=True).tolist()):
        ax.imshow(255 - images[i], cmap="gray")
        ax.set_title(f"{CLASSES[labels[i]]}, called\n{CLASSES[p[i].argmax()]} ({p[i].max():.0%})", size=9)
        ax.axis("off")
    figure.suptitle("The most certain mistakes: many a label is debatable")
    save_figure(path, figure)


# ---- story ----------------------------------------------------------------------------------------

def show_loader(images, labels):
    """Images per second, by a Dataset that the loader has to ask for each image and by one it can ask for a batch."""
    class OneByOne(Images):
        __getitems__ = None
        __getitem__ = lambda self, i: (self.windows[i, 1, 1], self.labels[i])

    for name, batches in (("__getitem__", DataLoader(OneByOne(images, labels), 500)),
                          ("__getitems__", loader(Images(images, labels), 500))):
        began = time.perf_counter()
        x, y = list(batches)[-1]
        speed = len(labels) / (time.perf_counter() - began)
        print(f"batches {tuple(x.shape)} {tuple(y.shape)} by {name:12} {speed:10,.0f} images/s")
    print("Read: the batches are the same; many small calls cost more than one large one.\n")


def smooth(losses):
    """Is the curve smooth? No epoch may raise the loss by more than 1 %, and it has to fall by a quarter in all."""
    rise = max([b / a - 1 for a, b in zip(losses, losses[1:])], default=0.0)
    return (rise <= 0.01 and losses[-1] <= losses[0] * 0.75,
            f"{losses[0]:.3f} -> {losses[-1]:.3f} (a quarter less wanted), top rise {max(rise, 0):.1%} (1 % allowed)")


def story(config):
    """Overfit, train, test, save, draw. Returns the exit status."""
    train, val = split(*load("train", config.data), config.images, config.seed)
    print(f"{len(train[1])} images to train on, {len(val[1])} to validate on\n")
    show_loader(train[0][:5000], train[1][:5000])
    print("first too little data: 5,000 images, not shifted, no dropout, no label smoothing")
    bare = dataclasses.replace(config, shift=False, dropout=0.0, smoothing=0.0, epochs=20)
    _, small = fit(bare, [t[:5000] for t in train], val)
    best, last = min(small, key=lambda r: r["val_loss"]), small[-1]
    train_losses, val_losses = (f"{best[k]:.3f} -> {last[k]:.3f}" for k in ("train_loss", "val_loss"))
    print(f"Read: after epoch {best['epoch']} it overfits, learns its images by heart and no more: training loss\n"
          f"{train_losses}, validation loss {val_losses}.\n")
    print(f"then all of it, for {config.epochs} epochs")
    model, rows = fit(config, train, val)
    model.remember(train, val)
    images, labels = load("test", config.data)                  # the only time
    p = model.probabilities(images)
    loss, accuracy = score(p, labels)
    save_model(OUT, model, config, val_accuracy=rows[-1]["val_acc"], test_accuracy=accuracy)
    save_csv(OUT / "training.csv", rows)
    save_csv(OUT / "overfitting.csv", small)
    plot_curves(OUT / "training.png", rows, small)
    plot_confusion(OUT / "confusion.png", torch.bincount(labels * 10 + p.argmax(1), minlength=100).view(10, 10))
    plot_mistakes(OUT / "mistakes.png", images, labels, p)
    print(f"\nwrote {', '.join(sorted(f.name for f in OUT.iterdir()))} into {OUT}")
    same = torch.equal(load_model(OUT).probabilities(images).argmax(1), p.argmax(1))
    return report([
        ("smooth", *smooth([r["loss"] for r in rows])),
        ("accuracy", accuracy >= 0.9, f"{accuracy:.2%} of {len(labels)} test images (90 % wanted), loss {loss:.3f}"),
        ("overfitting", last["val_loss"] > 1.05 * best["val_loss"], f"5,000 images: validation loss {val_losses}"),
        ("saved", same, "the model, loaded again, gives the same labels")])


# ---- main -----------------------------------------------------------------------------------------

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_config(Config)
    use = parser.add_subparsers(dest="command").add_parser("predict", help="label pictures with the trained network")
    use.add_argument("pictures", nargs="+", metavar="IMAGE", help="PNG or JPEG files")
    use.add_argument("--json", action="store_true", help="print JSON, for scripts")
    use.add_argument("--show", action="store_true", help="print each picture as the network sees it")
    use.add_argument("--model", default=str(OUT), help="folder of a trained model (default: %(default)s)")
    args = parser.parse_args()
    return predict(args) if args.command else story(Config(**given(args, Config)))


if __name__ == "__main__":
    cli(main)


# ---- exercises ------------------------------------------------------------------------------------
# 1. Train with --smoothing 0 and with 0.2. What becomes of the accuracy, and of the percentages that predict prints?
# 2. Photograph a shoe and run predict --show. What must change in the picture until it is recognized?
# 3. Let Images also blank a random square of each training image. Over three seeds, does the gain exceed their spread?
# 4. Replace batch norm by layer norm. Which line of the training loop is now without effect?
