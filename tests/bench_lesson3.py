"""The numbers of lesson 3, measured:

    python tests/bench_lesson3.py loss --text FILE     validation loss and spelling on FILE, e.g. tiny Shakespeare
    python tests/bench_lesson3.py speed                a training step of our LSTM against nn.LSTM's
    python tests/bench_lesson3.py kill                 20 kills at random moments, resumed, compared bit by bit
"""
import argparse
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench_lesson2 import machine   # noqa: E402
from lesson3_charrnn import (CharLSTM, CharTokenizer, RNNConfig, clip_, evaluate, generate, load_checkpoint,   # noqa: E402
                             load_model, loss_of, read_text, split_text, train, words)


def bench_loss(text, seeds, flags):
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(text, pathlib.Path(folder), seed=seed, **flags)
            took = time.perf_counter() - began
            model, tokenizer = load_model(pathlib.Path(folder) / "best.ckpt")
        val = torch.tensor(tokenizer.encode(split_text(text, 256)[1]))
        written = ["The King" + generate(model, tokenizer, "The King", 2000, temperature=0.8, seed=s) for s in range(3)]
        made, known = words(" ".join(s[:s.rfind(" ")] for s in written)), set(words(text))
        results.append([took, *(evaluate(model, val, n) for n in (64, 128, 256, len(val))), sum(w in known for w in made) / len(made)])
        print("seed %d: %.0f s in all; loss in windows of 64 %.4f, 128 %.4f, 256 %.4f, carried %.4f; words in the text %.2f%%"
              % (seed, *results[-1][:-1], 100 * results[-1][-1]), flush=True)
    for name, column in zip(("seconds", "windows of 64", "windows of 128", "windows of 256", "carried", "words in the text"), zip(*results)):
        spread = f" ± {statistics.stdev(column):.4f}" if len(column) > 1 else ""
        print(f"{name:20} mean {statistics.mean(column):.4f}{spread}, worst {max(column) if name != 'words in the text' else min(column):.4f}")


class Library(CharLSTM):
    """The same model around nn.LSTM."""

    def __init__(self, config, V):
        super().__init__(config, V)
        self.lstm = nn.LSTM(config.embed, config.hidden, config.layers)

    def forward(self, idx, state=None):
        y, (h, c) = self.lstm(self.embed(idx.T), (state[:, 0].contiguous(), state[:, 1].contiguous()))
        return self.head(y.transpose(0, 1)), torch.stack([h, c], 1)


def bench_speed(repeats):
    """Forward, backward, clipping and AdamW of one step, both in float32; in turns, so that a busy machine disturbs
    both alike."""
    print(f"{'training step, median, ms':34}{'nn.LSTM':>9}{'by hand':>9}{'ratio':>7}")
    default, threads = RNNConfig(), torch.get_num_threads()
    for hidden, embed, batch, cores in (*((default.hidden, default.embed, default.batch_size, n) for n in sorted({1, threads})),
                                        (256, 256, 64, threads), (512, 512, 32, threads), (128, 64, 32, threads)):
        torch.set_num_threads(cores)
        config = RNNConfig(hidden=hidden, embed=embed, batch_size=batch, dropout=0.0)
        models = [Library(config, 65), CharLSTM(config, 65)]
        optimizers = [torch.optim.AdamW(m.parameters(), 1e-3, fused=True) for m in models]
        idx, state = torch.randint(65, (batch, config.context + 1)), torch.zeros(config.layers, 2, batch, hidden)
        times = [[], []]
        for _ in range(repeats + 1):
            for model, optimizer, taken in zip(models, optimizers, times):
                began = time.perf_counter()
                loss = loss_of(model(idx[:, :-1], state)[0], idx[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                clip_(list(model.parameters()), 1.0)
                optimizer.step()
                taken.append(time.perf_counter() - began)
        theirs, ours = (1e3 * statistics.median(t[1:]) for t in times)
        print(f"2 x {hidden}, D {embed}, B {batch}, T {config.context}, threads {cores}".ljust(34)
              + f"{theirs:9.1f}{ours:9.1f}{ours / theirs:7.2f}", flush=True)


def bench_kill(kills, seed):
    shuffle = random.Random(seed)
    text = "".join(shuffle.choice(["The King hath sent.\n", "My lord, good night.\n", "So, speak no more.\n", "KING\n"]) for _ in range(1000))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "text.txt").write_text(text, encoding="utf-8")
        command = [sys.executable, ROOT / "lesson3_charrnn.py", "train", "--text", folder / "text.txt", "--device", "cpu"]
        sizes = "--hidden 16 --batch-size 4 --context 16 --steps 3000 --eval-every 20 --warmup 10 --dropout 0.1".split()
        subprocess.run([*command, "--out", folder / "whole", *sizes], check=True, stdout=subprocess.DEVNULL)
        killed, steps = 0, []
        while killed < kills:
            process = subprocess.Popen([*command, "--out", folder / "killed", *(["--resume"] if killed else sizes)],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            while not (folder / "killed" / "last.ckpt").exists():
                time.sleep(0.01)
            if killed:
                process.stdout.readline()                       # the line before the first step: it has resumed
            time.sleep(shuffle.uniform(0, 0.4))
            process.kill()
            if process.wait() == 0:
                raise SystemExit("the run ended before the kills: make it longer")
            killed += 1
            steps.append(load_checkpoint(folder / "killed" / "last.ckpt")["step"])
        print("killed after steps", *steps)
        subprocess.run([*command, "--out", folder / "killed", "--resume"], check=True, stdout=subprocess.DEVNULL)
        a, b = (load_checkpoint(folder / name / "last.ckpt") for name in ("whole", "killed"))
        same = all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        print(f"{kills} kills: finished weights bitwise equal: {same}; all {len(a['rows'])} losses equal: {a['rows'] == b['rows']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "speed", "kill"])
    parser.add_argument("--text", help="the text for `loss`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of RNNConfig other than the default")
    args = parser.parse_args()
    print(machine(), flush=True)
    if args.what == "loss":
        kinds = RNNConfig.__annotations__
        bench_loss(read_text(args.text), args.seeds, {k: kinds[k](v) for k, v in (pair.split("=") for pair in args.set)})
    elif args.what == "speed":
        bench_speed(args.repeats)
    else:
        bench_kill(20, args.seeds[0])
