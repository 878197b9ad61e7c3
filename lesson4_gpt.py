"""Lesson 4: a GPT written out in full, proven to look only backwards, and trained on Shakespeare.

    python lesson4_gpt.py                          the whole story, about three minutes on two CPU cores
    python lesson4_gpt.py mask                     the attention matrix, and three proofs that the masks hold
    python lesson4_gpt.py overfit                  one sentence, 100 steps, recited without a mistake
    python lesson4_gpt.py positions                learned, sinusoidal, rotary: what happens beyond the training length
    python lesson4_gpt.py train --text my.txt      your own text; --resume continues, --tokens bpe, --help lists all flags
    python lesson4_gpt.py sample --prompt "The King"
    torchrun --nproc_per_node=2 lesson4_gpt.py train     several processes or machines, the same total batch

What you will see: PASS lines, out/lesson4/{mask,attention,loss}.png, a loss curve in loss.csv, and verse.
Left out on purpose: dropout schedules, mixture of experts, fused attention. The slow, readable path is the live one.
Sources: Vaswani et al. 2017 (attention), Su et al. 2021 (rotary), Zhang & Sennrich 2019 (RMSNorm), Henry et al. 2020
(QK-norm), So et al. 2021 (ReLU squared), Jordan et al. 2024 (Muon), Sennrich et al. 2016 (BPE).

Shapes: B sentences in a batch, T tokens in a sentence (Tq queries, Tk keys), C channels, H heads, D = C / H channels of
one head (the paper's d_k), V words in the vocabulary.
"""
import argparse                         # SUPPRESS: flags not given stay out of the way
import collections                      # Counter of words and pairs for BPE
import contextlib                       # "no autocast" is a context too
import dataclasses                      # GPTConfig
import json                             # config.json beside the weights
import math                             # sqrt(d_k), log(2)
import os                               # RANK and WORLD_SIZE that torchrun sets
import pathlib                          # paths on every system
import re                               # BPE splits text into words first
import time                             # how long the story took

import numpy as np                      # one array operation: the proof that two id lists are equal
import safetensors.torch                # weights as plain data
import tiktoken                         # runs the BPE that we train
import torch                            # tensors and autograd
import torch.distributed as dist        # several processes, one model
import torch.nn as nn                   # Module, Linear, Embedding: nothing that knows attention
import torch.nn.functional as F         # cross_entropy, rms_norm

from lesson1_linreg import BadInput, Parser, cli, flag, given, new_figure, replacing, report, save_figure
from lesson2_mlp import Progress, pick_device, save_csv
from lesson3_charrnn import (OUT, CharTokenizer, StopRequest, choose, load_checkpoint, load_plays, random_states, read_text,
                             save_checkpoint, set_random_states, split_text)

# ---- config ---------------------------------------------------------------------------------------

@dataclasses.dataclass
class GPTConfig:
    vocab_size: int = flag(512, "size of the BPE vocabulary; with characters the text decides", 257)
    context: int = flag(128, "T: tokens the model looks back on", 2)
    n_layer: int = flag(4, "blocks", 1)
    n_head: int = flag(4, "H: attention heads", 1)
    n_embd: int = flag(128, "C: channels of the residual stream", 4)
    text: str = flag("", "a UTF-8 file to learn from; empty means Shakespeare's plays")
    dropout: float = flag(0.0, "share of activations zeroed in training", 0, 0.9)
    position: str = flag("rotary", "how a token knows its place", choices=["learned", "sinusoidal", "rotary"])
    tokens: str = flag("chars", "what a token is", choices=["chars", "bpe"])
    batch_size: int = flag(16, "B: windows in one step, over all processes", 1)
    accumulation: int = flag(1, "micro-batches that one step is cut into, to save memory", 1)
    steps: int = flag(700, "optimizer steps", 1)
    lr: float = flag(0.02, "Muon's learning rate, for the matrices inside the blocks", 0, 10)
    adam_lr: float = flag(0.003, "AdamW's learning rate, for embeddings and head", 0, 10)
    decay: float = flag(0.6, "last share of the steps over which both fall linearly to zero", 0, 1)
    eval_every: int = flag(100, "steps between two looks at the validation text", 1)
    precision: str = flag("auto", "of the matrix products; auto is bf16 where the machine has it", choices=["auto", "fp32", "bf16"])
    compile: bool = flag(False, "torch.compile the model (needs a C++ compiler; pays on a GPU)")
    seed: int = flag(0, "of the weights and of the batches", 0)


def preset(device):
    """The defaults above suit a CPU; a GPU takes a larger model in the same few minutes."""
    large = dict(context=256, n_layer=6, n_head=6, n_embd=384, dropout=0.3, batch_size=64, steps=2500, eval_every=250)
    return GPTConfig(**large) if device.type == "cuda" else GPTConfig()

