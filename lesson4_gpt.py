"""Lesson 4: a GPT written out in full, proven to look only backwards, and trained on Shakespeare.

    python lesson4_gpt.py                       the whole story, about three minutes on two CPU cores
    python lesson4_gpt.py mask                  that part alone; so do overfit and positions
    python lesson4_gpt.py train --text my.txt   your own text; --resume goes on, --tokens bpe, --help lists all flags
    python lesson4_gpt.py sample --prompt "The King"
    torchrun --nproc_per_node=2 lesson4_gpt.py train    several processes or machines, the same total batch

What you will see: attention matrices, verse, PASS lines; mask.png, attention.png, loss.png and loss.csv in out/lesson4.
Left out on purpose: fused attention (the readable path is the one that runs), biases, gradient clipping, sharding.
Sources: Vaswani et al. 2017 (attention), Su et al. 2021 (rotary), Zhang & Sennrich 2019 (RMSNorm), Henry et al. 2020
(QK-norm), So et al. 2021 (ReLU squared), Peng et al. 2023 (token shift), Jordan 2024 (Muon), Sennrich 2016 (BPE).

Shapes: B sentences in a batch, T tokens in a sentence (Tq queries, Tk keys), C channels, H heads, D = C / H channels of
a head (the paper's d_k), V tokens in the vocabulary.
"""
import argparse                         # SUPPRESS: flags not given stay out of the way
import collections                      # Counter of words and pairs, for BPE
import contextlib                       # "no autocast" is a context too
import dataclasses                      # GPTConfig
import hashlib                          # is this the text that the checkpoint was trained on?
import math                             # sqrt(d_k)
import os                               # RANK and WORLD_SIZE, which torchrun sets
import pathlib                          # --out
import re                               # BPE cuts the text into words first
import time                             # how long the story took

import tiktoken                         # runs the BPE that we train
import torch                            # tensors and autograd
import torch.distributed as dist        # several processes, one model
import torch.nn as nn                   # Module, Linear, Embedding: nothing that knows attention
import torch.nn.functional as F         # cross_entropy, rms_norm

from lesson1_linreg import BadInput, Parser, cli, flag, given, new_figure, report, save_csv, save_figure
from lesson2_mlp import Progress, pick_device
from lesson3_charrnn import (OUT, CharTokenizer, SampleConfig, StopRequest, choose, load_checkpoint, load_plays,
                             random_states, read_text, save_checkpoint, set_random_states, split_text)

# ---- config ---------------------------------------------------------------------------------------

@dataclasses.dataclass
class GPTConfig:
    """Shape, data, rates; each field is a flag of `train`."""
    vocab_size: int = flag(512, "V for BPE; with characters the text decides", 257)
    context: int = flag(128, "T: tokens the model looks back over", 2)
    n_layer: int = flag(4, "blocks", 1)
    n_head: int = flag(2, "H: attention heads", 1)
    n_embd: int = flag(128, "C: channels", 4)
    dropout: float = flag(0.0, "share of activations zeroed in training", 0, 0.9)
    position: str = flag("rotary", "how a token knows its place", choices=["learned", "sinusoidal", "rotary"])
    tokens: str = flag("chars", "what a token is", choices=["chars", "bpe"])
    text: str = flag("", "a UTF-8 file to learn from; nothing means the plays of Shakespeare")
    batch_size: int = flag(8, "B: windows in one step, over all processes", 1)
    accumulation: int = flag(1, "micro-batches that a step is cut into, to save memory", 1)
    steps: int = flag(1400, "optimizer steps", 1)
    lr: float = flag(0.02, "Muon's learning rate, for the matrices inside the blocks", 0, 10)
    adam_lr: float = flag(0.01, "AdamW's learning rate, for embeddings and head", 0, 10)
    weight_decay: float = flag(0.0, "Muon's: against learning by heart, on long runs over little text", 0, 10)
    decay: float = flag(0.6, "last share of the steps, over which both rates fall to zero", 0.01, 1)
    eval_every: int = flag(200, "steps between looks at the validation text, and checkpoints", 1)
    precision: str = flag("auto", "of matrix products; bf16 is 16 bits, float32's range with 3 digits; auto takes it "
                          "if hardware has it", choices=["auto", "fp32", "bf16"])
    compile: bool = flag(False, "torch.compile the model: needs a C++ compiler, pays on long runs")
    seed: int = flag(0, "of the weights and of the order of the windows", 0, 2 ** 63 - 1)


# a GPU's defaults
GPU = dict(context=256, n_layer=6, n_head=6, n_embd=384, dropout=0.3, weight_decay=1.0, batch_size=64, steps=1200)
SOFT_CAP = 15.0                         # logits stay within -15 and 15

# ---- tokens: byte-pair encoding, trained by hand --------------------------------------------------

# A word takes the space before it along. Only ASCII classes: \w differs between Python and tiktoken's Rust.
WORD = r" ?[A-Za-z']+|[ \n]+| ?[^A-Za-z' \n]+"


