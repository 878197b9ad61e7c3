"""The numbers of lesson 4. Each prints a table and names the machine; run them on a machine that does nothing else.

    python tests/bench_lesson4.py shakespeare --text tinyshakespeare.txt [--nanogpt FOLDER]
    python tests/bench_lesson4.py attention         our attention against PyTorch's fused one, a training step
    python tests/bench_lesson4.py cache             sampling with and without the KV cache
    python tests/bench_lesson4.py ablation --text tinyshakespeare.txt [--steps 300]
`--device cuda` runs the first three on a GPU, with the lesson's and nanoGPT's settings for one.

tinyshakespeare.txt is the 1,115,394 characters of nanoGPT's data/shakespeare_char/input.txt; FOLDER is a clone of
github.com/karpathy/nanoGPT whose prepare.py has been run there: its published command then runs beside ours.
"""
import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lesson4_gpt as lesson
from bench_lesson2 import machine
from lesson3_charrnn import CharTokenizer, read_text, split_text

CPU = torch.device("cpu")
NANOGPT = {                             # the commands of nanoGPT's README
    "cpu": ["--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12", "--n_layer=4",
            "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"],
    "cuda": []}


def load(path):
    text = read_text(path)
    tokenizer = CharTokenizer.train(text)
    return tokenizer, *(torch.tensor(tokenizer.encode(part)) for part in split_text(text, 256))


def fit(config, ids, seed):
    """Train on ids with nothing but the training step; returns (model, seconds)."""
    torch.manual_seed(seed)
    model, order = lesson.GPT(config), torch.Generator().manual_seed(seed)
    optimizers, precision, began = lesson.make_optimizers(model, config), lesson.autocast(config, CPU), time.perf_counter()
    for step in range(config.steps):
        window = ids[torch.randint(len(ids) - config.context, (config.batch_size, 1), generator=order) + torch.arange(config.context + 1)]
        lesson.train_step(model, optimizers, window[:, :-1], window[:, 1:], lesson.schedule(step, config), 1, precision)
    return model, time.perf_counter() - began


def shakespeare(args):
    """Whole commands, their wall time, and the loss over the whole validation split by one evaluator."""
    _, _, val = load(args.text)
    runs, short, compiled, theirs = [], [], [], []
    with tempfile.TemporaryDirectory() as tmp:
        def ours(seed, *flags):
            out, began = pathlib.Path(tmp) / f"{seed}-{len(flags)}", time.perf_counter()
            subprocess.run([sys.executable, lesson.__file__, "train", "--text", args.text, "--device", args.device, "--seed", str(seed),
                            "--out", out, *flags], check=True, stdout=subprocess.DEVNULL)
            seconds, (model, _) = time.perf_counter() - began, lesson.load_model(out, args.device)
            return seconds, lesson.evaluate(model, val.to(args.device), model.config.context)
        for seed in range(args.seeds):
            if args.nanogpt:
                theirs.append(nanogpt(args.nanogpt, val, args.device))
                print(f"nanoGPT, its {args.device} command    {theirs[-1][0]:6.1f} s   loss {theirs[-1][1]:.4f}", flush=True)
            runs.append(ours(seed))
            print(f"lesson4_gpt.py train         {runs[-1][0]:6.1f} s   loss {runs[-1][1]:.4f}   seed {seed}", flush=True)
            for rows, name, flags in ((short, "--steps 240", ["--steps", "240"]), (compiled, "--compile", ["--compile"])):
                if (rows is compiled) == (args.device == "cuda"):
                    rows.append(ours(seed, *flags))
                    print(f"the same with {name:14} {rows[-1][0]:6.1f} s   loss {rows[-1][1]:.4f}   seed {seed}", flush=True)
    for name, rows in (("nanoGPT", theirs), ("lesson 4", runs), ("lesson 4, --steps 240", short), ("lesson 4, --compile", compiled)):
        if rows:
            print(f"median of {len(rows)}: {name:22} {statistics.median(r[0] for r in rows):6.1f} s   "
                  f"loss {statistics.median(r[1] for r in rows):.4f}")
    if theirs:
        ratios = [statistics.median(r[0] for r in rows) / statistics.median(r[0] for r in theirs) for rows in (runs, short or compiled)]
        print(f"time against nanoGPT's: {ratios[0]:.2f} for the whole run, {ratios[1]:.2f} for the other one")


