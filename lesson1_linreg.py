"""Lesson 1: linear regression, y = Xw + b, from tensors and autograd alone (no nn.Linear, no torch.optim).

    python lesson1_linreg.py                            the whole story, a few seconds on any laptop
    python lesson1_linreg.py --features 1               a line instead of a plane
    python lesson1_linreg.py --lr 1.5                   what a learning rate that is too large does

You will see which tensor operations copy; broadcasting, and the bug it hides; one gradient computed in four ways; w.grad
at every iteration; w and b within 0.01 of the truth; what each forgotten line of the training loop costs; and
out/lesson1/linreg.png with its numbers in linreg.csv. It ends with PASS/FAIL lines, exit status 1 on any FAIL.
Left out on purpose: layers and optimisers (lesson 2); an engine on whole tensors (ours has one number per node).
Sources: Linnainmaa 1970 (reverse-mode differentiation), Robbins and Monro 1951 (steps along noisy gradients).
Letters for shapes: N samples, D features, B samples in a mini-batch.
"""
import argparse                         # the command line
import contextlib                       # `with replacing(path)`: files that are whole or not there
import csv                              # the numbers behind a plot
import dataclasses                      # a config is a dataclass; its fields are the flags
import math                             # exp, log, isfinite
import os                               # os.replace, the atomic rename
import pathlib                          # paths on every system
import sys                              # stderr, exit status

import torch                            # tensors, and an autograd to compare ours with

OUT = pathlib.Path(__file__).resolve().parent / "out" / "lesson1"

# ---- tensors: a flat block of memory and a way to look at it --------------------------------------

VIEWS = ["x", "x.view(6, 4)", "x.reshape(6, 4)", "x[:, 1]", "x.permute(0, 2, 1)", "x[:1].expand(5, 3, 4)"]
COPIES = ["x.permute(0, 2, 1).contiguous()", "x.permute(0, 2, 1).reshape(8, 3)", "x[[1, 0]]", "x + 0"]


def show_memory():
    """Shape, strides (how far apart in memory neighbours along each axis are) and memory of views and copies of x."""
    x = torch.arange(24).view(2, 3, 4)                          # (24,) -> (2,3,4)
    print(f"{'expression':33}{'shape':11}{'stride':12}{'contiguous':12}memory, by data_ptr()")
    for expression in VIEWS + COPIES:
        y = eval(expression, {"x": x})                          # so that what is printed is what ran
        inside = 0 <= y.data_ptr() - x.data_ptr() < x.nbytes
        where = f"x's own, from byte {y.data_ptr() - x.data_ptr()}" if inside else "a copy"
        print(f"{expression:33}{str(tuple(y.shape)):11}{y.stride()!s:12}{'yes' if y.is_contiguous() else 'no':12}{where}")
    try:
        x.permute(0, 2, 1).view(8, 3)
    except RuntimeError:
        print("x.permute(0, 2, 1).view(8, 3)    RuntimeError: no stride reads the elements in that order")
    print("Read: a new shape, stride or start is free; view refuses what they cannot express, reshape copies instead.\n")


def broadcast_shape(a, b):
    """The shape of (tensor of shape a) + (tensor of shape b): aligned at the right, sizes must be equal or one of them 1;
    a 1 is repeated (by stride 0, without a copy). None if they do not fit."""
    a, b = ((1,) * (max(len(a), len(b)) - len(s)) + tuple(s) for s in (a, b))
    return None if any(m != n and 1 not in (m, n) for m, n in zip(a, b)) else tuple(n if m == 1 else m for m, n in zip(a, b))