# ---- tokens: byte-pair encoding, trained by hand --------------------------------------------------

# A word takes the space before it along. Only ASCII classes: Python's \w and the Rust regex's \w differ on rare characters.
WORD = r" ?[A-Za-z']+|[ \n]+| ?[^A-Za-z' \n]+"


def merge(parts, rank_of):
    """The parts of a word with every occurrence of its lowest-ranked adjacent pair joined; unchanged if no pair has a rank."""
    ranks = [rank_of.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
    best, joined, i = min(ranks, default=math.inf), [], 0
    while i < len(parts):
        pair = i < len(ranks) and ranks[i] == best < math.inf
        joined.append(b"".join(parts[i:i + 1 + pair]))
        i += 1 + pair
    return joined


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, so that no text is unknown. `vocabulary` lists the tokens, one
    latin-1 character per byte so that JSON can hold them: 256 single bytes, then the merges in the order they were learned."""

    def __init__(self, vocabulary):
        self.vocabulary = list(vocabulary)
        self.rank_of = {w.encode("latin-1"): i for i, w in enumerate(self.vocabulary)}
        self.fast = tiktoken.Encoding("lesson4", pat_str=WORD, mergeable_ranks=self.rank_of, special_tokens={})

    @classmethod
    def train(cls, text, vocab_size):
        """Join the most frequent adjacent pair, vocab_size - 256 times. Only words that hold the pair are looked at again."""
        count = collections.Counter(re.findall(WORD, text))
        parts = {w: [bytes([b]) for b in w.encode()] for w in count}
        pairs, words_with = collections.Counter(), collections.defaultdict(set)

        def tally(word, sign):
            for pair in zip(parts[word], parts[word][1:]):
                pairs[pair] += sign * count[word]
                words_with[pair].add(word)

        for word in count:
            tally(word, 1)
        ranks = {bytes([b]): b for b in range(256)}
        while len(ranks) < vocab_size and pairs and (best := max(pairs, key=lambda p: (pairs[p], p))) and pairs[best] > 0:
            joined = b"".join(best)
            ranks.setdefault(joined, len(ranks))
            for word in words_with.pop(best):
                tally(word, -1)
                parts[word] = merge(parts[word], {joined: 0})
                tally(word, 1)
        return cls(w.decode("latin-1") for w in ranks)

    def encode(self, text):
        return self.fast.encode(text, disallowed_special=())

    def encode_by_hand(self, text):
        """The same ids, each word merged from single bytes, best rank first."""
        ids_of = {}
        for word in set(re.findall(WORD, text)):
            before, parts = None, [bytes([b]) for b in word.encode()]
            while parts != before:
                before, parts = parts, merge(parts, self.rank_of)
            ids_of[word] = [self.rank_of[p] for p in parts]
        return [i for word in re.findall(WORD, text) for i in ids_of[word]]

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids).encode("latin-1").decode("utf-8", errors="replace")


TOKENIZERS = {"chars": CharTokenizer, "bpe": BPETokenizer}


# ---- positions ------------------------------------------------------------------------------------

def angles(positions, D):
    """Position t turns the i-th pair of channels by t / 10000^(2i/D). positions (T,) -> (T, D/2). Vaswani et al. 3.5."""
    return positions[:, None] / 10000 ** (torch.arange(0, D, 2, device=positions.device) / D)   # (T,1) / (D/2,) -> (T, D/2)


def rotate(x, cos, sin):
    """Rotary position: turn pairs (x_i, x_{i+D/2}) by the angle of their position, so that q·k depends on the distance of
    the two tokens only. x (B,H,T,D), cos and sin (T,D/2) -> (B,H,T,D). Su et al. 2021, eq. 34."""
    a, b = x.chunk(2, -1)                                               # (B,H,T,D/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)        # (B,H,T,D)


# ---- attention ------------------------------------------------------------------------------------

def attention_mask(Tq, Tk, real=None, device=None):
    """What may be looked at: 0, what may not: -inf; added to the scores. Look-ahead mask (Tq,Tk): the queries are the last
    Tq of Tk tokens, none sees a later key. Padding mask: real (B,Tk) says which tokens are no padding; the two together are
    (B,1,Tq,Tk). Every token may see itself: a row of nothing but -inf would make the softmax 0/0."""
    future = torch.ones(Tq, Tk, dtype=torch.bool, device=device).triu(1 + Tk - Tq)              # (Tq,Tk)
    if real is not None:
        itself = torch.eye(Tk, dtype=torch.bool, device=device)[Tk - Tq:]                       # (Tq,Tk)
        future = future | (~real[:, None, None, :] & ~itself)                                   # (B,1,Tq,Tk)
    return torch.zeros(future.shape, device=device).masked_fill(future, -math.inf)


class ScaledDotProductAttention(nn.Module):
    """softmax(Q K^T / sqrt(d_k) + mask) V. Vaswani et al. 2017, eq. 1.

    q (B,H,Tq,D), k and v (B,H,Tk,D), mask broadcasting to (B,H,Tq,Tk) -> output (B,H,Tq,D), weights (B,H,Tq,Tk)."""

    def scores(self, q, k, mask):
        """How well each query fits each key. `why_sqrt` below measures what the division is for."""
        return q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + mask   # (B,H,Tq,D) @ (B,H,D,Tk) -> (B,H,Tq,Tk)

    def forward(self, q, k, v, mask):
        weights = self.scores(q, k, mask).softmax(-1)                   # over the keys: each query shares out 1
        return weights @ v, weights                                     # (B,H,Tq,Tk) @ (B,H,Tk,D) -> (B,H,Tq,D)


def norm(x):
    """Root mean square 1 over the last dimension, no weights of its own. Zhang & Sennrich 2019."""
    return F.rms_norm(x, x.shape[-1:])


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on its own D = C / H channels: query "what do I look for", key "what am I", value
    "what do I hand over", all three learned views of the same x. (B,T,C) -> (B,T,C). Vaswani et al. 3.2.2."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.query, self.key, self.value, self.out = (nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(4))
        self.attend = ScaledDotProductAttention()

    def forward(self, x, mask, rotation=None, cache=None):
        def heads(y):
            return y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)   # (B,T,C) -> (B,T,H,D) -> (B,H,T,D)
        q, k, v = norm(heads(self.query(x))), norm(heads(self.key(x))), heads(self.value(x))
        if rotation:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:           # keys and values of earlier tokens never change: keep them, compute the new ones only
            if self in cache:
                k, v = torch.cat([cache[self][0], k], 2), torch.cat([cache[self][1], v], 2)     # (B,H,Tk,D)
            cache[self] = k, v
        y, _ = self.attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))                   # (B,H,T,D) -> (B,T,H,D) -> (B,T,C)


class Block(nn.Module):
    """Tokens talk to each other (attention), then each thinks alone (MLP); both only add to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.up, self.down = (nn.Linear(i * config.n_embd, o * config.n_embd, bias=False) for i, o in ((1, 4), (4, 1)))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, rotation=None, cache=None):
        x = x + self.dropout(self.attention(norm(x), mask, rotation, cache))                    # (B,T,C)
        return x + self.dropout(self.down(F.relu(self.up(norm(x))).square()))                   # (B,T,C)->(B,T,4C)->(B,T,C)


