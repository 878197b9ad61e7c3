"""Lesson 1: linear regression, y = Xw + b, from tensors and autograd alone (no nn.Linear, no torch.optim).

    python lesson1_linreg.py                    the whole story, three seconds on a laptop
    python lesson1_linreg.py --features 7       more weights
    python lesson1_linreg.py --lr 1.5           what a learning rate that is too large does

You will see which tensor operations copy; broadcasting, and the bug it hides; one gradient by four methods; w.grad at
every iteration; w and b within 0.01 of the truth; what each forgotten line of the training loop costs; and
out/lesson1/linreg.png with its numbers in linreg.csv. It ends with PASS/FAIL lines, exit status 1 on any FAIL.
Left out on purpose: layers and optimizers (lesson 2); an autograd on whole tensors (ours handles one number at a time).
Sources: Linnainmaa 1970 (reverse-mode differentiation), Robbins and Monro 1951 (steps along noisy gradients).
Letters for shapes: N samples, D features, B samples in a mini-batch.
"""
import argparse                         # the command line
import contextlib                       # `with replacing(path)`: files that are whole or not there
import csv                              # the numbers behind a plot
import dataclasses                      # a config is a dataclass; its fields are the flags
import math                             # exp, log
import os                               # os.replace, the atomic rename
import pathlib                          # paths on every system
import sys                              # stderr, exit status

import torch                            # tensors, and an autograd to compare ours with

OUT = pathlib.Path(__file__).resolve().parent / "out" / "lesson1"

# ---- tensors: a flat block of memory and a way to look at it --------------------------------------

VIEWS = ["x", "x.view(6, 4)", "x.reshape(6, 4)", "x[:, 1]", "x.permute(0, 2, 1)", "x[:1].expand(5, 3, 4)"]
COPIES = ["x.permute(0, 2, 1).contiguous()", "x.permute(0, 2, 1).reshape(8, 3)", "x[[1, 0]]", "x + 0"]


def show_memory():
    """Shape, stride (distance in memory of neighbours along each axis) and place of some views and copies of x."""
    x = torch.arange(24).view(2, 3, 4)                          # (24,) -> (2,3,4)
    print(f"{'expression':33}{'shape':11}{'stride':12}{'contiguous':12}memory, by data_ptr()")
    for expression in VIEWS + COPIES:
        y = eval(expression, {"x": x})                          # so that what is printed is what ran
        far = y.data_ptr() - x.data_ptr()
        print(f"{expression:33}{str(tuple(y.shape)):11}{y.stride()!s:12}{'yes' if y.is_contiguous() else 'no':12}"
              + (f"x's own, from byte {far}" if 0 <= far < x.nbytes else "a copy"))
    try:
        x.permute(0, 2, 1).view(8, 3)
    except RuntimeError:
        print("x.permute(0, 2, 1).view(8, 3)    RuntimeError: no stride reads the elements in that order")
    print("Read: a new shape, stride or start is free; view refuses what these cannot say, reshape then copies.\n")


def broadcast_shape(a, b):
    """The shape of (tensor of shape a) + (tensor of shape b), None if they do not fit. Aligned at the right, two
    sizes must be equal or one of them 1 (or absent); a 1 is repeated, by stride 0, without a copy."""
    a, b = ((1,) * (max(len(a), len(b)) - len(s)) + tuple(s) for s in (a, b))
    fits = all(m == n or 1 in (m, n) for m, n in zip(a, b))
    return tuple(n if m == 1 else m for m, n in zip(a, b)) if fits else None


def show_broadcasting():
    """The rule on five pairs of shapes, and the bug that it makes silent."""
    for a, b in [((256, 3), (3,)), ((256, 3), (256, 1)), ((8, 1, 5), (7, 1)), ((256, 3), (256,)), ((256, 1), (256,))]:
        print(f"{a!s:11} + {b!s:9} -> {broadcast_shape(a, b) or 'error'}")
    y = torch.linspace(-3, 3, 256)
    pred = y[:, None]                                           # (256,) -> (256,1): a perfect prediction, as a column
    right = (pred[:, 0] - y).square().mean()                    # (256,)
    wrong = (pred - y).square().mean()                          # (256,1) - (256,) -> (256,256)
    print(f"Read: the last row is the silent bug. A perfect prediction (256,1) of a target (256,) has loss {wrong:.2f},"
          f"\nnot {right:.2f}: all 65536 pairs are compared; the mean of y minimises that. So loss() asserts shapes.\n")