def nanogpt(folder, val, device):
    """Run the command of nanoGPT's README; (seconds, loss of its checkpoint over the whole split in windows of its context)."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT[device], f"--out_dir={out}"], cwd=folder,
                       check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        sys.path.insert(0, folder)
        import model as theirs
        saved = torch.load(pathlib.Path(out) / "ckpt.pt", map_location="cpu", weights_only=True)
        model = theirs.GPT(theirs.GPTConfig(**saved["model_args"]))
        model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()})
        return seconds, lesson.evaluate(model.to(device), val.to(device), model.config.block_size)


def attention(args):
    """One training step, forward to update, with our attention and with F.scaled_dot_product_attention, in turns."""
    def fused(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), None
    config = lesson.GPTConfig(**(lesson.GPU if args.device == "cuda" else {}) | {"vocab_size": 65})
    x = torch.randint(65, (config.batch_size, config.context + 1), device=args.device)
    model, times = lesson.GPT(config).to(args.device), {"by hand": [], "fused": []}
    optimizers, precision = lesson.make_optimizers(model, config), lesson.autocast(config, torch.device(args.device))
    for turn in range(60):
        for name in times:
            patch = mock.patch.object(lesson.ScaledDotProductAttention, "forward", fused)
            with patch if name == "fused" else contextlib.nullcontext():
                began = time.perf_counter()
                lesson.train_step(model, optimizers, x[:, :-1], x[:, 1:], 1, 1, precision)
                times[name].append(time.perf_counter() - began)
    hand, fused = (statistics.median(t[10:]) * 1000 for t in times.values())
    print(f"training step, median of 50: by hand {hand:.1f} ms, fused {fused:.1f} ms, ratio {hand / fused:.2f}")


def cache(args):
    """512 tokens from one character, with and without the cache, at the default context and at one that holds them all."""
    for context in (128, 640):
        torch.manual_seed(0)
        model, times = lesson.GPT(lesson.GPTConfig(vocab_size=65, context=context)).to(args.device), {True: [], False: []}
        for _ in range(3):
            for cached in times:
                began = time.perf_counter()
                lesson.generate(model, torch.zeros(1, 1, dtype=torch.long, device=args.device), 512, cached=cached)
                times[cached].append(time.perf_counter() - began)
        with_, without = (statistics.median(t) for t in times.values())
        print(f"context {context}: 512 tokens in {with_:.2f} s with the cache ({512 / with_:.0f} tokens/s), {without:.2f} s without: "
              f"{without / with_:.1f} times faster")


@contextlib.contextmanager
def attribute(owner, name, value):
    with mock.patch.object(owner, name, value):
        yield


def after_init(change):
    """GPT whose constructor ends with change(model)."""
    honest = lesson.GPT.__init__

    def init(self, config):
        honest(self, config)
        change(self)
    return attribute(lesson.GPT, "__init__", init)


def random_projections(model):
    for block in model.blocks:
        for layer in (block.attention.out, block.down):
            torch.nn.init.normal_(layer.weight, std=layer.in_features ** -0.5 / (2 * len(model.blocks)) ** 0.5)


def tie(model):
    torch.nn.init.normal_(model.token.weight, std=0.02)
    model.head.weight = model.token.weight


def gelu_forward(self, x, mask, rotation=None, cache=None):
    x = x + self.dropout(self.attention(lesson.norm(x), mask, rotation, cache))
    return x + self.dropout(self.down(F.gelu(self.up(lesson.norm(x)))))


def adamw_only(model, config):
    matrices, rest = list(model.blocks.parameters()), [p for n, p in model.named_parameters() if not n.startswith("blocks")]
    optimizers = [torch.optim.AdamW(group, config.adam_lr, betas=(0.9, 0.95), weight_decay=0.1) for group in (matrices, rest)]
    for o in optimizers:
        o.param_groups[0]["initial_lr"] = config.adam_lr
    return optimizers


HONEST_NORM = lesson.norm
VARIANTS = {                                    # name: (what changes in the config, a context that patches the lesson)
    "as shipped": ({}, contextlib.nullcontext),
    "AdamW instead of Muon": ({}, lambda: attribute(lesson, "make_optimizers", adamw_only)),
    "learned positions": ({"position": "learned"}, contextlib.nullcontext),
    "sinusoidal positions": ({"position": "sinusoidal"}, contextlib.nullcontext),
    "no token shift": ({}, lambda: after_init(lambda model: model.shift.requires_grad_(False))),
    "no QK-norm": ({}, lambda: attribute(lesson, "norm", lambda x: x if x.dim() == 4 else HONEST_NORM(x))),
    "LayerNorm": ({}, lambda: attribute(lesson, "norm", lambda x: F.layer_norm(x, x.shape[-1:]))),
    "GELU": ({}, lambda: attribute(lesson.Block, "forward", gelu_forward)),
    "random projections": ({}, lambda: after_init(random_projections)),
    "head tied to embedding": ({}, lambda: after_init(tie)),
    "no soft cap": ({}, lambda: attribute(lesson, "SOFT_CAP", 1e4)),
    "batch 16": ({"batch_size": 16}, contextlib.nullcontext),
}


def ablation(args):
    """Each variant gets the time that the shipped model takes for --steps steps, and its loss over the whole validation
    split is compared. A machine's speed drifts, so time is not taken from a clock in training: a variant's steps are first
    timed in turns with the shipped one's, and it then takes as many steps as fit."""
    tokenizer, ids, val = load(args.text)
    shipped, base = lesson.GPTConfig(vocab_size=len(tokenizer.vocabulary), steps=6), None
    print(f"the time of {args.steps} shipped steps, {args.seeds} seeds\n{'variant':24} steps   loss      std      against shipped")
    for name, (changes, patch) in VARIANTS.items():
        config, ratios = dataclasses.replace(shipped, **changes), []
        for _ in range(6):
            with patch():
                seconds = fit(config, ids, 0)[1]
            ratios.append(seconds / fit(shipped, ids, 0)[1])
        config.steps = round(args.steps / statistics.median(ratios)) if changes or patch is not contextlib.nullcontext else args.steps
        with patch():
            losses = [lesson.evaluate(fit(config, ids, seed)[0], val, config.context) for seed in range(args.seeds)]
        mean = statistics.mean(losses)
        base = base or mean
        print(f"{name:24} {config.steps:5} {mean:8.4f} {statistics.stdev(losses):8.4f} {mean - base:+9.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["shakespeare", "attention", "cache", "ablation"])
    parser.add_argument("--text")
    parser.add_argument("--nanogpt")
    parser.add_argument("--device", choices=list(NANOGPT), default="cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(f"{machine(args.device)}, "
          f"bf16: {not isinstance(lesson.autocast(lesson.GPTConfig(), torch.device(args.device)), contextlib.nullcontext)}")
    globals()[args.what](args)
