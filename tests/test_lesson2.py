"""Lesson 2: acceptance criteria, then equality with independent implementations, then the program, then bad input.

Needs the Fashion-MNIST files (Debian package dataset-fashion-mnist, or those that the lesson downloads)."""
import contextlib
import gzip
import http.server
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import lesson2_mlp as L
from lesson1_linreg import BadInput
from lesson2_mlp import Config, Images, MLP

SMALL = Config(hidden=128, epochs=5, images=10_000, seed=1)


@pytest.fixture(scope="module")
def data():
    return L.split(*L.load("train"), SMALL.images, SMALL.seed)


@pytest.fixture(scope="module")
def trained(data):
    """(model, rows of its curve) of a small run."""
    model, rows = L.fit(SMALL, *data)
    model.remember(*data)
    return model, rows


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    L.save_model(folder, trained[0], SMALL, test_accuracy=0.0)
    return folder


@pytest.fixture(scope="module")
def test_images():
    images, labels = L.load("test")
    return images[:200], labels[:200]


# ---- acceptance criteria --------------------------------------------------------------------------

def test_an_mlp_in_torch_nn_classifies_fashion_mnist(trained, test_images):
    model, _ = trained
    kinds = {type(m) for m in model.modules()}
    assert torch.nn.Linear in kinds and not any("Conv" in k.__name__ for k in kinds)
    assert L.score(model.probabilities(test_images[0]), test_images[1])[1] > 0.8


def test_the_loss_falls_smoothly_and_is_drawn(trained, tmp_path):
    _, rows = trained
    holds, words = L.smooth([r["loss"] for r in rows])
    assert holds, words
    L.plot_curves(tmp_path / "curve.png", rows, rows)
    assert Image.open(tmp_path / "curve.png").size[0] > 1000


@pytest.mark.parametrize("losses", [[1, 0.5, 0.51, 0.3], [1, 0.9, 0.8], [1, 1.2, 0.1], [1, float("nan"), 0.1]])
def test_the_rule_of_smoothness_can_fail(losses):
    assert not L.smooth(losses)[0]


def test_the_prediction_command_prints_the_label(run, saved, trained, test_images, tmp_path):
    Image.fromarray(test_images[0][1].numpy()).save(tmp_path / "item.png")
    expected = L.CLASSES[trained[0].probabilities(test_images[0][1:2]).argmax()]
    printed = run("lesson2_mlp.py", "predict", "--model", saved, "item.png").stdout
    assert re.fullmatch(rf"item\.png: {expected} \d+\.\d%, [\w/ -]+ \d+\.\d%, [\w/ -]+ \d+\.\d%(  \(low .*\))?\n", printed)


# ---- the parts against independent implementations ------------------------------------------------

def write_idx(path, array, magic=None, dims=None, data=None):
    dims = array.shape if dims is None else dims
    raw = (struct.pack(">BBBB", 0, 0, 8, len(dims)) if magic is None else magic) + struct.pack(f">{len(dims)}I", *dims)
    raw += array.tobytes() if data is None else data
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("name", ["a.gz", "a"])
@pytest.mark.parametrize("shape", [(3, 28, 28), (7,), (2, 3, 4, 5)])
def test_idx_parser(tmp_path, name, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / name, array)
    assert np.array_equal(L.read_idx(tmp_path / name).numpy(), array)


@pytest.mark.parametrize("fault", [dict(magic=b"\0\0\x09\3"), dict(magic=b"\0\1\x08\3"), dict(magic=b"\0\0\x08\0"), dict(magic=b"\0\0\x08\xff"),
                                   dict(dims=(4, 28, 28)), dict(dims=(2, 28, 28)), dict(dims=(2**31, 2**31, 4)), dict(data=b"")])
@pytest.mark.parametrize("name", ["a.gz", "a"])
def test_idx_header_faults(tmp_path, name, fault):
    write_idx(tmp_path / name, np.zeros((3, 28, 28), np.uint8), **fault)
    with pytest.raises(BadInput, match="no IDX file|its header announces"):
        L.read_idx(tmp_path / name)