# ---- autograd: reverse mode -----------------------------------------------------------------------

class Value:
    """A number that knows what it was computed from; backward() gives every such v d(self)/dv in v.grad.

    Forward, an operation stores for each input the derivative of its output by it. Backward walks from the result to
    the leaves (what was given, not computed) and adds (gradient of the output) x (that derivative) to each input: the
    chain rule. One walk serves all inputs, be they a billion weights; that is why training is affordable."""

    def __init__(self, data, inputs=()):
        self.data, self.inputs, self.grad = float(data), inputs, 0.0        # inputs: (Value, local derivative) pairs

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, [(self, other.data), (other, self.data)])

    def __pow__(self, n):               # n is a plain number
        return Value(self.data ** n, [(self, n * self.data ** (n - 1))])

    def exp(self):
        return Value(math.exp(self.data), [(self, math.exp(self.data))])

    def log(self):
        return Value(math.log(self.data), [(self, 1 / self.data)])

    def relu(self):
        return Value(max(self.data, 0.0), [(self, float(self.data > 0))])

    __radd__, __rmul__, __neg__ = __add__, __mul__, lambda self: self * -1
    __sub__, __rsub__ = lambda self, other: self + -1 * other, lambda self, other: -self + other
    __truediv__, __rtruediv__ = lambda self, other: self * other ** -1, lambda self, other: self ** -1 * other

    def backward(self):
        """Adds to .grad, as torch does: a second call, or a second loss, accumulates."""
        order, seen, stack = [], set(), [(self, False)]     # a stack: a graph is deeper than Python may recurse
        while stack:
            node, inputs_done = stack.pop()
            if inputs_done:
                order.append(node)                          # later than all its inputs
            elif node not in seen:
                seen.add(node)
                stack += [(node, True)] + [(v, False) for v, _ in node.inputs]
        flow = dict.fromkeys(order, 0.0)                    # this call's gradients, apart from earlier ones in .grad
        flow[self] = 1.0
        for node in reversed(order):                        # all uses of node come before it, so its flow is complete
            node.grad += flow[node]
            for v, derivative in node.inputs:
                flow[v] += flow[node] * derivative


# ---- config, data, model, loss --------------------------------------------------------------------

