"""Lesson 2: a Fashion-MNIST classifier, and what a long training run owes the person who waits for it."""
import csv                              # the numbers behind a plot
import sys                              # is stdout a terminal?
import time                             # tokens per second, time left

import torch                            # tensors, autograd, nn

from lesson1_linreg import BadInput, replacing

# ---- habits of a training run: device, progress, curves (lessons 2 to 6 use these) ----------------

def pick_device(name="auto"):
    """'auto' is the best device present, cuda then mps then cpu; any other name must be one torch can use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
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
        self.began = time.perf_counter()
        self.shown = self.began if not self.tty else 0.0

    def __call__(self, step, units, **values):
        """Step `step` (counted from 1) is done; `units` were processed since the start; values are printed by name."""
        now, last = time.perf_counter(), step >= self.total
        if now - self.shown < self.every and not last:
            return
        self.shown, elapsed = now, now - self.began
        rate = units / elapsed
        left = elapsed / max(step - self.start, 1) * (self.total - step)
        text = "  ".join([f"{self.name} {step:>{len(str(self.total))}}/{self.total}"]
                         + [f"{k} {v:.4f}" for k, v in values.items() if v is not None]
                         + [f"{rate / 1000:.1f}k {self.unit}/s" if rate >= 1000 else f"{rate:.0f} {self.unit}/s",
                            f"{elapsed:.0f} s in all" if last else f"{int(left) // 60}:{int(left) % 60:02d} left"])
        end = "\n" if last or not self.tty else ""
        print(("\r\033[K" if self.tty else "") + text, end=end, flush=True)


def save_csv(path, rows):
    """rows: a list of dicts with the same keys, one line each."""
    with replacing(path) as tmp, open(tmp, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