class GPT(nn.Module):
    """Token ids (B,T) -> logits of the next token (B,T,V)."""

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        if C % config.n_head or C // config.n_head % 2:
            raise BadInput(f"--n-embd {C} must be --n-head {config.n_head} times an even number")
        self.token = nn.Embedding(config.vocab_size, C)
        self.place = nn.Embedding(config.context, C) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            # A block that begins as "add nothing" and a head that begins as "all tokens alike" train fastest (see README).
            zero = name.endswith(("out.weight", "down.weight", "head.weight"))
            nn.init.zeros_(p) if zero else nn.init.normal_(p, std=1.0 if p.size(-1) == C and "blocks" not in name else C ** -0.5)

    def forward(self, idx, targets=None, real=None, cache=None):
        """idx (B,T) -> logits (B,T,V), and the mean cross-entropy in nats where targets (B,T) are not -1, else None.
        real (B,T): False marks padding. cache: a dict kept between calls; idx then holds the new tokens only."""
        T, past = idx.size(1), next(iter(cache.values()))[0].size(2) if cache else 0
        position = torch.arange(past, past + T, device=idx.device)                              # (T,)
        x, rotation = self.token(idx), None                                                     # (B,T) -> (B,T,C)
        if self.place:
            x = x + self.place(position)                                                        # (B,T,C) + (T,C)
        elif self.config.position == "sinusoidal":
            angle = angles(position, x.size(-1))
            x = x + torch.cat([angle.sin(), angle.cos()], -1)                                   # (B,T,C) + (T,C)
        else:
            angle = angles(position, x.size(-1) // self.config.n_head)
            rotation = angle.cos(), angle.sin()                                                 # (T,D/2) each
        x, mask = norm(x), attention_mask(T, past + T, real, idx.device)
        for block in self.blocks:
            x = block(x, mask, rotation, cache)                                                 # (B,T,C)
        logits = self.head(norm(x)).float()                                                     # (B,T,C) -> (B,T,V)
        logits = 15 * torch.tanh(logits / 15)       # soft cap: no token may be ruled out for good (Gemma 2, 2024)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)    # (B*T,V), (B*T,)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, use_cache=True, on_token=None):
    """Continue idx (B,T) token by token -> (B, T + new). on_token(ids of the new token (B,)) may return True to stop.
    When the context is full the older half is forgotten; the cache then starts anew, so both paths give the same logits."""
    model.eval()
    T, cache = model.config.context, {}
    window = idx[:, -T:]
    for _ in range(max_new_tokens):
        if window.size(1) > T:
            window, cache = window[:, -(T // 2):], {}
        logits, _ = model(window[:, -1:] if cache else window, cache=cache if use_cache else None)
        new = choose(logits[:, -1], temperature, top_k, top_p, generator).to(idx.device)        # (B,V) -> (B,)
        idx, window = (torch.cat([ids, new[:, None]], 1) for ids in (idx, window))              # (B,T) -> (B,T+1)
        if on_token and on_token(new):
            break
    return idx


# ---- optimizer: Muon for matrices, AdamW for the rest ---------------------------------------------

def orthogonalize(G, steps=5):
    """The nearest matrix whose singular values are all alike (0.7 to 1.2 after 5 steps). G (..., R, K), same out.
    The quintic Newton-Schulz iteration a X + b (XX')X + c (XX')^2 X, coefficients of Jordan et al. 2024."""
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := X.size(-2) > X.size(-1):
        X = X.mT                                                        # the smaller product
    for _ in range(steps):
        A = X @ X.mT                                                    # (..., R, R)
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then every direction of the update made equally long: rare directions learn as fast as common ones."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = collections.defaultdict(list)                       # one batched product for all matrices of a shape
            for p in group["params"]:
                alike[p.shape].append(p)
            for (rows, cols), params in alike.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                for p, update in zip(params, orthogonalize(torch.stack(updates))):
                    p.sub_(update, alpha=group["lr"] * max(1, rows / cols) ** 0.5)


def make_optimizers(model, config):
    matrices = [p for p in model.blocks.parameters()]
    rest = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    optimizers = [Muon(matrices, config.lr), torch.optim.AdamW(rest, config.adam_lr, betas=(0.8, 0.95), weight_decay=0.0)]
    for o in optimizers:
        o.param_groups[0]["initial_lr"] = o.param_groups[0]["lr"]
    return optimizers


def schedule(step, config):
    """Share of the learning rate at a step (from 0): flat, then down to zero over the last `decay` of the run."""
    return min(1.0, (1 - step / config.steps) / config.decay) if config.decay else 1.0


# ---- training -------------------------------------------------------------------------------------

def autocast(config, device):
    """bf16 matrix products where the machine has them in hardware (elsewhere they are slower than fp32), else nothing."""
    native = device.type == "cuda" or any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
    bf16 = config.precision == "bf16" or config.precision == "auto" and native and device.type != "mps"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def train_step(model, optimizers, x, y, scale=1.0, accumulation=1, precision=contextlib.nullcontext()):
    """One optimizer step on windows x with targets y, both (B,T), cut into micro-batches; returns the mean loss."""
    total = 0.0
    for i, (xi, yi) in enumerate(zip(x.chunk(accumulation), y.chunk(accumulation)), 1):         # (B/accumulation, T)
        # several processes average their gradients once, after the last micro-batch
        with model.no_sync() if dist.is_initialized() and i < accumulation else contextlib.nullcontext():
            with precision:
                loss = model(xi, yi)[1] / accumulation
            loss.backward()
        total += loss.item()
    for o in optimizers:
        o.param_groups[0]["lr"] = o.param_groups[0]["initial_lr"] * scale
        with precision:
            o.step()
        o.zero_grad()
    return total


@torch.no_grad()
def evaluate(model, ids, T, windows=None):
    """Mean loss in nats per token over the non-overlapping windows of T tokens of ids (N,): all of them, or that many,
    evenly spaced. fp32, no dropout, no state carried from window to window: the same number every time."""
    n, before = (len(ids) - 1) // T, model.training
    x, y = ids[:n * T].view(n, T), ids[1:n * T + 1].view(n, T)                                  # (N,) -> (n,T)
    chosen = torch.linspace(0, n - 1, min(n, windows or n), device=ids.device).long()
    model.eval()
    total = sum(model(x[rows], y[rows])[1].item() * len(rows) for rows in chosen.split(64))
    model.train(before)
    return total / len(chosen)


def save_model(out, model, tokenizer):
    """out/model.safetensors and out/config.json: all that `sample` needs."""
    with replacing(out / "model.safetensors") as tmp:
        safetensors.torch.save_file(model.state_dict(), tmp)
    with replacing(out / "config.json") as tmp:
        tmp.write_text(json.dumps({**dataclasses.asdict(model.config), "vocabulary": tokenizer.vocabulary}, indent=1), "utf-8")


def load_model(out, device):
    """(model, tokenizer) as `save_model` left them in the folder `out`. Raises BadInput."""
    try:
        saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
        vocabulary = saved.pop("vocabulary")
        model = GPT(GPTConfig(**saved))
        model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    except FileNotFoundError:
        raise BadInput(f"no trained model in {out}; run `python lesson4_gpt.py train` first, or name its folder with --out") from None
    except (ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as e:
        raise BadInput(f"the model in {out} is damaged or of another shape ({str(e).splitlines()[0]}); train it again") from None
    return model.to(device).eval(), TOKENIZERS[model.config.tokens](vocabulary)


def train(config, device, out, resume=False):
    """Train; checkpoint, weights, CSV and PNG go into `out`. Returns (model, tokenizer, loss over the whole validation text).
    Under torchrun every process takes its share of the same batches, and rank 0 alone writes."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (world * config.accumulation):
        raise BadInput(f"--batch-size {config.batch_size} must divide by {world} processes x {config.accumulation} micro-batches")
    checkpoint = load_checkpoint(out / "checkpoint.pt") if resume else None
    text = read_text(config.text) if config.text else load_plays()
    if resume:
        tokenizer = TOKENIZERS[config.tokens](checkpoint["vocabulary"])
    else:
        tokenizer = BPETokenizer.train(text, config.vocab_size) if config.tokens == "bpe" else CharTokenizer.train(text)
    config.vocab_size = len(tokenizer.vocabulary)
    parts = split_text(text, config.context)
    ids, val_ids = (torch.tensor(tokenizer.encode(part), device=device) for part in parts)      # (N,) each
    bits_per_nat = len(val_ids) / len(parts[1]) / math.log(2)           # per character: comparable whatever the tokens are

    torch.manual_seed(config.seed)
    model = GPT(config).to(device)
    optimizers, order = make_optimizers(model, config), torch.Generator().manual_seed(config.seed)
    start, best, rows = 0, math.inf, []
    if resume:
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError:
            raise BadInput(f"the checkpoint in {out} is of another shape than the flags ask for; leave the flags out") from None
        for o, state in zip(optimizers, checkpoint["optimizers"]):
            o.load_state_dict(state)
        start, best, rows = checkpoint["step"], checkpoint["best"], checkpoint["rows"]
        order.set_state(checkpoint["order"])
        set_random_states(checkpoint["random"])
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    live = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    live = torch.compile(live) if config.compile else live
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens to learn from, {len(val_ids):,} to "
              f"validate on, {device}; knowing nothing is a loss of ln {config.vocab_size} = {math.log(config.vocab_size):.4f}", flush=True)
    progress, precision, val = Progress(config.steps, start), autocast(config, device), None
    with StopRequest() as stop:
        for step in range(start + 1, config.steps + 1):
            at = torch.randint(len(ids) - config.context, (config.batch_size,), generator=order)[rank::world]   # (B/world,)
            window = ids[(at[:, None] + torch.arange(config.context + 1)).to(device)]           # (B/world, T+1)
            loss = train_step(live, optimizers, window[:, :-1], window[:, 1:], schedule(step - 1, config),
                              config.accumulation, precision)
            if not math.isfinite(loss):
                raise BadInput(f"the loss is {loss} at step {step}: lower --lr and --adam-lr (now {config.lr} and {config.adam_lr}); "
                               "what was saved before is kept")
            asked = torch.tensor(float(stop.asked), device=device)
            if world > 1:
                dist.all_reduce(asked)  # if one process was asked to stop, all stop after the same step
            look = step % config.eval_every == 0 or step == config.steps
            if rank == 0 and look:
                val = evaluate(model, val_ids, config.context, 64)
                rows.append({"step": step, "loss": loss, "val": val, "val_bits_per_char": val * bits_per_nat})
                if val < best:
                    best = val
                    save_model(out, model, tokenizer)
            if rank == 0 and (look or asked):
                save_checkpoint(out / "checkpoint.pt", {
                    "config": dataclasses.asdict(config), "vocabulary": tokenizer.vocabulary, "step": step, "best": best,
                    "rows": rows, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "order": order.get_state(), "random": random_states()})
            if rank == 0:
                progress(step, (step - start) * config.batch_size * config.context, loss=loss, val=val)
            if asked:
                print(f"\nstopped after step {step}, saved; `train --resume` continues", flush=True)
                raise KeyboardInterrupt
    if world > 1:
        dist.destroy_process_group()
    whole = evaluate(model, val_ids, config.context)
    if rank == 0:
        save_csv(out / "loss.csv", rows)
        figure, axis = new_figure()
        for name, style in (("loss", "0.6"), ("val", "0")):
            axis.plot([r["step"] for r in rows], [r[name] for r in rows], color=style, label=name)
        axis.set(xlabel="step", ylabel="loss (nats per token)", title=f"validation loss falls to {whole:.3f}")
        axis.legend()
        save_figure(out / "loss.png", figure)
        print(f"whole validation text, {(len(val_ids) - 1) // config.context:,} windows of {config.context}: loss {whole:.4f} "
              f"({whole * bits_per_nat:.4f} bits per character)")
    return model, tokenizer, whole


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
    """One heatmap per head. weights (H,T,T), sentence of T characters."""
    figure, axes = new_figure(1, len(weights), (3.5 * len(weights), 4))
    for h, axis in enumerate(np.atleast_1d(axes)):
        axis.imshow(weights[h].tolist(), cmap="Greys", vmin=0, vmax=1)
        axis.set(title=f"head {h}", xlabel="key (looked at)", ylabel="query (looking)")
        axis.set_xticks(range(len(sentence)), sentence)
        axis.set_yticks(range(len(sentence)), sentence)
    figure.suptitle(title)
    save_figure(path, figure)


def mask(out):
    """Print an attention matrix, then prove by perturbation and by gradient that no token sees the future or padding."""
    torch.manual_seed(0)
    sentences = ["The King", "Server Engineer turns to AI", "To be", ""]                        # the last: padding only
    tokenizer = CharTokenizer.train("".join(sentences))
    model = GPT(GPTConfig(vocab_size=len(tokenizer.vocabulary), n_layer=2, n_embd=64)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)     # a fresh model's zeros ignore every input and would prove nothing
    rows = [torch.tensor(tokenizer.encode(s), dtype=torch.long) for s in sentences]
    idx = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")               # (B,T): each ends at the right
    real = torch.arange(idx.size(1)) >= idx.size(1) - torch.tensor([[len(row)] for row in rows])   # (B,T)

    heads = attention_maps(model, rows[0][None])[0]                                             # block 0: (1,H,T,T) twice
    for name, matrix in zip(("scores plus mask", "weights, after the softmax"), heads):
        print(f"\n{name}; a row is a query, a column a key\n     " + "".join(f"{c!r:>7}" for c in sentences[0]))
        for c, row in zip(sentences[0], matrix[0, 0]):
            print(f"{c!r:>5}" + "".join(f"{w:7.2f}" for w in row))
    draw_attention(out / "mask.png", heads[1][0], sentences[0], "No query looks to its right: there the weights are exactly 0")
    scores, weights = heads[0][0], heads[1][0]                                                  # (H,T,T)
    upper = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)                             # (T,T)
    checks = [("mask: the lower triangle has values", bool((weights[:, ~upper] > 0).all()),
               f"the smallest weight is {weights[:, ~upper].min():.4f}"),
              ("mask: the upper triangle is masked", bool((scores[:, upper] == -math.inf).all() and (weights[:, upper] == 0).all()),
               f"{scores[:, upper].numel()} scores of -inf become weights of exactly 0")]

    embedded = []
    hook = model.token.register_forward_hook(lambda module, args, result: embedded.append(result))
    logits = model(idx, real=real)[0]                                                           # (B,T,V)
    hook.remove()

    def moved(where):                   # how far each token's logits move when the tokens at `where` become others
        return (model(idx.where(~where, (idx + 1) % 9), real=real)[0] - logits).abs().amax(-1)  # (B,T,V) -> (B,T)
    t = 9                               # in the second, the longest sentence
    future = moved((torch.arange(idx.size(1)) > t).expand_as(idx))[1]                           # (T,)
    padding = moved(~real)[real].max().item()
    reach = torch.autograd.grad(logits[1, t].sum(), embedded[0], retain_graph=True)[0][1].abs().amax(-1)    # (T,)
    grads = torch.autograd.grad(logits.sum(), list(model.parameters()))
    return checks + [
        ("mask: the future changes nothing", future[:t + 1].max() == 0 < future[t + 1:].min(),
         f"other characters after {t} move logits up to {t} by {future[:t + 1].max():.0e}, later ones by {future[t + 1:].min():.1f} or more"),
        ("mask: no gradient from the future", reach[t + 1:].max() == 0 < reach[:t + 1].min(),
         f"d logit_{t} / d input is exactly 0 after {t}, at least {reach[:t + 1].min():.0e} before"),
        ("mask: padding changes nothing", padding == 0, f"other characters in the padding move real logits by {padding:.0e}"),
        ("mask: a fully padded row", all(g.isfinite().all() for g in (logits, *grads)), "no NaN in logits or gradients")]


def why_sqrt():
    """Interview question: why divide by sqrt(d_k)? 500 random queries against 64 keys, components of variance 1."""
    print("\n             variance   entropy of the softmax (max 4.16)   gradient through it, |d weights / d scores|\n"
          "       d_k    of q.k        plain     / sqrt(d_k)               plain     / sqrt(d_k)")
    random = torch.Generator().manual_seed(0)
    for d_k in (4, 16, 64, 256, 1024):
        q, k = torch.randn(500, 1, d_k, generator=random), torch.randn(500, 64, d_k, generator=random)
        dots, columns = (q @ k.mT).squeeze(1), []                                               # (500,1,64) -> (500,64)
        for scores in (dots, dots / math.sqrt(d_k)):
            w = scores.softmax(-1)
            jacobian = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]                      # (500,64,64)
            columns.append((torch.special.entr(w).sum(-1).mean(), jacobian.norm(dim=(1, 2)).mean()))
        (e0, g0), (e1, g1) = columns
        print(f"{d_k:10} {dots.var():9.1f} {e0:12.3f} {e1:12.3f} {g0:23.4f} {g1:12.4f}")
    print("q.k sums d_k products, so its variance is d_k: unscaled, the softmax becomes a hard choice and passes no gradient on.")


def which_dimension():
    """Interview question: over which dimension is the softmax? Over the keys; over the queries the future leaks in."""
    random = torch.Generator().manual_seed(0)
    q, k, v, other = (torch.randn(1, 1, 6, 16, generator=random) for _ in range(4))
    print("\nsoftmax over   what one query hands out, in all        output 2 moves when token 5 changes by")
    for name, dim in (("keys", -1), ("queries", -2)):
        def attend(q):
            return ScaledDotProductAttention().scores(q, k, attention_mask(6, 6)).softmax(dim)
        changed = torch.cat([q[:, :, :5], other[:, :, 5:]], 2)
        leak = (attend(q) @ v - attend(changed) @ v)[0, 0, 2].abs().max()
        print(f"{name:12}   {' '.join(f'{w:.2f}' for w in attend(q)[0, 0].sum(-1)):38}  {leak:.4f}")
    print("Over the queries a row is no longer a weighted mean, and each key divides by what later queries want: the future leaks.")


def positions(device):
    """What each kind of position can do beyond the length it was trained on (32), and whether only distance counts."""
    text = load_plays()[:400_000]
    tokenizer = CharTokenizer.train(text)
    ids, val_ids = (torch.tensor(tokenizer.encode(part), device=device) for part in split_text(text, 128))
    print("\nposition     loss at T = 32       64      128   (trained on 32)")
    for kind in ("learned", "sinusoidal", "rotary"):
        config = GPTConfig(vocab_size=len(tokenizer.vocabulary), context=32, n_layer=2, n_embd=64, position=kind, steps=200)
        torch.manual_seed(0)
        model, order = GPT(config).to(device), torch.Generator().manual_seed(0)
        optimizers = make_optimizers(model, config)
        for step in range(config.steps):
            window = ids[(torch.randint(len(ids) - 32, (32, 1), generator=order) + torch.arange(33)).to(device)]   # (32,33)
            train_step(model, optimizers, window[:, :-1], window[:, 1:], schedule(step, config))
        losses = [f"{evaluate(model, val_ids, T, 100):8.3f}" if T == 32 or kind != "learned" else "    none" for T in (32, 64, 128)]
        print(f"{kind:10}         {' '.join(losses)}")
    print("Learned has no row for position 32; sinusoidal sums are new to the model there; rotary knows distances, but only up to 31.")


def overfit(device, sentence="Server Engineer turns to AI", steps=100):
    """Feed one sentence; a model that works recites it. Returns the check."""
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
    print(f"given {sentence[0]!r} it says: {recited}")
    return "overfit: recites its sentence", recited == sentence and loss < 0.05, f"{right}/{len(sentence)} characters, loss {loss:.4f}"


# ---- use ------------------------------------------------------------------------------------------

def sample(model, tokenizer, prompt, max_new_tokens=400, stop="", **how):
    """The prompt and its continuation as text, up to and without `stop`. Raises BadInput for unknown characters."""
    if not prompt:
        raise BadInput("the prompt is empty; give --prompt at least one character")
    device, new = next(model.parameters()).device, []

    def on_token(token):
        new.append(token.item())
        return stop and stop in tokenizer.decode(new)
    generate(model, torch.tensor([tokenizer.encode(prompt)], device=device), max_new_tokens, on_token=on_token, **how)
    said = tokenizer.decode(new)
    return prompt + (said.partition(stop)[0] if stop else said)


def story(config, device, out):
    """All experiments, the training, and the acceptance checks; returns the exit status."""
    began = time.perf_counter()
    print("1. Masks: who may look at whom")
    checks = mask(out)
    why_sqrt()
    which_dimension()
    positions(device)
    print("\n2. Overfitting one sentence on purpose")
    checks.append(overfit(device))
    print("\n3. Training on Shakespeare")
    model, tokenizer, loss = train(config, device, out)
    verse = sample(model, tokenizer, "The King", 400, temperature=0.8, generator=torch.Generator().manual_seed(config.seed))
    print(f"\n{verse}\n")
    ids = torch.tensor([tokenizer.encode(verse)[:config.context]], device=device)               # (1,T)
    draw_attention(out / "attention.png", attention_maps(model, ids[:, :24])[-1][1][0], verse[:24], "What the last block's heads look at")
    cache = {}
    with torch.no_grad():
        steps = torch.cat([model(ids[:, t:t + 1], cache=cache)[0] for t in range(ids.size(1))], 1)      # (1,T,V)
        apart = (steps - model(ids)[0]).abs().max().item()
    text = read_text(config.text) if config.text else load_plays()
    bpe = BPETokenizer.train(text, 512)
    slow, fast = bpe.encode_by_hand(text), bpe.encode(text)
    print(f"byte-pair encoding: {len(text) / len(fast):.2f} characters a token; its longest: {sorted(bpe.vocabulary, key=len)[-8:]}")
    checks += [
        ("training: loss", loss < 1.75, f"{loss:.4f} nats per character over the whole validation text, wanted below 1.75"),
        ("cache: same logits with and without", apart < 1e-3, f"largest difference {apart:.0e}"),
        ("bpe: by hand equals tiktoken", np.array_equal(slow, fast), f"{len(fast):,} ids over the whole text"),
    ]
    status = report(checks)
    print(f"{time.perf_counter() - began:.0f} s in all; pictures and weights are in {out}")
    return status


@dataclasses.dataclass
class SampleConfig:
    prompt: str = flag("The King", "text to continue; beyond the context only its end counts")
    max_new_tokens: int = flag(400, "how many to add", 1)
    temperature: float = flag(0.8, "0 always takes the likeliest token", 0)
    top_k: int = flag(0, "draw from the k likeliest only; 0 is off", 0)
    top_p: float = flag(1.0, "draw from the likeliest that together have this probability", 0.01, 1)
    seed: int = flag(0, "of the draw", 0)
    stop: str = flag("", "end before this text")


def main(argv=None):
    common = Parser(add_help=False)
    common.add_argument("--device", default=argparse.SUPPRESS, help="cuda, mps or cpu (default: the best one present)")
    common.add_argument("--out", default=argparse.SUPPRESS, type=pathlib.Path, help="folder of weights and curves (default: out/lesson4)")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[common])
    parser.add_config(GPTConfig)
    commands = parser.add_subparsers(dest="command", metavar="{mask,overfit,positions,train,sample}")
    for name in ("mask", "overfit", "positions"):
        commands.add_parser(name, parents=[common], help="this part of the story alone")
    for name, config, text in (("train", GPTConfig, "train on a text"), ("sample", SampleConfig, "continue a prompt")):
        commands.add_parser(name, parents=[common], help=text).add_config(config)
    commands.choices["train"].add_argument("--resume", action="store_true", help="continue exactly where the last run in --out stopped")
    args = parser.parse_args(argv)
    device, out = pick_device(getattr(args, "device", "auto")), getattr(args, "out", OUT / "lesson4")
    if args.command == "mask":
        return report(mask(out))
    if args.command == "overfit":
        return report([overfit(device)])
    if args.command == "positions":
        return positions(device)
    if args.command == "sample":
        how = dataclasses.asdict(dataclasses.replace(SampleConfig(), **given(args, SampleConfig)))
        print(sample(*load_model(out, device), generator=torch.Generator().manual_seed(how.pop("seed")), **how))
        return 0
    if args.command == "train":
        base = GPTConfig(**load_checkpoint(out / "checkpoint.pt")["config"]) if args.resume else preset(device)
        train(dataclasses.replace(base, **given(args, GPTConfig)), device, out, args.resume)
        return 0
    return story(dataclasses.replace(preset(device), **given(args, GPTConfig)), device, out)


if __name__ == "__main__":
    cli(main)