def flag(default, help, low=None, high=None, choices=None):
    """A config field that is also a command-line flag; `low` and `high` are inclusive bounds."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclasses.dataclass
class Config:
    features: int = flag(2, "D, numbers that describe a sample", 1, 100)
    samples: int = flag(1000, "N, samples to fit", 10, 1_000_000)
    noise: float = flag(0.05, "standard deviation of the noise on y", 0, 1000)
    lr: float = flag(0.1, "learning rate: the step is lr times the gradient", 0, 1000)
    batch_size: int = flag(100, "B, samples per update", 1, 1_000_000)
    epochs: int = flag(5, "passes over the samples", 1, 10_000)
    seed: int = flag(0, "seed of the data and of their order", 0, 2**63 - 1)


def make_data(config, generator):
    """X (N,D), y (N,1) = X true_w + true_b + noise, true_w (D,1), true_b (1,)."""
    X = torch.randn(config.samples, config.features, generator=generator)
    true_w = torch.empty(config.features, 1).uniform_(-3, 3, generator=generator)
    true_b = torch.empty(1).uniform_(-3, 3, generator=generator)
    noise = config.noise * torch.randn(config.samples, 1, generator=generator)
    return X, predict(X, true_w, true_b) + noise, true_w, true_b


def predict(X, w, b):
    return X @ w + b                                            # (B,D) @ (D,1) + (1,) -> (B,1)


def loss(pred, y):
    """Mean squared error of pred (B,1) from y (B,1), a scalar."""
    assert pred.shape == y.shape, f"{tuple(pred.shape)} and {tuple(y.shape)} would broadcast"
    return (pred - y).square().mean()


def with_ones(X):
    """(N,D) -> (N,D+1): X with a column of ones, whose weight is b."""
    return torch.cat([X, X.new_ones(len(X), 1)], 1)


def least_squares(X, y):
    """The smallest loss there is, in closed form: w (D,1), b (1,)."""
    solution = torch.linalg.lstsq(with_ones(X), y).solution     # (N,D+1), (N,1) -> (D+1,1)
    return solution[:-1], solution[-1]


def four_gradients(X, y):
    """d loss / d (w, b) at one point by four methods: {name: (D+1,)}, float64."""
    X, y, h = with_ones(X).double(), y.double(), 1e-6
    w = torch.linspace(-1, 1, X.shape[1], dtype=X.dtype)[:, None].requires_grad_()      # (D+1,) -> (D+1,1)
    loss(X @ w, y).backward()
    own = [Value(v) for v in w.flatten().tolist()]
    errors = [sum(v * x for v, x in zip(own, row)) - target for row, target in zip(X.tolist(), y.flatten().tolist())]
    (sum(e ** 2 for e in errors) / len(errors)).backward()
    with torch.no_grad():
        nudges = h * torch.eye(len(w), dtype=X.dtype)[:, :, None]                   # (D+1,D+1,1), one weight each
        finite = [(loss(X @ (w + n), y) - loss(X @ (w - n), y)) / (2 * h) for n in nudges]
        analytic = 2 / len(X) * X.T @ (X @ w - y)               # (D+1,N) @ (N,1) -> (D+1,1)
    return {"autograd": w.grad[:, 0], "analytic": analytic[:, 0], "finite difference": torch.stack(finite),
            "own engine": torch.tensor([v.grad for v in own], dtype=X.dtype)}


# ---- training -------------------------------------------------------------------------------------

def train(X, y, config, generator, log=lambda *row: None):
    """Mini-batch gradient descent. Returns w (D,1), b (1,) and rows (loss, |w.grad|), one per iteration.

    log(iteration, loss, w, b) is called at every iteration. Raises BadInput when the loss explodes."""
    w, b = torch.zeros(X.shape[1], 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    rows, start = [], loss(predict(X, w, b), y).item()
    for _ in range(config.epochs):
        for i in torch.randperm(len(X), generator=generator).split(config.batch_size):  # every sample once an epoch
            w.grad = b.grad = None                              # 1. zero: gradients would add up
            batch_loss = loss(predict(X[i], w, b), y[i])        # 2. forward: compute, and record the graph
            batch_loss.backward()                               # 3. backward: walk it, fill w.grad and b.grad
            log(len(rows) + 1, batch_loss.item(), w, b)
            rows.append((batch_loss.item(), w.grad.norm().item()))
            if not rows[-1][0] <= 100 * start:                  # nan is not <= anything
                # In the steepest direction the loss is a parabola of curvature e; a step multiplies the distance to its
                # bottom by 1 - lr * e, and beyond lr = 2 / e that is less than -1: further away, on the other side.
                limit = 2 / torch.linalg.eigvalsh(2 / len(X) * with_ones(X).T @ with_ones(X))[-1].item()
                raise BadInput(f"diverged: loss {start:.3g} at first, {rows[-1][0]:.3g} after {len(rows)} iterations; "
                               f"steps of --lr {config.lr:g} overshoot the minimum. On these data the limit is about "
                               f"{limit:.2g}, lower with small batches: try --lr {limit / 5:.1g}")
            with torch.no_grad():                               # 4. update: not a part of the next graph
                w -= config.lr * w.grad
                b -= config.lr * b.grad
    return w.detach(), b.detach(), rows


# ---- experiments ----------------------------------------------------------------------------------

def show_omissions(X, y, lr=0.1, iterations=25):
    """Interview question: write the training loop. Here is why none of its steps can be left out or moved. Returns
    {what was spoilt: last loss}."""
    X, final = with_ones(X), {}                                 # b is the last weight: one tensor to update
    print(f"\n{'spoilt':34}{'loss at 1':>9}{'2':>8}{'3':>8}{iterations:8}   |w.grad| at 1{'2':>8}{iterations:8}")
    for what in ("nothing", "zero: gradients add up", "update: nothing moves", "order: update before backward",
                 "no_grad: the update is recorded"):
        spoilt, w, rows = what.split(":")[0], torch.zeros(X.shape[1], 1, requires_grad=True), []
        w.grad = torch.zeros_like(w)
        try:
            for _ in range(iterations):
                if spoilt != "zero":
                    w.grad.zero_()
                value = loss(X @ w, y)
                if spoilt != "order":
                    value.backward()
                if spoilt != "update":
                    with torch.set_grad_enabled(spoilt == "no_grad"):
                        w -= lr * w.grad
                if spoilt == "order":
                    value.backward()
                rows.append((value.item(), w.grad.norm().item()))
            (l1, g1), (l2, g2), (l3, _), (final[spoilt], g) = *rows[:3], rows[-1]
            print(f"{what:34}{l1:9.3f}{l2:8.3f}{l3:8.3f}{final[spoilt]:8.3f}{g1:16.3f}{g2:8.3f}{g:8.3f}")
        except RuntimeError as e:
            print(f"{what:34}RuntimeError: {e}")
    print("Read: unzeroed gradients add up, and the sum swings past the minimum for ever; an update before backward"
          "\nuses the zeros just written (with w.grad = None, as in train(), a TypeError); recording one is refused.\n")
    return final


def show_batch_noise(X, y, generator):
    """How far, relative to its length, the gradient of B samples is from that of all: {B: distance}, at w = b = 0."""
    each = -2 * y * with_ones(X)                                # (N,1) * (N,D+1) -> (N,D+1), one gradient a sample
    distance = {}
    for B in (1, 10, 100):
        drawn = each[torch.randint(len(X), (500, B), generator=generator)].mean(1)      # (500,B,D+1) -> (500,D+1)
        distance[B] = ((drawn - each.mean(0)).norm(dim=1).mean() / each.mean(0).norm()).item()
    print("batch size and the error of its gradient:  " + "   ".join(f"{B}: {d:.0%}" for B, d in distance.items()))
    print("Read: a batch 100 times as large costs 100 times as much and is 10 times as exact; so many rough steps win.")
    return distance


def plot(path, X, y, w, b, rows):
    """Left y against the first feature, less what the others explain, with the fitted line; right the loss."""
    figure, (left, right) = new_figure(1, 2, (11, 4))
    x, rest = X[:500, 0], y[:500, 0] - X[:500, 1:] @ w[1:, 0]   # (500,D-1) @ (D-1,) -> (500,)
    left.plot(x, rest, ".", color="0.6", label="data")
    left.plot(x, w[0] * x + b, "k", label="fit")
    left.set(title="The fitted line runs through the data", xlabel="x[0]",
             ylabel="y, less w[i] x[i] of the other features")
    left.legend()
    right.semilogy(range(1, len(rows) + 1), [value for value, _ in rows], "k")
    right.set(title=f"The loss falls from {rows[0][0]:.2g} to {rows[-1][0]:.2g}", xlabel="iteration",
              ylabel="mean squared error")
    save_figure(path, figure)


# ---- shared by all six lessons: config, errors, files, checks -------------------------------------

class BadInput(Exception):
    """What the user gave cannot be used. The message names the cause and the way out; `cli` prints it, exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line on stderr instead of the whole usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

    def add_config(self, config):
        """One --flag per field of the dataclass `config`. Flags that are not given stay out of the namespace,
        so `given(args, config)` holds only what the user asked for and a preset can supply the rest."""
        for field in dataclasses.fields(config):
            meta, name = field.metadata, "--" + field.name.replace("_", "-")
            text = f"{meta['help']} (default: {field.default})".replace("%", "%%")      # argparse formats it with %
            common = dict(dest=field.name, default=argparse.SUPPRESS, help=text)
            if field.type is bool:
                self.add_argument(name, action=argparse.BooleanOptionalAction, **common)
            else:
                self.add_argument(name, type=_bounded(field.type, meta["low"], meta["high"]), choices=meta["choices"],
                                  metavar=None if meta["choices"] else field.type.__name__.upper(), **common)