def show_broadcasting():
    """The rule on five pairs of shapes, and the bug that it makes silent."""
    for a, b in [((256, 3), (3,)), ((256, 3), (256, 1)), ((8, 1, 5), (7, 1)), ((256, 3), (256,)), ((256, 1), (256,))]:
        print(f"{a!s:11} + {b!s:9} -> {broadcast_shape(a, b) or 'error'}")
    y = torch.randn(256, generator=torch.Generator().manual_seed(0))
    pred = y[:, None]                                           # (256,) -> (256,1): a perfect prediction, as a column
    right, wrong = (pred[:, 0] - y).square().mean(), (pred - y).square().mean()     # (256,); (256,1) - (256,) -> (256,256)
    print(f"Read: the last row is the silent bug. With a perfect prediction (256,1) and target (256,) the loss is {wrong:.2f}, "
          f"not {right:.2f}:\nit compares all 65536 pairs, and what minimises that is the mean of y. So loss() asserts shapes.\n")


# ---- autograd: reverse mode -----------------------------------------------------------------------

class Value:
    """A number that knows what it was computed from; backward() gives every such v d(self)/dv in v.grad.

    Forward, an operation stores for each input the derivative of its output by it. Backward walks from the result to
    the leaves and adds (gradient of the output) x (that derivative) to each input: the chain rule. One walk serves all
    inputs, be they a billion weights; that is why training is affordable."""

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
    lr: float = flag(0.1, "learning rate, length of a step per unit of gradient", 0, 1000)
    batch_size: int = flag(100, "B, samples per update", 1, 1_000_000)
    epochs: int = flag(5, "passes over the samples", 1, 10_000)
    seed: int = flag(0, "seed of the data and of their order", 0, 2**63 - 1)


def make_data(config, generator):
    """X (N,D), y (N,1) = X true_w + true_b + noise, true_w (D,1), true_b (1,)."""
    X = torch.randn(config.samples, config.features, generator=generator)
    true_w, true_b = (torch.empty(s).uniform_(-3, 3, generator=generator) for s in [(config.features, 1), (1,)])
    noise = config.noise * torch.randn(config.samples, 1, generator=generator)
    return X, predict(X, true_w, true_b) + noise, true_w, true_b


def predict(X, w, b):
    return X @ w + b                                            # (B,D) @ (D,1) + (1,) -> (B,1)


def loss(pred, y):
    """Mean squared error, a scalar. pred, y (B,1)."""
    assert pred.shape == y.shape, f"{tuple(pred.shape)} and {tuple(y.shape)} would broadcast"
    return (pred - y).square().mean()


def least_squares(X, y):
    """w (D,1), b (1,) of the smallest loss there is, in closed form; b is the weight of a column of ones."""
    solution = torch.linalg.lstsq(with_ones(X), y).solution     # (N,D+1), (N,1) -> (D+1,1)
    return solution[:-1], solution[-1]


def with_ones(X):
    return torch.cat([X, X.new_ones(len(X), 1)], 1)             # (N,D) -> (N,D+1)


def four_gradients(X, y):
    """d loss / d w (and b, last) at the same point by four methods, {name: (D+1,)}, in float64."""
    X, y, h = with_ones(X).double(), y.double(), 1e-6
    w = torch.linspace(-1, 1, X.shape[1], dtype=X.dtype)[:, None].requires_grad_()      # (D+1,) -> (D+1,1)
    loss(X @ w, y).backward()
    own = [Value(v) for v in w[:, 0].tolist()]
    errors = [sum(v * x for v, x in zip(own, row)) - target for row, (target,) in zip(X.tolist(), y.tolist())]
    (sum(e ** 2 for e in errors) / len(errors)).backward()
    with torch.no_grad():
        shifts = h * torch.eye(len(w), dtype=X.dtype)[:, :, None]                       # (D+1,D+1,1): one weight each
        finite = [(loss(X @ (w + s), y) - loss(X @ (w - s), y)) / (2 * h) for s in shifts]
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
                raise BadInput(f"diverged: after {len(rows)} iterations the loss is {rows[-1][0]:.3g}, at the start it was "
                               f"{start:.3g}; steps of --lr {config.lr:g} overshoot the minimum. On these data the limit is "
                               f"about {limit:.2g}, lower with small batches: try --lr {limit / 5:.1g}")
            with torch.no_grad():                               # 4. update: not a part of the next graph
                w -= config.lr * w.grad
                b -= config.lr * b.grad
    return w.detach(), b.detach(), rows


