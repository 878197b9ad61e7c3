"""Lesson 1: linear regression from tensors and autograd, and the few habits that every lesson shares."""
import argparse                         # the command line
import contextlib                       # `with replacing(path)`: files that are whole or not there
import dataclasses                      # a config is a dataclass; its fields are the flags
import os                               # os.replace, the atomic rename
import pathlib                          # paths on every system
import sys                              # stderr, exit status

# ---- habits: config, errors, files, checks (all six lessons use these) ----------------------------

class BadInput(Exception):
    """What the user gave cannot be used. The message names the cause and the way out; `cli` prints it, exit code 2."""


def flag(default, help, low=None, high=None, choices=None):
    """A config field that is also a command-line flag; `low` and `high` are inclusive bounds."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line on stderr instead of the whole usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

    def add_config(self, config):
        """One --flag per field of the dataclass `config`. Flags that are not given stay out of the namespace,
        so `given(args, config)` holds only what the user asked for and a preset can supply the rest."""
        for field in dataclasses.fields(config):
            meta, name = field.metadata, "--" + field.name.replace("_", "-")
            common = dict(dest=field.name, default=argparse.SUPPRESS, help=f"{meta['help']} (default: {field.default})")
            if field.type is bool:
                self.add_argument(name, action=argparse.BooleanOptionalAction, **common)
            else:
                self.add_argument(name, type=_bounded(field.type, meta["low"], meta["high"]), choices=meta["choices"],
                                  metavar=None if meta["choices"] else field.type.__name__.upper(), **common)


def _bounded(kind, low, high):
    def parse(text):
        value = kind(text)
        # written so that nan, which compares false with everything, is refused too
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"{text} is outside {'' if low is None else low}..{'' if high is None else high}")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{os.getpid()}.{path.name}")     # same folder (rename cannot cross disks), same suffix
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())        # the bytes must be on disk before the name points to them
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def save_figure(path, figure):
    """Write a matplotlib figure as a 150 dpi PNG and close it."""
    import matplotlib.pyplot as plt
    with replacing(path) as tmp:
        figure.savefig(tmp, dpi=150, bbox_inches="tight")
    plt.close(figure)


def new_figure(rows=1, cols=1, size=(7, 4)):
    """matplotlib's subplots, without a window: (figure, axes)."""
    import matplotlib                   # here, not on top: half a second that only plotting should pay
    matplotlib.use("Agg")               # draw into files; works over ssh and in CI
    import matplotlib.pyplot as plt
    return plt.subplots(rows, cols, figsize=size)


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