def _bounded(kind, low, high):
    def parse(text):
        value = kind(text)              # a test that nan, false in every comparison, does not pass:
        if not ((low is None or value >= low) and (high is None or value <= high)):
            bounds = ["" if v is None else str(v) for v in (low, high)]
            raise argparse.ArgumentTypeError(f"{text} is not in {'..'.join(bounds)}")
        return value
    parse.__name__ = kind.__name__      # argparse says "invalid int value: 'x'"
    return parse


def given(args, config):
    """The fields of the dataclass `config` that the user set on the command line, as a dict."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(config) if hasattr(args, f.name)}


@contextlib.contextmanager
def replacing(path):
    """`with replacing(p) as tmp`: write to tmp; p then changes in one rename, so a crash leaves the old file whole."""
    path = pathlib.Path(path)
    tmp = path.with_name(f".{os.getpid()}.{path.name}")         # same folder (rename cannot cross disks), same suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())        # the bytes must be on disk before the name points to them
        os.replace(tmp, path)
    except OSError as e:                # disk full, no permission, a folder of that name
        raise BadInput(f"cannot write {path}: {e.strerror or e}; what was there before is untouched") from e
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def save_csv(path, rows):
    """rows: a list of dicts with the same keys, one line each."""
    with replacing(path) as tmp, open(tmp, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def new_figure(rows=1, cols=1, size=(7, 4)):
    """matplotlib's subplots, without a window: (figure, axes)."""
    import matplotlib                   # here, not on top: half a second that only plotting should pay
    matplotlib.use("Agg")               # draw into files; works over ssh and in CI
    import matplotlib.pyplot as plt
    return plt.subplots(rows, cols, figsize=size)