# ---- experiments ----------------------------------------------------------------------------------

def show_omissions(X, y, lr=0.1, iterations=25):
    """Interview question: write the training loop. What each of its steps is for, seen by spoiling it. Returns the last
    losses, {what was spoilt: loss}."""
    X, final = with_ones(X), {}                                 # b is the last weight here: one tensor to update
    print(f"\n{'spoilt':34}{'loss at 1':>9}{'2':>8}{'3':>8}{iterations:8}   |w.grad| at 1{'2':>8}{iterations:8}")
    for what in ("nothing", "zero: gradients add up", "update: nothing moves", "order: update before backward",
                 "no_grad: the update is recorded"):
        w, rows = torch.zeros(X.shape[1], 1, requires_grad=True), []
        w.grad = torch.zeros_like(w)
        try:
            for _ in range(iterations):
                if not what.startswith("zero"):
                    w.grad = torch.zeros_like(w)
                value = loss(X @ w, y)
                if not what.startswith("order"):
                    value.backward()
                if not what.startswith("update"):
                    with torch.set_grad_enabled(what.startswith("no_grad")):
                        w -= lr * w.grad
                if what.startswith("order"):
                    value.backward()
                rows.append((value.item(), w.grad.norm().item()))
            final[what.split(":")[0]] = rows[-1][0]
            print(f"{what:34}{rows[0][0]:9.3f}{rows[1][0]:8.3f}{rows[2][0]:8.3f}{rows[-1][0]:8.3f}"
                  f"{rows[0][1]:16.3f}{rows[1][1]:8.3f}{rows[-1][1]:8.3f}")
        except RuntimeError as e:
            print(f"{what:34}RuntimeError: {e}")
    print("Read: unzeroed, the second gradient is the sum of two, and the sums swing past the minimum for ever; an update\n"
          "before backward uses the zeros just written (with w.grad = None, as in train(), it is a TypeError).\n")
    return final


def show_batch_noise(X, y, generator, draws=500):
    """How far the gradient of B samples is from that of all, relative to its length: returns {B: distance}, at w = b = 0."""
    per_sample = -2 * y * with_ones(X)                          # (N,1) * (N,D+1) -> (N,D+1)
    full, distance = per_sample.mean(0), {}                     # (N,D+1) -> (D+1,)
    for B in (1, 10, 100):
        i = torch.randint(len(X), (draws, B), generator=generator)
        distance[B] = ((per_sample[i].mean(1) - full).norm(dim=1).mean() / full.norm()).item()   # (draws,B,D+1) -> (draws,D+1)
    print("batch size B and the error of its gradient: " + "   ".join(f"B {B}: {d:.0%}" for B, d in distance.items()))
    print("Read: the error falls with the square root of B, the cost rises with B: many rough steps beat a few exact ones.")
    return distance


def plot(path, X, y, w, b, rows):
    """Left the data with the fitted line (D = 1) or plane (D = 2), or prediction against y; right the loss."""
    figure, (left, right) = new_figure(1, 2, (11, 4))
    X, y, ends = X[:500], y[:500, 0], torch.tensor([-3.0, 3.0])
    if X.shape[1] == 1:
        left.plot(X[:, 0], y, ".", color="0.6")
        left.plot(ends, predict(ends[:, None], w, b), "k")      # (2,) -> (2,1)
        left.set(title="The fitted line runs through the data", xlabel="x", ylabel="y")
    elif X.shape[1] == 2:
        left.remove()
        left = figure.add_subplot(1, 2, 1, projection="3d")
        grid = torch.cartesian_prod(ends, ends)                 # (4,2)
        left.scatter(X[:, 0], X[:, 1], y, s=3, color="0.4")
        left.plot_surface(*(v.view(2, 2).numpy() for v in (*grid.T, predict(grid, w, b))), color="0.8", alpha=0.5)
        left.set(title="The fitted plane runs through the data", xlabel="x1", ylabel="x2", zlabel="y")
    else:
        left.plot(y, predict(X, w, b), ".", color="0.6")
        left.axline((0, 0), slope=1, color="k")
        left.set(title="Predictions lie on the diagonal", xlabel="measured y", ylabel="predicted y")
    right.semilogy(range(1, len(rows) + 1), [l for l, _ in rows], "k")
    right.set(title=f"The loss falls from {rows[0][0]:.2g} to {rows[-1][0]:.2g}", xlabel="iteration", ylabel="mean squared error")
    save_figure(path, figure)