@pytest.mark.parametrize("raw", [b"", b"\0", b"\0\0\x08", b"\0\0\x08\3\0\0", b"<html>no</html>", gzip.compress(bytes(9999))[:-9], b"\x1f\x8b\x08"])
def test_idx_that_is_none(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(BadInput):
        L.read_idx(tmp_path / "a")


def test_real_data(data):
    images, labels = L.load("train")
    assert images.shape == (60_000, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [6000] * 10
    pixels = images.float() / 255
    assert pixels.mean().item() == pytest.approx(0.286, abs=1e-3) and pixels.std().item() == pytest.approx(0.353, abs=1e-3)


def test_split_is_disjoint_and_seeded():
    images, labels = torch.arange(1000).view(1000, 1, 1), torch.arange(1000)
    (a, _), (b, _) = L.split(images, labels, 10_000, 0)
    assert sorted(torch.cat([a, b]).flatten().tolist()) == list(range(1000)) and len(b) == 200
    assert torch.equal(L.split(images, labels, 50, 0)[1][0], b) and not torch.equal(L.split(images, labels, 50, 1)[1][0], b)


def test_dataset_gives_the_images(test_images):
    images, labels = test_images
    data = Images(images, labels)
    assert len(data) == 200 and torch.equal(data[7][0], images[7]) and data[7][1] == labels[7]
    assert torch.equal(data.__getitems__([3, 5])[0], images[[3, 5]])


def test_augmentation_gives_exactly_the_promised_variants(test_images):
    image = test_images[0][0]
    padded = np.pad(image.numpy(), 1)
    moved = [padded[y:y + 28, x:x + 28] for y in range(3) for x in range(3)]
    promised = {m.tobytes() for m in moved}
    drawn, _ = Images(image[None], test_images[1][:1], torch.Generator().manual_seed(0)).__getitems__([0] * 1000)
    assert {v.numpy().tobytes() for v in drawn} == promised and len(promised) == 9


def test_loader_shows_every_sample_once_an_epoch_in_a_new_order():
    data = Images(torch.zeros(103, 28, 28, dtype=torch.uint8), torch.arange(103))
    batches = L.loader(data, 10, torch.Generator().manual_seed(0))
    first, second = ([y.tolist() for _, y in batches] for _ in range(2))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(103)) and first != second
    assert first == [y.tolist() for _, y in L.loader(data, 10, torch.Generator().manual_seed(0))]


def test_the_network_equals_numpy(trained, test_images):
    model, images = trained[0].eval(), test_images[0][:20]
    w = {k: v.numpy() for k, v in model.state_dict().items()}
    h = (images.numpy().reshape(20, 784) / 255 - 0.286) / 0.353
    for linear, norm in (("body.1", "body.2"), ("body.5", "body.6")):
        h = h @ w[f"{linear}.weight"].T
        h = (h - w[f"{norm}.running_mean"]) / np.sqrt(w[f"{norm}.running_var"] + 1e-5) * w[f"{norm}.weight"] + w[f"{norm}.bias"]
        h = h * (1 + np.array([[math.erf(v / math.sqrt(2)) for v in row] for row in h])) / 2      # GELU
    logits = h @ w["head.weight"].T + w["head.bias"]
    np.testing.assert_allclose(model(images).detach().numpy(), logits, atol=1e-3)
    distances = [math.sqrt(min(d @ w["precision"] @ d for d in row - w["means"])) for row in h]
    np.testing.assert_allclose(model.strangeness(images).numpy(), np.array(distances) / w["far"], rtol=1e-2, atol=1e-3)


def test_score_equals_torch():
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    loss, accuracy = L.score(logits.softmax(1), labels)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(sum(a == b for a, b in zip(logits.argmax(1).tolist(), labels.tolist())) / 50)


def test_two_percent_of_validation_is_strange(trained, data):
    assert (trained[0].strangeness(data[1][0]) > 1).float().mean().item() == pytest.approx(0.02, abs=0.002)


def test_the_network_can_overfit_64_images(data):
    few = tuple(t[:64] for t in data[0])
    config = Config(hidden=128, shift=False, smoothing=0.0, batch_size=64, epochs=60, lr=1e-2)
    model, rows = L.fit(config, few, tuple(t[:100] for t in data[1]))
    assert rows[-1]["train_acc"] == 1 and rows[-1]["train_loss"] < 0.02


def test_a_run_repeats_exactly(data):
    config = Config(hidden=32, epochs=1, images=2000)
    runs = [L.fit(config, tuple(t[:2000] for t in data[0]), data[1]) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].state_dict().values(), runs[1][0].state_dict().values()))