def merge(parts, rank_of):
    """The parts of a word, with every occurrence of its lowest-ranked adjacent pair joined (if any pair has a rank)."""
    ranks = [rank_of.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
    best, joined, i = min(ranks, default=math.inf), [], 0
    while i < len(parts):
        pair = i < len(ranks) and ranks[i] == best < math.inf
        joined.append(b"".join(parts[i:i + 1 + pair]))
        i += 1 + pair
    return joined


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, so that no text is unknown. `vocabulary` lists the tokens, a
    latin-1 character per byte so that JSON can hold them: 256 single bytes, then the merges in the order learned."""

    def __init__(self, vocabulary):
        self.vocabulary = list(vocabulary)
        self.rank_of = {token.encode("latin-1"): i for i, token in enumerate(self.vocabulary)}
        self.fast = tiktoken.Encoding("lesson4", pat_str=WORD, mergeable_ranks=self.rank_of, special_tokens={})

    @classmethod
    def train(cls, text, vocab_size):
        """Join the most frequent adjacent pair, again and again. A million characters are enough to learn from."""
        count = collections.Counter(word.encode() for word in re.findall(WORD, text[:1_000_000]))
        parts, pairs = {word: [bytes([b]) for b in word] for word in count}, collections.Counter()
        ranks = {bytes([b]): b for b in range(256)}

        def tally(word, n):
            for a, b in zip(parts[word], parts[word][1:]):
                pairs[a + b] += n
        for word, n in count.items():
            tally(word, n)
        while len(ranks) < vocab_size and pairs[best := max(pairs, key=lambda pair: (pairs[pair], pair), default=b"")]:
            ranks[best] = len(ranks)
            for word in count:
                if best in word:        # the others stay as they are, and so do their pairs
                    tally(word, -count[word])
                    parts[word] = merge(parts[word], {best: 0})
                    tally(word, count[word])
        return cls(token.decode("latin-1") for token in ranks)

    def encode(self, text):
        return self.fast.encode(text, disallowed_special=())

    def encode_by_hand(self, text):
        """The same ids: each word starts as single bytes and is merged, lowest rank first, until nothing changes."""
        ids_of = {}
        for word in set(re.findall(WORD, text)):
            before, parts = None, [bytes([b]) for b in word.encode()]
            while parts != before:
                before, parts = parts, merge(parts, self.rank_of)
            ids_of[word] = [self.rank_of[part] for part in parts]
        return [i for word in re.findall(WORD, text) for i in ids_of[word]]

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids).encode("latin-1").decode("utf-8", errors="replace")


# ---- attention ------------------------------------------------------------------------------------

def attention_mask(Tq, Tk, real=None, device=None):
    """What is added to the scores: 0 where a query may look, -inf where not. The look-ahead mask (Tq,Tk) hides later
    keys, the queries being the last Tq of Tk tokens; where real (B,Tk) is False, padding is hidden too: (B,1,Tq,Tk).
    Every token may see itself: a row of nothing but -inf would make the softmax 0/0."""
    hidden = torch.ones(Tq, Tk, dtype=torch.bool, device=device).triu(1 + Tk - Tq)              # (Tq,Tk)
    if real is not None:
        itself = torch.eye(Tk, dtype=torch.bool, device=device)[Tk - Tq:]                       # (Tq,Tk)
        hidden = hidden | ~real[:, None, None, :] & ~itself                                     # (B,1,Tq,Tk)
    return torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)


class ScaledDotProductAttention(nn.Module):
    """softmax(Q K' / sqrt(d_k) + mask) V. Vaswani et al. 2017, eq. 1.

    q (B,H,Tq,D), k and v (B,H,Tk,D), mask that broadcasts to (B,H,Tq,Tk) -> output (B,H,Tq,D), weights (B,H,Tq,Tk)."""

    def scores(self, q, k, mask):
        """How well each query fits each key. `why_sqrt` below measures what the division is for."""
        return q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + mask   # (B,H,Tq,D) @ (B,H,D,Tk) -> (B,H,Tq,Tk)

    def forward(self, q, k, v, mask):
        weights = self.scores(q, k, mask).softmax(-1)                   # over the keys: each query hands out 1 in all
        return weights @ v, weights                                     # (B,H,Tq,Tk) @ (B,H,Tk,D) -> (B,H,Tq,D)


def angles(position, D):
    """Position t turns the i-th pair of channels by t / 10000^(2i/D). position (T,) -> (T,D/2). Vaswani et al. 3.5."""
    return position[:, None] / 10000 ** (torch.arange(0, D, 2, device=position.device) / D)     # (T,1) / (D/2,)


def rotate(x, cos, sin):
    """Turn each pair of channels (x_i, x_{i+D/2}) by its position's angle: q.k then depends on the distance only.
    x (B,H,T,D), cos and sin (T,D/2) -> (B,H,T,D). Su et al. 2021, eq. 34."""
    a, b = x.chunk(2, -1)                                               # (B,H,T,D/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)        # (B,H,T,D)


def norm(x):
    """Divide by the root mean square over the last dimension, so that x keeps one size however many blocks add to it.
    Zhang & Sennrich 2019, without their gain."""
    return F.rms_norm(x, x.shape[-1:])


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on D channels of its own. Query: what do I look for? Key: what am I? Value: what
    do I hand over? All three are learned views of the same x. (B,T,C) -> (B,T,C). Vaswani et al. 3.2.2."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.query, self.key, self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.attend = ScaledDotProductAttention()

    def forward(self, x, mask, rotation=None, cache=None):
        def heads(y):
            return y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)   # (B,T,C) -> (B,T,H,D) -> (B,H,T,D)
        # QK-norm: all queries and keys have one length, so that no score can run away
        q, k, v = norm(heads(self.query(x))), norm(heads(self.key(x))), heads(self.value(x))
        if rotation:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:           # keys and values of earlier tokens never change: compute the new ones only
            if self in cache:
                k, v = (torch.cat([old, new], 2) for old, new in zip(cache[self], (k, v)))      # (B,H,Tk,D)
            cache[self] = k, v
        y, _ = self.attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))                   # (B,H,T,D) -> (B,T,H,D) -> (B,T,C)


# ---- model ----------------------------------------------------------------------------------------

class Block(nn.Module):
    """Tokens talk to each other (attention), then each thinks alone (MLP). Both only add to x. (B,T,C) -> (B,T,C)."""

    def __init__(self, config):
        super().__init__()
        C, self.attention = config.n_embd, MultiHeadAttention(config)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, rotation=None, cache=None):
        x = x + self.dropout(self.attention(norm(x), mask, rotation, cache))
        return x + self.dropout(self.down(F.relu(self.up(norm(x))).square()))       # (B,T,C) -> (B,T,4C) -> (B,T,C)


class GPT(nn.Module):
    """Token ids (B,T) -> logits of the next token (B,T,V)."""

    def __init__(self, config):
        super().__init__()
        self.config, C, V = config, config.n_embd, config.vocab_size
        if C % (2 * config.n_head):
            raise BadInput(f"--n-embd {C} must be --n-head {config.n_head} times an even number")
        self.token, self.head = nn.Embedding(V, C), nn.Linear(C, V, bias=False)
        self.shift = nn.Parameter(torch.zeros(C))
        self.place = nn.Embedding(config.context, C) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        for name, p in self.blocks.named_parameters():
            # every block begins as "add nothing", and the head as "all tokens alike": it learns fastest from there
            nn.init.zeros_(p) if name.endswith(("out.weight", "down.weight")) else nn.init.normal_(p, std=C ** -0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, idx, targets=None, real=None, cache=None):
        """idx (B,T) -> logits (B,T,V), and the mean cross-entropy in nats over targets (B,T), -1 left out, or None.
        real (B,T): False marks padding. cache: a dict kept from call to call; idx then holds the new tokens only."""
        x, T, rotation, seen = self.token(idx), idx.size(1), None, {} if cache is None else cache   # (B,T) -> (B,T,C)
        heard = x if real is None else x * real[:, :, None]                                     # (B,T,C) * (B,T,1)
        past, last = seen.get("past", (0, torch.zeros_like(x[:, :1])))
        seen["past"] = past + T, heard[:, -1:]
        x = x + self.shift * torch.cat([last, heard[:, :-1]], 1)    # token shift: a little of the token before
        position = torch.arange(past, past + T, device=idx.device)                              # (T,)
        if self.place:
            x = x + self.place(position)                                                        # (B,T,C) + (T,C)
        elif self.config.position == "sinusoidal":
            angle = angles(position, x.size(-1))
            x = x + torch.cat([angle.sin(), angle.cos()], -1)                                   # (B,T,C) + (T,C)
        else:
            angle = angles(position, x.size(-1) // self.config.n_head)
            rotation = angle.cos(), angle.sin()                                                 # (T,D/2) each
        x = norm(x)
        mask = attention_mask(T, past + T, real, idx.device)
        for block in self.blocks:
            x = block(x, mask, rotation, cache)
        logits = self.head(norm(x)).float()                                                     # (B,T,C) -> (B,T,V)
        logits = SOFT_CAP * torch.tanh(logits / SOFT_CAP)       # no token is ever ruled out for good (Gemma 2, 2024)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)    # (B*T,V), (B*T,)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, cached=True, stop=None):
    """Continue idx (B,T) token by token -> (B, T + new). stop(idx) may return True to end early. When the context is
    full its older half is forgotten and the cache starts anew: with and without cache the logits are the same."""
    model.eval()
    T, cache = model.config.context, {}
    window = idx[:, -T:]
    for _ in range(max_new_tokens):
        if window.size(1) > T:
            window, cache = window[:, -(T // 2):], {}
        logits, _ = model(window[:, -1:] if cache else window, cache=cache if cached else None)
        new = choose(logits[:, -1], temperature, top_k, top_p, generator).to(idx.device)        # (B,V) -> (B,)
        idx, window = torch.cat([idx, new[:, None]], 1), torch.cat([window, new[:, None]], 1)   # (B,T) -> (B,T+1)
        if stop and stop(idx):
            break
    return idx


# ---- optimizer: Muon for the matrices, AdamW for the rest -----------------------------------------

def orthogonalize(G, steps=5):
    """The nearest matrix whose singular values are all alike (0.7 to 1.2 after 5 steps). G (..., R, K), same shape out.
    The Newton-Schulz iteration a X + b (XX')X + c (XX')(XX')X with the coefficients of Jordan 2024."""
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    X = X.bfloat16() if torch.is_autocast_enabled(G.device.type) else X             # once, not in every product
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X                                             # so that X X' is the small product
    for _ in range(steps):
        A = X @ X.mT                                                    # (..., R, R)
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: directions that are rare in the gradient learn as fast as common ones. Jordan 2024.
    Before each step the weights shrink by lr times weight_decay: those that nothing in the text renews fade."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        group, alike = self.param_groups[0], collections.defaultdict(list)
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            alike[p.shape].append((p, p.grad.lerp(momentum, group["momentum"])))    # Nesterov's look ahead
        for (rows, cols), pairs in alike.items():                       # one product for all matrices of a shape
            for (p, _), update in zip(pairs, orthogonalize(torch.stack([u for _, u in pairs]))):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * max(1, rows / cols) ** 0.5)


def make_optimizers(model, config):
    """[Muon, AdamW]; each group remembers its initial_lr for `schedule`."""
    rest = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    optimizers = [Muon(model.blocks.parameters(), config.lr, weight_decay=config.weight_decay),
                  torch.optim.AdamW(rest, config.adam_lr, betas=(0.8, 0.95), weight_decay=0)]
    for o in optimizers:
        o.param_groups[0]["initial_lr"] = o.param_groups[0]["lr"]
    return optimizers


def schedule(step, config):
    """Share of the learning rates at a step, counted from 0: 1, then a straight line to 0 over the last `decay`."""
    return min(1, (1 - step / config.steps) / config.decay)


# ---- training -------------------------------------------------------------------------------------

def autocast(config, device):
    """A context of bf16 matrix products where hardware has them (elsewhere they are slower than fp32), else none."""
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
              any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16")))
    bf16 = config.precision == "bf16" or config.precision == "auto" and native
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def train_step(model, optimizers, x, y, rate=1.0, accumulation=1, precision=contextlib.nullcontext()):
    """One optimizer step on windows x with targets y, both (B,T), cut into micro-batches. Returns the mean loss."""
    total = 0.0
    for i, (xi, yi) in enumerate(zip(x.chunk(accumulation), y.chunk(accumulation)), 1):         # (B/accumulation, T)
        # several processes average their gradients once a step, with the last micro-batch
        with model.no_sync() if dist.is_initialized() and i < accumulation else contextlib.nullcontext():
            with precision:
                loss = model(xi, yi)[1] / accumulation
            loss.backward()
        total += loss.item()
    for o in optimizers:
        o.param_groups[0]["lr"] = o.param_groups[0]["initial_lr"] * rate
        with precision:
            o.step()
        o.zero_grad()
    return total


@torch.no_grad()
def evaluate(model, ids, T, windows=None):
    """Mean loss in nats per token over the non-overlapping windows of T tokens of ids (N,): all, or that many, evenly
    spaced. fp32, no dropout, nothing carried from window to window: the same number every time."""
    n, training = (len(ids) - 1) // T, model.training
    x, y = ids[:n * T].view(n, T), ids[1:n * T + 1].view(n, T)                                  # (N,) -> (n,T)
    chosen = torch.linspace(0, n - 1, min(n, windows or n), device=ids.device).long()
    model.eval()
    total = sum(model(x[some], y[some])[1].item() * len(some) for some in chosen.split(64))
    model.train(training)
    return total / len(chosen)


def load_model(out, device):
    """(model, tokenizer) of the checkpoint with the lowest validation loss in `out`. Raises BadInput."""
    saved = load_checkpoint(out / "best.ckpt")
    try:
        model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(saved["model"])
        make = BPETokenizer if model.config.tokens == "bpe" else CharTokenizer
        return model.to(device).eval(), make(saved["vocabulary"])
    except (TypeError, KeyError, RuntimeError):
        raise BadInput(f"{out / 'best.ckpt'} is of another shape or another lesson: train again") from None


def train(config, device, out, resume=False):
    """Train; checkpoints, CSV and PNG go to `out`. Returns (model, tokenizer, bits per character on unseen text). Under
    torchrun there are `world` processes, numbered by `rank`; each takes its share of the same windows, and rank 0 alone
    writes. Raises BadInput."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1:                       # a GPU for each process; mps cannot average gradients
        device = pick_device(f"cuda:{local}" if device.type == "cuda" else "cpu")
    if config.batch_size % (world * config.accumulation):
        raise BadInput(f"--batch-size {config.batch_size} does not divide evenly into {world} processes times "
                       f"{config.accumulation} micro-batches")
    saved = load_checkpoint(out / "last.ckpt") if resume else None
    text = read_text(config.text) if config.text else load_plays()
    digest = hashlib.sha256(text.encode()).hexdigest()
    if resume and (saved.get("text"), saved["config"]["tokens"]) != (digest, config.tokens):
        raise BadInput(f"{out / 'last.ckpt'} was trained on another text or other tokens: give those, or no --resume")
    if config.tokens == "bpe":
        tokenizer = BPETokenizer(saved["vocabulary"]) if resume else BPETokenizer.train(text, config.vocab_size)
    else:
        tokenizer = CharTokenizer(saved["vocabulary"]) if resume else CharTokenizer.train(text)
    config.vocab_size = len(tokenizer.vocabulary)
    parts = split_text(text, config.context)
    ids, val_ids = (torch.tensor(tokenizer.encode(part), device=device) for part in parts)      # (N,) each
    if len(val_ids) < config.context + 2:               # as characters there were enough
        raise BadInput(f"the last tenth of the text has {len(val_ids)} tokens, --context {config.context} needs "
                       f"{config.context + 2}: give a longer text or a shorter context")
    bits = len(val_ids) / len(parts[1]) / math.log(2)   # nats a token to bits a character: comparable for all tokens

    torch.manual_seed(config.seed)
    model, order = GPT(config).to(device), torch.Generator().manual_seed(config.seed)
    optimizers, start, best, rows = make_optimizers(model, config), 0, math.inf, []
    if resume:
        try:
            for part, state in zip([model, *optimizers], [saved["model"], *saved["optimizers"]]):
                part.load_state_dict(state)
        except RuntimeError:
            raise BadInput(f"the checkpoint in {out} is of another shape than the flags: leave them out") from None
        start, best, rows = saved["step"], saved["best"], saved["rows"]
        order.set_state(saved["order"])
        set_random_states(saved["random"])
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    live = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    live = torch.compile(live) if config.compile else live

    def save(name):
        save_checkpoint(out / name, {
            "config": dataclasses.asdict(config), "text": digest, "vocabulary": tokenizer.vocabulary, "step": step,
            "best": best, "rows": rows, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
            "order": order.get_state(), "random": random_states()})

    if rank == 0:
        size, nothing = sum(p.numel() for p in model.parameters()), math.log(config.vocab_size)
        print(f"{size:,} parameters on {device}; {len(ids):,} tokens to learn from, {len(val_ids):,} to validate on; "
              f"knowing nothing is loss ln {config.vocab_size} = {nothing:.4f}", flush=True)
    progress, precision, val = Progress(config.steps, start), autocast(config, device), None
    with StopRequest() as stop:
        for step in range(start + 1, config.steps + 1):
            at = torch.randint(len(ids) - config.context, (config.batch_size, 1), generator=order)[rank::world]
            window = ids[(at + torch.arange(config.context + 1)).to(device)]                    # (B/world,T+1)
            loss = train_step(live, optimizers, window[:, :-1], window[:, 1:], schedule(step - 1, config),
                              config.accumulation, precision)
            if not math.isfinite(loss):
                raise BadInput(f"the loss is {loss} at step {step}: lower --lr and --adam-lr (now {config.lr} and "
                               f"{config.adam_lr}); what was saved before is kept")
            asked = torch.tensor(float(stop.asked), device=device)
            if world > 1:
                dist.all_reduce(asked)                  # if one process was asked to stop, all stop after the same step
            look = step % config.eval_every == 0 or step == config.steps
            if rank == 0 and look:
                val = evaluate(model, val_ids, config.context, 64)
                rows.append({"step": step, "loss": loss, "val": val, "val_bits_per_char": val * bits})
                if val < best:
                    best = val
                    save("best.ckpt")
            if rank == 0 and (look or asked):
                save("last.ckpt")
            if rank == 0:
                progress(step, (step - start) * config.batch_size * config.context, loss=loss, val=val)
            if asked:
                if rank == 0:
                    print(f"\nstopped after step {step}, saved; `train --resume` goes on", flush=True)
                raise KeyboardInterrupt
    if world > 1:
        dist.barrier()
        live = None                     # the wrapper before the group it talks to, or the process may hang on leaving
        dist.destroy_process_group()
    whole = evaluate(model, val_ids, config.context)
    if rank == 0:
        save_csv(out / "loss.csv", rows)
        figure, axis = new_figure()
        for name, colour in (("loss", "0.6"), ("val", "0")):
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], "o-", color=colour, label=name)
        axis.set(xlabel="step", ylabel="nats per token", title=f"The loss on unseen text falls to {whole:.3f}")
        axis.legend()
        save_figure(out / "loss.png", figure)
        print(f"all {(len(val_ids) - 1) // config.context:,} validation windows of {config.context}: loss {whole:.4f}, "
              f"{whole * bits:.4f} bits per character")
    return model, tokenizer, whole * bits


# ---- experiments: masks, the square root, the softmax's dimension, positions, overfitting ----------

def attention_maps(model, idx, real=None):
    """[(scores, weights)] of every block for idx (B,T), both (B,H,T,T), overheard on the live forward pass."""
    maps = []
    hooks = [block.attention.attend.register_forward_hook(lambda attend, qkvm, result: maps.append(
        (attend.scores(qkvm[0], qkvm[1], qkvm[3]).detach(), result[1].detach()))) for block in model.blocks]
    model(idx, real=real)
    for hook in hooks:
        hook.remove()
    return maps


def draw_attention(path, weights, sentence, title):
    """One heatmap per head. weights (H,T,T), sentence: T characters or tokens."""
    figure, _ = new_figure(1, len(weights), (3.5 * len(weights), 3.8))
    for head, (axis, matrix) in enumerate(zip(figure.axes, weights.tolist())):
        axis.imshow(matrix, cmap="Greys", vmin=0, vmax=1)
        axis.set(title=f"head {head}", xlabel="key (looked at)", ylabel="query (looking)")
        axis.set_xticks(range(len(sentence)), sentence)
        axis.set_yticks(range(len(sentence)), sentence)
    figure.suptitle(title)
    save_figure(path, figure)


def mask(out):
    """Print an attention matrix; prove by perturbation and by gradient that no token sees the future or padding."""
    torch.manual_seed(0)
    sentences = ["The King", "Server Engineer turns to AI", "To be", ""]                        # the last: padding only
    tokenizer = CharTokenizer.train("".join(sentences))
    model = GPT(GPTConfig(vocab_size=len(tokenizer.vocabulary), n_layer=2, n_head=4, n_embd=64)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)     # a fresh model's zeros ignore every input and would prove nothing
    rows = [torch.tensor(tokenizer.encode(s), dtype=torch.long) for s in sentences]
    idx = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")                # (B,T)
    real = torch.arange(idx.size(1)) >= idx.size(1) - torch.tensor([[len(row)] for row in rows])    # (B,T)

    scores, weights = (m[0] for m in attention_maps(model, rows[0][None])[0])                   # (H,T,T) of block 0
    for name, matrix in (("scores plus mask", scores[0]), ("weights, after the softmax", weights[0])):
        print(f"\n{name}; a row is a query, a column a key\n     " + "".join(f"{c!r:>7}" for c in sentences[0]))
        for c, row in zip(sentences[0], matrix):
            print(f"{c!r:>5}" + "".join(f"{w:7.2f}" for w in row))
    draw_attention(out / "mask.png", weights, sentences[0], "No query looks to its right: the weights are exactly 0")

    embedded, upper = [], torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)                # (T,T)
    hook = model.token.register_forward_hook(lambda module, args, result: embedded.append(result))
    logits = model(idx, real=real)[0]                                                           # (B,T,V)
    hook.remove()

    def moved(where):                   # how far the logits of each token move if the tokens at `where` become others
        return (model(idx.where(~where, (idx + 1) % 9), real=real)[0] - logits).abs().amax(-1)  # (B,T,V) -> (B,T)
    t = 9                               # in sentence 1, the longest
    future = moved((torch.arange(idx.size(1)) > t).expand_as(idx))[1]                           # (T,)
    padding = moved(~real)[real].max()
    reach = torch.autograd.grad(logits[1, t].sum(), embedded[0], retain_graph=True)[0][1].abs().amax(-1)    # (T,)
    gradients = torch.autograd.grad(logits.sum(), list(model.parameters()))
    return [
        ("mask: the lower triangle has values", bool((weights[:, ~upper] > 0).all()),
         f"the smallest weight is {weights[:, ~upper].min():.4f}"),
        ("mask: the upper triangle is masked",
         bool((scores[:, upper] == -math.inf).all() and not weights[:, upper].any()),
         f"{scores[:, upper].numel()} scores of -inf became weights of exactly 0"),
        ("mask: the future changes nothing", bool(future[:t + 1].max() == 0 < future[t + 1:].min()),
         f"other characters after {t} move logits up to {t} by {future[:t + 1].max():g}, all later ones by more"),
        ("mask: no gradient from the future", bool(reach[t + 1:].max() == 0 < reach[:t + 1].min()),
         f"d logit {t} / d input is exactly 0 after {t}, and nowhere 0 before"),
        ("mask: padding changes nothing", bool(padding == 0), f"other padding moves real logits by {padding:g}"),
        ("mask: a row of padding only", all(g.isfinite().all() for g in (logits, *gradients)), "no NaN anywhere")]


def why_sqrt():
    """Interview question: why divide by sqrt(d_k)? 500 random queries against 64 keys, components of variance 1."""
    print("\n      variance    entropy of the softmax    gradient through it: norm of d weights / d scores\n"
          " d_k   of q.k      plain     / sqrt(d_k)     plain     / sqrt(d_k)")
    random = torch.Generator().manual_seed(0)
    for d_k in (4, 16, 64, 256, 1024):
        q, k = torch.randn(500, 1, d_k, generator=random), torch.randn(500, 64, d_k, generator=random)
        dots = (q @ k.mT).squeeze(1)                                                            # (500,1,64) -> (500,64)
        w = torch.stack([dots, dots / math.sqrt(d_k)]).softmax(-1)                              # (2,500,64)
        entropy = torch.special.entr(w).sum(-1).mean(1).tolist()                                # (2,)
        jacobian = torch.diag_embed(w) - w[..., :, None] * w[..., None, :]                      # (2,500,64,64)
        gradient = jacobian.flatten(2).norm(dim=2).mean(1).tolist()                             # (2,)
        print(f"{d_k:4}{dots.var():9.1f} {entropy[0]:10.3f} {entropy[1]:12.3f} {gradient[0]:12.4f} {gradient[1]:12.4f}")
    print("q.k sums d_k products, so its variance is d_k. Undivided, the softmax picks one key and passes no gradient.")


def which_dimension():
    """Interview question: over which dimension is the softmax? Over the keys; over the queries the future leaks in."""
    random = torch.Generator().manual_seed(0)
    q, k, v, other = (torch.randn(6, 16, generator=random) for _ in range(4))                   # (T,D)
    attend, queries = ScaledDotProductAttention(), (q, torch.cat([q[:5], other[5:]]))           # only token 5 differs
    scores = [attend.scores(x, k, attention_mask(6, 6)) for x in queries]                       # (T,T) each
    print("\nsoftmax over    what each query hands out in all         if only query 5 changes, output 2 moves by")
    for name, dim in (("keys", -1), ("queries", -2)):
        weights, changed = (s.softmax(dim) for s in scores)
        leak = ((weights - changed) @ v)[2].abs().max()
        print(f"{name:12}    {' '.join(f'{w:.2f}' for w in weights.sum(-1))}            {leak:.4f}")
    print("Over the queries the output is no weighted mean, and each key is shared out by what later queries want.")


def positions(device):
    """What each kind of position can do beyond the length it was trained on."""
    text = load_plays()[:400_000]
    tokenizer = CharTokenizer.train(text)
    ids, val_ids = (torch.tensor(tokenizer.encode(part), device=device) for part in split_text(text, 128))
    print("\ntrained on 32, loss at T = 32             64            128")
    for kind in ("learned", "sinusoidal", "rotary"):
        config = GPTConfig(len(tokenizer.vocabulary), context=32, n_layer=2, n_embd=64, position=kind, steps=200)
        torch.manual_seed(0)
        model, order = GPT(config).to(device), torch.Generator().manual_seed(0)
        optimizers = make_optimizers(model, config)
        for step in range(config.steps):
            window = ids[(torch.randint(len(ids) - 32, (32, 1), generator=order) + torch.arange(33)).to(device)]
            train_step(model, optimizers, window[:, :-1], window[:, 1:], schedule(step, config))
        lengths = (32,) if kind == "learned" else (32, 64, 128)
        print(f"{kind:12}  {' '.join(f'{evaluate(model, val_ids, T, 100):14.3f}' for T in lengths)}")
    print("Absolute: learned has no row for place 32, and unseen sinusoids mislead. Relative: rotary meets unseen\n"
          "distances only, and suffers least.")


def overfit(device, sentence="Server Engineer turns to AI", steps=100):
    """Feed one sentence; a model that can learn recites it. Returns the check."""
    tokenizer = CharTokenizer.train(sentence)
    ids = torch.tensor([tokenizer.encode(sentence)], device=device)                             # (1,T)
    config = GPTConfig(vocab_size=len(tokenizer.vocabulary), context=len(sentence), steps=steps)
    torch.manual_seed(0)
    model = GPT(config).to(device)
    optimizers, progress = make_optimizers(model, config), Progress(steps)
    for step in range(1, steps + 1):
        loss = train_step(model, optimizers, ids[:, :-1], ids[:, 1:], schedule(step - 1, config))
        progress(step, step * len(sentence), loss=loss)
    recited = tokenizer.decode(generate(model, ids[:, :1], len(sentence) - 1, temperature=0)[0].tolist())
    right = sum(a == b for a, b in zip(recited, sentence))
    print(f"given {sentence[0]!r}, it says {recited!r}")
    return ("overfit: the sentence is recited", recited == sentence and loss < 0.05,
            f"{right}/{len(sentence)} characters, loss {loss:.4f}")


# ---- use ------------------------------------------------------------------------------------------

def sample(model, tokenizer, prompt, max_new_tokens, stop="", seed=0, **how):
    """`prompt` and up to `max_new_tokens` more, as text, ending before `stop`. Raises BadInput."""
    if not prompt:
        raise BadInput("the prompt is empty; give --prompt at least one character")
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.head.weight.device)             # (1,T)
    said = generate(model, ids, max_new_tokens, generator=torch.Generator().manual_seed(seed), **how,
                    stop=lambda idx: stop and stop in tokenizer.decode(idx[0, ids.size(1):].tolist()))
    said = tokenizer.decode(said[0, ids.size(1):].tolist())
    return prompt + (said.partition(stop)[0] if stop else said)


def story(config, device, out):
    """All experiments, the training, and the acceptance checks. Returns the exit status."""
    began = time.perf_counter()
    print("1. Masks: who may look at whom")
    checks = mask(out)
    why_sqrt()
    which_dimension()
    positions(device)
    print("\n2. Overfit: one sentence, on purpose")
    checks.append(overfit(device))
    print("\n3. Training")
    model, tokenizer, bits = train(config, device, out)
    model.eval()
    text = read_text(config.text) if config.text else load_plays()
    prompt = "The King" if "The King" in text else text[:8]
    verse = sample(model, tokenizer, prompt, 400, seed=config.seed, temperature=0.8)
    print(f"\n{verse}\n")
    ids, cache = torch.tensor([tokenizer.encode(verse)[:config.context]], device=device), {}    # (1,T)
    seen = ids[:, :24]
    draw_attention(out / "attention.png", attention_maps(model, seen)[-1][1][0],
                   [tokenizer.decode([i]) for i in seen[0].tolist()], "Where the trained heads of the last block look")
    with torch.no_grad():
        one_by_one = torch.cat([model(ids[:, t:t + 1], cache=cache)[0] for t in range(ids.size(1))], 1)     # (1,T,V)
        apart = (one_by_one - model(ids)[0]).abs().max().item()
    bpe = BPETokenizer.train(text, 512)
    fast = bpe.encode(text)
    checks += [
        ("cache: the same logits as without", apart < 1e-3, f"largest difference {apart:.0e}"),
        ("bpe: by hand the same ids as tiktoken", bpe.encode_by_hand(text) == fast,
         f"{len(fast):,} ids over the whole text, {len(text) / len(fast):.2f} characters each"),
        ("training: unseen text", bits < 2.4, f"{bits:.4f} bits per character over the whole split, wanted below 2.4")]
    status = report(checks)
    print(f"{time.perf_counter() - began:.0f} s in all; weights, curve and pictures are in {out}")
    return status


def main(argv=None):
    common = Parser(add_help=False)
    common.add_argument("--device", default=argparse.SUPPRESS, help="cuda, mps or cpu (default: the best one present)")
    common.add_argument("--out", default=argparse.SUPPRESS, type=pathlib.Path, help="folder (default: out/lesson4)")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[common])
    parser.add_config(GPTConfig)
    commands = parser.add_subparsers(dest="command", metavar="{mask,overfit,positions,train,sample}")
    for name in ("mask", "overfit", "positions"):
        commands.add_parser(name, parents=[common], help="this part of the story alone")
    for name, config, text in (("train", GPTConfig, "train on a text"), ("sample", SampleConfig, "continue a prompt")):
        commands.add_parser(name, parents=[common], help=text).add_config(config)
    commands.choices["train"].add_argument("--resume", action="store_true", help="go on where --out stopped")
    args = parser.parse_args(argv)
    device, out = pick_device(getattr(args, "device", "auto")), getattr(args, "out", OUT / "lesson4")
    if args.command == "mask":
        return report(mask(out))
    if args.command == "overfit":
        return report([overfit(device)])
    if args.command == "positions":
        return positions(device)
    if args.command == "sample":
        return print(sample(*load_model(out, device), **dataclasses.asdict(SampleConfig(**given(args, SampleConfig)))))
    resume = args.command == "train" and args.resume
    try:
        base = load_checkpoint(out / "last.ckpt")["config"] if resume else GPU if device.type == "cuda" else {}
        config = GPTConfig(**{**base, **given(args, GPTConfig)})
    except (TypeError, KeyError):
        raise BadInput(f"{out / 'last.ckpt'} is of another lesson: choose another --out") from None
    if args.command == "train":
        train(config, device, out, resume)
        return 0
    return story(config, device, out)


if __name__ == "__main__":
    cli(main)


# ---- exercises ------------------------------------------------------------------------------------
# 1. Leave out the triu in attention_mask and run `mask`: which checks notice? What would the training loss do?
# 2. Train with --n-head 1, 2 and 8 at the same width. Compare the losses and look at attention.png.
# 3. Compare --tokens bpe --vocab-size 512 and 2048 in bits per character. Why not in loss?
# 4. Let all heads share one k and one v (Shazeer 2019). How small does the cache of generate() become? What is lost?
# 5. Replace Muon by AdamW for all parameters: how many steps does it need for the same validation loss?