# ---- habits: config, errors, files, checks (all six lessons use these) ----------------------------

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
            raise argparse.ArgumentTypeError(f"{text} is not in {'' if low is None else low}..{'' if high is None else high}")
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
        sys.exit(main())
    except BadInput as e:
        print(f"{pathlib.Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- main -----------------------------------------------------------------------------------------

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_config(Config)
    config = Config(**given(parser.parse_args(), Config))
    generator = torch.Generator().manual_seed(config.seed)      # our own: no other code can change what it draws
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)
    show_memory()
    show_broadcasting()
    X, y, true_w, true_b = make_data(config, generator)
    gradients = four_gradients(X[:50], y[:50])
    for name, g in gradients.items():
        print(f"d loss/d (w, b), {name:18}", g.tolist() if len(g) < 5 else f"{g[:4].tolist()} ...")
    apart = max((g - gradients["autograd"]).abs().max().item() for g in gradients.values())
    print(f"Read: four methods, one gradient; they differ by {apart:.0e}, the error of the finite difference.\n")

    def log(iteration, value, w, b):
        shown = " ".join(f"{v:9.5f}" for v in w.grad[:4, 0].tolist()) + (" ..." if len(w) > 4 else "")
        print(f"iteration {iteration:4}  loss {value:9.5f}  w.grad {shown}  b.grad {b.grad.item():9.5f}")

    w, b, rows = train(X, y, config, generator, log)
    best_w, best_b = least_squares(X, y)
    print(f"\n{'':5}{'true':>10}{'learned':>10}{'least squares':>15}")
    for i, row in enumerate(zip(torch.cat([true_w[:, 0], true_b]), torch.cat([w[:, 0], b]), torch.cat([best_w[:, 0], best_b]))):
        print(f"{f'w[{i}]' if i < len(w) else 'b':5}{row[0]:10.4f}{row[1]:10.4f}{row[2]:15.4f}")
    final = show_omissions(X, y)
    show_batch_noise(X, y, generator)
    plot(OUT / "linreg.png", X, y, w, b, rows)
    save_csv(OUT / "linreg.csv", [dict(iteration=i, loss=l, grad_norm=n) for i, (l, n) in enumerate(rows, 1)])
    print(f"\nwrote {OUT / 'linreg.png'} and linreg.csv")

    def distance(w1, b1, w2, b2):
        return max((w1 - w2).abs().max().item(), (b1 - b2).abs().item())

    off, floor, smallest = distance(w, b, true_w, true_b), distance(best_w, best_b, true_w, true_b), min(n for _, n in rows)
    return report([
        ("gradients", apart < 1e-6, f"autograd, analytic, finite difference and own engine differ by {apart:.1e} at most"),
        ("w.grad", smallest > 0, f"never 0 in {len(rows)} iterations; the smallest |w.grad| is {smallest:.5f}"),
        ("w and b", off <= 0.01, f"within {off:.4f} of the true values, 0.01 allowed (least squares: {floor:.4f})"),
        ("loop", final["nothing"] < min(v for k, v in final.items() if k != "nothing"), "each spoilt loop ends worse")])


if __name__ == "__main__":
    cli(main)