def save_figure(path, figure):
    """Write a matplotlib figure as a 150 dpi PNG and close it."""
    import matplotlib.pyplot as plt
    with replacing(path) as tmp:
        figure.savefig(tmp, dpi=150, bbox_inches="tight")
    plt.close(figure)


def report(checks):
    """Print (name, passed, detail) triples as PASS/FAIL lines; returns the exit status, 1 if any failed."""
    print()
    for name, passed, detail in checks:
        print(f"{'PASS' if passed else 'FAIL'}  {name}: {detail}")
    return 0 if all(passed for _, passed, _ in checks) else 1


def cli(main):
    """Run main() as a program: UTF-8 on any terminal, one line and exit code 2 for bad input, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")     # a Windows console may be cp1252 or cp936
    try:
        status = main()
        sys.stdout.flush()              # here, where a closed pipe is caught
        sys.exit(status)
    except (BadInput, torch.OutOfMemoryError) as e:
        print(f"{pathlib.Path(sys.argv[0]).name}: {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:             # `python lesson.py | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or the flush at exit complains
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- main -----------------------------------------------------------------------------------------

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_config(Config)
    config = Config(**given(parser.parse_args(), Config))
    generator = torch.Generator().manual_seed(config.seed)      # our own: what other code draws cannot change it
    show_memory()
    show_broadcasting()
    X, y, true_w, true_b = make_data(config, generator)
    gradients = four_gradients(X[:50], y[:50])
    apart = max((g - gradients["autograd"]).abs().max().item() for g in gradients.values())
    for name, g in gradients.items():
        print(f"d loss/d (w, b) by {name:18} {' '.join(f'{v:13.9f}' for v in g[:5])}")
    print(f"Read: four methods, one gradient; they differ by {apart:.0e}, the error of the finite difference.\n")

    def log(iteration, value, w, b):
        shown = " ".join(f"{v:9.5f}" for v in w.grad[:4, 0]) + (" ..." if len(w) > 4 else "")
        print(f"iteration {iteration:4}  loss {value:9.5f}  w.grad {shown}  b.grad {b.grad.item():9.5f}")

    w, b, rows = train(X, y, config, generator, log)
    true, learned, best = (torch.cat([v[:, 0], c]) for v, c in ((true_w, true_b), (w, b), least_squares(X, y)))
    print(f"\n{'':6}{'true':>10}{'learned':>10}{'least squares':>15}")
    for i, row in enumerate(zip(true, learned, best)):
        print(f"{f'w[{i}]' if i < len(w) else 'b':6}{row[0]:10.4f}{row[1]:10.4f}{row[2]:15.4f}")
    final = show_omissions(X, y)
    show_batch_noise(X, y, generator)
    plot(OUT / "linreg.png", X, y, w, b, rows)
    save_csv(OUT / "linreg.csv", [dict(iteration=i, loss=l, grad_norm=n) for i, (l, n) in enumerate(rows, 1)])
    print(f"\nwrote linreg.png and linreg.csv into {OUT}")
    off, floor, smallest = (learned - true).abs().max(), (best - true).abs().max(), min(norm for _, norm in rows)
    return report([
        ("gradients", apart < 1e-6, f"autograd, analytic, finite difference, own engine differ by {apart:.0e}"),
        ("w.grad", smallest > 0, f"never 0 in {len(rows)} iterations, the smallest |w.grad| is {smallest:.5f}"),
        ("w and b", bool(off <= 0.01), f"{off:.4f} from the truth at most, 0.01 allowed (least squares: {floor:.4f})"),
        ("loop", final.pop("nothing") < min(final.values()), "every spoilt loop ends with a higher loss")])


if __name__ == "__main__":
    cli(main)


# ---- exercises ------------------------------------------------------------------------------------
# 1. At which --lr does the training diverge? Multiply all features by 10: where is that limit now, and why?
# 2. Give Value a tanh with its backward rule, and check it against finite differences.
# 3. Train on the absolute error instead of the square. Which of the four gradients must change? How near does w come?
# 4. Add momentum to train(): v = 0.9 v + gradient. Below which --lr does it help?