def test_saved_model_is_the_model(saved, trained, test_images):
    assert torch.equal(L.load_model(saved).probabilities(test_images[0]), trained[0].probabilities(test_images[0]))
    assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["classes"] == L.CLASSES


# ---- progress -------------------------------------------------------------------------------------

@pytest.mark.parametrize("tty", [True, False])
def test_progress_on_a_terminal_and_in_a_log(tty, monkeypatch, capsys):
    clock = iter(range(1000))           # a second per look at the clock
    monkeypatch.setattr(L.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.setattr(L.shutil, "get_terminal_size", lambda: os.terminal_size((50, 20)))
    progress = L.Progress(30, unit="images")
    for step in range(1, 31):
        progress(step, step * 5000, loss=1 / step, val=None if step < 30 else 0.5)
    out = capsys.readouterr().out
    assert out.endswith("\n")
    if tty:                             # one line, rewritten, never longer than the terminal, the end of a longer one blanked
        states = out[:-1].split("\r")[1:]
        assert "\n" not in out[:-1] and len(states) == 30 and max(map(len, states)) <= 49
        assert all(len(later) >= len(earlier.rstrip()) for earlier, later in zip(states, states[1:]))
    else:
        assert out.splitlines() == ["step 10/30  loss 0.1000  5.0k images/s  0:20 left", "step 20/30  loss 0.0500  5.0k images/s  0:10 left",
                                    "step 30/30  loss 0.0333  val 0.5000  5.0k images/s  30 s in all"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_real_terminal_shows_one_line(tmp_path):
    import pty
    near, far = pty.openpty()
    code = "import lesson2_mlp as L, time\np = L.Progress(50)\nfor i in range(50): time.sleep(0.02); p(i + 1, i)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=far, cwd=L.ROOT) as p:
        os.close(far)
        out = b""
        with contextlib.suppress(OSError):      # Linux reports the end of the other side as an error
            while piece := os.read(near, 1000):
                out += piece
    os.close(near)
    assert out.count(b"\n") == 1 and out.count(b"\r") >= 4 and b"50/50" in out


# ---- pictures of every kind -----------------------------------------------------------------------

def negative(picture):
    return picture.point(lambda v: 255 - v)


def transparent(picture):
    """A black silhouette whose opacity is the picture: on white it is the negative."""
    out = Image.new("LA", picture.size)
    out.putalpha(picture)
    return out


@pytest.mark.parametrize("change", [
    lambda p: p, negative, lambda p: p.convert("RGB"), lambda p: p.convert("P"), lambda p: negative(p).convert("RGBA"), transparent,
    lambda p: Image.fromarray(np.asarray(p).astype(np.uint16) * 257), lambda p: transparent(p).convert("RGBA")],
    ids=["grey", "negative", "RGB", "palette", "RGBA", "transparent LA", "16 bit", "transparent RGBA"])
def test_a_28x28_png_of_any_mode_is_seen_as_the_raw_array(change, test_images, tmp_path):
    for image in test_images[0][:20]:
        change(Image.fromarray(image.numpy())).save(tmp_path / "a.png")
        seen = L.read_picture(tmp_path / "a.png")
        assert seen.shape == (28, 28) and (seen.int() - image.int()).abs().max() <= 1


def on_larger_canvas(picture):
    canvas = Image.new("L", (500, 300))
    canvas.paste(picture.resize((200, 200), Image.Resampling.BICUBIC), (230, 40))
    return negative(canvas).convert("RGB")


@pytest.mark.parametrize("name,change", [
    ("a.png", lambda p: p.resize((280, 280), Image.Resampling.NEAREST)),
    ("a.png", lambda p: negative(p.resize((300, 300), Image.Resampling.BICUBIC)).convert("RGBA")),
    ("a.png", lambda p: p.resize((40, 40), Image.Resampling.BICUBIC)),
    ("a.png", on_larger_canvas),
    ("a.jpg", on_larger_canvas),
    ("a.jpg", lambda p: p),
    ("a.jpg", lambda p: p.resize((200, 200), Image.Resampling.BICUBIC).convert("CMYK")),
    ("a.jpeg", lambda p: negative(p.resize((1500, 1500), Image.Resampling.BICUBIC)))],
    ids=["10 times", "300 negative RGBA", "40", "canvas", "canvas jpeg", "28 jpeg", "CMYK jpeg", "1500 negative jpeg"])
def test_other_sizes_modes_and_negatives_get_the_label_of_the_raw_array(name, change, trained, test_images, tmp_path):
    seen = []
    for image in test_images[0][:100]:
        change(Image.fromarray(image.numpy())).save(tmp_path / name)
        seen.append(L.read_picture(tmp_path / name))
    same = trained[0].probabilities(torch.stack(seen)).argmax(1) == trained[0].probabilities(test_images[0][:100]).argmax(1)
    assert same.float().mean() >= 0.94


def test_a_phone_held_upright(test_images, tmp_path):
    picture = Image.fromarray(test_images[0][0].numpy()).resize((280, 280), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6                    # "turn by 90 degrees to show"
    picture.save(tmp_path / "straight.png")
    picture.rotate(90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(L.read_picture(tmp_path / "turned.png"), L.read_picture(tmp_path / "straight.png"))


def test_drawings_that_are_no_clothing_are_called_strange(trained, tmp_path):
    from matplotlib import get_data_path
    from PIL import ImageDraw, ImageFont
    font = ImageFont.truetype(get_data_path() + "/fonts/ttf/DejaVuSans.ttf", 220)
    strange = []
    for character in "0123456789@&?*AKRSX":
        picture = Image.new("RGB", (300, 300), "white")
        ImageDraw.Draw(picture).text((60, 20), character, fill="black", font=font)
        picture.save(tmp_path / "a.png")
        strange.append(trained[0].strangeness(L.read_picture(tmp_path / "a.png")[None]).item() > 1)
    assert np.mean(strange) >= 0.7      # and, by the test above, 2 % of clothing


# ---- download -------------------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


class Server(http.server.BaseHTTPRequestHandler):
    ranges, breaks, asked = True, None, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append(start)
        start = start if self.ranges else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:self.breaks])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    class Own(Server):
        asked = []
    with http.server.HTTPServer(("127.0.0.1", 0), Own) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield Own, f"http://127.0.0.1:{s.server_port}/f"
        s.shutdown()


def test_an_interrupted_download_is_continued(server, tmp_path):
    handler, url = server
    handler.breaks = 100_000
    with pytest.raises(OSError):
        L.download(url, tmp_path / "f")
    assert not (tmp_path / "f").exists() and (tmp_path / "f.part").stat().st_size == 100_000
    handler.breaks = None
    L.download(url, tmp_path / "f")
    assert handler.asked == [0, 99_999] and (tmp_path / "f").read_bytes() == CONTENT and not (tmp_path / "f.part").exists()


def test_a_server_that_cannot_continue(server, tmp_path):
    handler, url = server
    handler.ranges = False
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    L.download(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_download_stopped_just_before_its_end(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT)
    L.download(server[1], tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_no_data_anywhere_names_all_three_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(L, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(L, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(L, "URL", "http://127.0.0.1:9/")
    with pytest.raises(BadInput) as e:
        L.load("train")
    for part in ("local", "dataset-fashion-mnist", "train-images-idx3-ubyte.gz", "reach http", "--data"):
        assert part in str(e.value)


def test_the_local_folder_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(L, "LOCAL", tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.full((10, 28, 28), 9, np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(10, dtype=np.uint8))
    images, labels = L.load("test")
    assert images.shape == (10, 28, 28) and (images == 9).all() and labels.tolist() == list(range(10))


# ---- the program ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_story(tmp_path):
    for name in ("lesson1_linreg.py", "lesson2_mlp.py"):        # a copy, so that its out/ lands here
        (tmp_path / name).write_bytes((L.ROOT / name).read_bytes())
    call = lambda *args: subprocess.run([sys.executable, "lesson2_mlp.py", *args], cwd=tmp_path, capture_output=True, text=True,
                                        encoding="utf-8", timeout=300)
    folder = L.LOCAL if (L.LOCAL / "t10k-labels-idx1-ubyte.gz").exists() else L.DEBIAN
    done = call("--images", "5000", "--hidden", "256", "--epochs", "8", "--data", str(folder))
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr      # 5,000 images are too few for 90 %
    assert re.findall(r"^(PASS|FAIL)  (\w+):", done.stdout, re.M) == [
        ("PASS", "smooth"), ("FAIL", "accuracy"), ("PASS", "overfitting"), ("PASS", "saved")], done.stdout
    assert re.search(r"step +\d+/\d+  loss \d\.\d{4}  val \d\.\d{4}  [\d.]+k? images/s  ", done.stdout)
    out = tmp_path / "out" / "lesson2"
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "training.csv", "overfitting.csv", "training.png",
                                               "confusion.png", "mistakes.png"}
    assert len((out / "training.csv").read_text(encoding="utf-8").splitlines()) == 9
    assert call("predict", "out/lesson2/mistakes.png").returncode == 0      # by the default --model


def test_predict_several_as_json(run, saved, test_images, tmp_path):
    for i in range(3):
        Image.fromarray(test_images[0][i].numpy()).save(tmp_path / f"{i}.png")
    answers = json.loads(run("lesson2_mlp.py", "predict", "--json", "--model", saved, "0.png", "1.png", "2.png").stdout)
    assert [a["file"] for a in answers] == ["0.png", "1.png", "2.png"]
    for a in answers:
        p = [label["probability"] for label in a["labels"]]
        assert len(p) == 3 and p == sorted(p, reverse=True) and 0 < sum(p) <= 1.001 and isinstance(a["confident"], bool)


def test_predict_says_low_confidence_and_shows(run, saved, tmp_path):
    picture = np.zeros((200, 200), np.uint8)
    picture[:20], picture[-20:], picture[:, :20], picture[:, -20:] = 255, 255, 255, 255     # a frame
    Image.fromarray(np.pad(picture, 20)).save(tmp_path / "frame.png")
    printed = run("lesson2_mlp.py", "predict", "--show", "--model", saved, "frame.png").stdout
    assert "low confidence" in printed.splitlines()[28]
    assert [len(line) for line in printed.splitlines()[:28]] == [56] * 28


def test_one_bad_picture_does_not_cost_the_others(run, saved, test_images, tmp_path):
    Image.fromarray(test_images[0][0].numpy()).save(tmp_path / "good.png")
    done = run("lesson2_mlp.py", "predict", "--model", saved, "bad.png", "good.png", code=2)
    assert done.stdout.startswith("good.png: ") and "bad.png" in done.stderr


# ---- bad input ------------------------------------------------------------------------------------

def make_bad(kind, folder):
    path = folder / "bad.png"
    if kind == "text":
        path.write_text("not a picture", encoding="utf-8")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "directory":
        path.mkdir()
    elif kind == "one pixel":
        Image.new("L", (1, 1)).save(path)
    elif kind == "20,000 pixels":
        Image.new("1", (20_000, 20_000)).save(path)
    elif kind == "long":
        Image.new("L", (20_000, 10)).save(path)
    elif kind == "blank":
        Image.new("L", (100, 100), 200).save(path)
    elif kind == "gif":
        Image.new("L", (50, 50)).save(path, "GIF", save_all=True, append_images=[Image.new("L", (50, 50), 255)])
    elif kind == "animated png":
        Image.new("L", (50, 50)).save(path, save_all=True, append_images=[Image.new("L", (50, 50), 255)])
    elif kind in ("truncated", "damaged"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)).save(path)
        raw = path.read_bytes()
        path.write_bytes(raw[:len(raw) // 2] if kind == "truncated" else raw[:60] + b"\xff" * 60 + raw[120:])
    return path


KINDS = {"text": "no PNG or JPEG", "empty": "no PNG or JPEG", "directory": "directory", "one pixel": "1x1", "20,000 pixels": "20000x20000",
         "long": "20000x10", "blank": "blank", "gif": "no PNG or JPEG", "animated png": "animation", "truncated": "truncated", "damaged": "bad.png: .",
         "missing": "No such file"}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_pictures(kind, tmp_path):
    with pytest.raises(BadInput, match=KINDS[kind]) as e:
        L.read_picture(make_bad(kind, tmp_path))
    assert "bad.png" in str(e.value) and "\n" not in str(e.value)


def test_bad_picture_on_the_command_line(run, saved, tmp_path):
    make_bad("truncated", tmp_path)
    assert "bad.png" in run("lesson2_mlp.py", "predict", "--model", saved, "bad.png", code=2).stderr


@pytest.mark.parametrize("fault", ["missing", "truncated", "magic", "labels", "nothing"])
def test_bad_data_on_the_command_line(run, fault, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    images, labels = folder / L.FILES["train"][0], folder / L.FILES["train"][1]
    if fault != "nothing":
        write_idx(images, np.zeros((20, 28, 28), np.uint8))
        write_idx(labels, np.full(20, 10 if fault == "labels" else 1, np.uint8))
    if fault == "missing":
        labels.unlink()
    elif fault == "truncated":
        images.write_bytes(images.read_bytes()[:-20])
    elif fault == "magic":
        write_idx(images, np.zeros((20, 28, 28), np.uint8), magic=b"\x89PNG")
    assert str(folder) in run("lesson2_mlp.py", "--data", folder, code=2).stderr


def test_weights_of_another_shape(saved, tmp_path):
    L.save_model(tmp_path, MLP(64), SMALL)          # SMALL says 128
    with pytest.raises(BadInput, match="other shapes"):
        L.load_model(tmp_path)


@pytest.mark.parametrize("file,content", [("model.safetensors", b"junk"), ("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"\xff"),
                                          ("model.safetensors", None), ("config.json", None)])
def test_damaged_or_missing_model(saved, tmp_path, file, content):
    for p in saved.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(BadInput, match="train again|no trained model"):
        L.load_model(tmp_path)


def test_no_model_on_the_command_line(run):
    assert "no trained model" in run("lesson2_mlp.py", "predict", "--model", "nowhere", "a.png", code=2).stderr


def test_a_last_batch_of_one_image(data):
    L.fit(Config(hidden=32, epochs=1, batch_size=50), tuple(t[:101] for t in data[0]), data[1])


def test_a_diverging_run_is_explained(data):
    with pytest.raises(BadInput, match="lower --lr"):
        L.fit(Config(hidden=32, epochs=2, images=500, lr=10.0, weight_decay=10.0), tuple(t[:500] * 1 for t in data[0]), data[1])
