"""Lesson 1: acceptance criteria, then equality with independent implementations, then the program, then bad input."""
import math
import pathlib
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lesson1_linreg as L
from lesson1_linreg import BadInput, Config, Value


def run(folder, *flags):
    """The real program, from a copy in `folder`, so that its out/ lands there."""
    shutil.copy(ROOT / "lesson1_linreg.py", folder)
    return subprocess.run([sys.executable, "lesson1_linreg.py", *flags], cwd=folder, capture_output=True, text=True,
                          encoding="utf-8", timeout=120)


def fit(**changes):
    config = Config(**changes)
    generator = torch.Generator().manual_seed(config.seed)
    X, y, true_w, true_b = L.make_data(config, generator)
    return (X, y, true_w, true_b, *L.train(X, y, config, generator))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson1")
    return folder, run(folder)


# ---- acceptance criteria --------------------------------------------------------------------------

def test_only_tensors_and_autograd():
    source = (ROOT / "lesson1_linreg.py").read_text(encoding="utf-8").split('"""', 2)[2]       # without the docstring
    assert "torch.nn" not in source and "torch.optim" not in source and "import nn" not in source
    assert ".backward()" in source


def test_prints_w_grad_at_every_iteration_and_it_is_never_0(story):
    _, done = story
    gradients = re.findall(r"^iteration +(\d+) .*w\.grad +(-?\d+\.\d+) +(-?\d+\.\d+) ", done.stdout, re.M)
    assert [int(i) for i, *_ in gradients] == list(range(1, 51))
    assert all(any(float(g) for g in row) for _, *row in gradients)
    assert re.search(r"^PASS  w\.grad: never 0 in 50 iterations", done.stdout, re.M)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("features", [1, 2, 5])
def test_w_and_b_within_a_hundredth(features, seed):
    _, _, true_w, true_b, w, b, rows = fit(features=features, seed=seed)
    assert (w - true_w).abs().max() < 0.01 and (b - true_b).abs() < 0.01
    assert min(norm for _, norm in rows) > 0


# ---- equality with independent implementations ----------------------------------------------------

def random_expression(rng, leaves, one):
    """A random scalar of the leaves by all the operations of Value; the same code runs on Values and on torch."""
    pool = list(leaves)
    for _ in range(15):
        a, b = rng.choice(pool), rng.choice(pool)
        pool.append(rng.choice([lambda: a + b, lambda: a * b, lambda: a - b, lambda: 2.5 - a, lambda: 3 * a + 1, lambda: -a,
                                lambda: a / (b * b + one), lambda: 1.5 / (a ** 2 + one), lambda: a.relu(), lambda: (a * 0.1 - 1).exp(),
                                lambda: (a * a + 1).log(), lambda: (a ** 2 + 0.5) ** -0.5])())
        pool[-1] = pool[-1] / (pool[-1] * pool[-1] + 1)         # keeps numbers small, so that tolerances mean something
    return sum(pool)


@pytest.mark.parametrize("seed", range(50))
def test_own_autograd_equals_torch(seed):
    numbers = [random.Random(seed).uniform(-2, 2) for _ in range(4)]
    own, theirs = [Value(n) for n in numbers], [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in numbers]
    a, b = random_expression(random.Random(seed), own, 1), random_expression(random.Random(seed), theirs, 1)
    assert math.isclose(a.data, b.item(), rel_tol=1e-10, abs_tol=1e-12)
    a.backward()
    b.backward()
    for mine, other in zip(own, theirs):
        assert math.isclose(mine.grad, other.grad.item(), rel_tol=1e-9, abs_tol=1e-12)


def test_own_autograd_accumulates_like_torch():
    own, theirs = Value(3), torch.tensor(3.0, requires_grad=True)
    for v in (own, theirs):
        square = v * v
        once = square + v
        once.backward(retain_graph=True) if v is theirs else once.backward()
        once.backward()
    assert own.grad == theirs.grad.item() == 14


def test_own_autograd_shared_node_and_deep_graph():
    x = Value(2)
    y = x
    for _ in range(20_000):             # far beyond Python's recursion limit
        y = y + x
    y.backward()
    assert x.grad == 20_001


def test_least_squares_equals_numpy():
    X, y, *_ = fit(features=4, noise=0.5)
    w, b = L.least_squares(X, y)
    expected = np.linalg.lstsq(np.c_[X.numpy(), np.ones(len(X))].astype(np.float64), y.numpy().astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(np.r_[w[:, 0].numpy(), b.numpy()], expected[:, 0], atol=1e-5)


def test_training_converges_to_least_squares():
    X, y, _, _, w, b, _ = fit(features=3, noise=0.5, batch_size=1000, epochs=200)
    best_w, best_b = L.least_squares(X, y)
    torch.testing.assert_close(w, best_w, atol=1e-4, rtol=0)
    torch.testing.assert_close(b, best_b, atol=1e-4, rtol=0)


def test_four_gradients_agree():
    X, y, *_ = fit(features=3)
    gradients = L.four_gradients(X[:20], y[:20])
    assert len(gradients) == 4
    for g in gradients.values():
        assert g.shape == (4,)
        torch.testing.assert_close(g, gradients["autograd"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_broadcast_rule_equals_numpy(seed):
    rng = random.Random(seed)
    for _ in range(50):
        a, b = ([rng.choice([1, 2, 3]) for _ in range(rng.randint(0, 4))] for _ in range(2))
        try:
            expected = np.broadcast_shapes(tuple(a), tuple(b))
        except ValueError:
            expected = None
        assert L.broadcast_shape(a, b) == expected


def test_views_share_memory_and_copies_do_not():
    for expression in L.VIEWS + L.COPIES:
        x = torch.arange(24).view(2, 3, 4)
        y = eval(expression)
        x.fill_(-1)                     # a view sees this, a copy does not
        assert bool((y == -1).all()) == (expression in L.VIEWS), expression


def test_loss_refuses_the_silent_broadcast():
    with pytest.raises(AssertionError, match="would broadcast"):
        L.loss(torch.zeros(5, 1), torch.zeros(5))


def test_only_the_whole_loop_learns(capsys):
    X, y, *_ = fit()
    final = L.show_omissions(X, y)
    start = y.square().mean().item()
    assert final["nothing"] < 0.01 * start
    assert final["zero"] > 10 * final["nothing"]
    assert final["update"] == pytest.approx(start) and final["order"] == pytest.approx(start)
    assert "no_grad" not in final and "RuntimeError: a leaf Variable" in capsys.readouterr().out


def test_batch_noise_falls_with_the_square_root():
    X, y, *_ = fit()
    distance = L.show_batch_noise(X, y, torch.Generator().manual_seed(1))
    assert distance[1] / distance[100] == pytest.approx(10, rel=0.2)


# ---- the program ----------------------------------------------------------------------------------

def test_story(story):
    folder, done = story
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert done.stdout.count("\nPASS") == 4 and "FAIL" not in done.stdout
    assert (folder / "out/lesson1/linreg.png").stat().st_size > 10_000
    table = (folder / "out/lesson1/linreg.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "iteration,loss,grad_norm" and len(table) == 51
    assert not list((folder / "out/lesson1").glob(".*")), "temporary files stay behind"


@pytest.mark.parametrize("features", ["1", "7"])
def test_story_of_other_sizes(tmp_path, features):
    done = run(tmp_path, "--features", features, "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/lesson1/linreg.png").exists()


def test_too_much_noise_fails_and_says_what_least_squares_could_do(tmp_path):
    done = run(tmp_path, "--noise", "20")
    assert done.returncode == 1 and re.search(r"^FAIL  w and b: .*least squares", done.stdout, re.M)


def test_output_that_nobody_reads_to_the_end(tmp_path):
    shutil.copy(ROOT / "lesson1_linreg.py", tmp_path)
    with subprocess.Popen([sys.executable, "lesson1_linreg.py", "--samples", "100000", "--batch-size", "10"], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        p.stdout.readline()
        p.stdout.close()
        assert p.stderr.read() == b""


# ---- bad input ------------------------------------------------------------------------------------

def one_line(done):
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_divergence_is_caught_and_explained(tmp_path):
    message = one_line(run(tmp_path, "--lr", "1.5"))
    assert "diverged" in message and "--lr 1.5" in message
    advised = float(re.search(r"try --lr ([\d.e+-]+)", message)[1])
    *_, true_w, true_b, w, b, _ = fit(lr=advised)
    assert (w - true_w).abs().max() < 0.01, "the advice does not help"


def test_the_stated_limit_is_the_limit():
    with pytest.raises(BadInput) as e:
        fit(lr=5.0, batch_size=1000)
    limit = float(re.search(r"limit is about ([\d.]+)", str(e.value))[1])
    fit(lr=0.95 * limit, batch_size=1000, epochs=500)
    with pytest.raises(BadInput):
        fit(lr=1.05 * limit, batch_size=1000, epochs=500)


@pytest.mark.parametrize("flags", [["--lr", "nan"], ["--lr", "inf"], ["--lr", "-1"], ["--features", "0"], ["--features", "x"],
                                   ["--samples", "1e3"], ["--nonsense"], ["stray"]])
def test_bad_flags(flags, capsys):
    parser = L.Parser(prog="lesson")
    parser.add_config(Config)
    with pytest.raises(SystemExit) as e:
        parser.parse_args(flags)
    message = capsys.readouterr().err
    assert e.value.code == 2 and message.startswith("lesson: ") and "--help" in message and message.count("\n") == 1


def test_bad_flag_on_the_command_line(tmp_path):
    assert "--epochs" in one_line(run(tmp_path, "--epochs", "0"))


def test_a_result_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be", encoding="utf-8")
    assert "cannot write" in one_line(run(tmp_path))
    assert (tmp_path / "out").read_text(encoding="utf-8").startswith("a file")


def test_a_crash_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "model"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        with L.replacing(path) as tmp:
            tmp.write_text("half of the ne", encoding="utf-8")
            1 / 0
    assert path.read_text(encoding="utf-8") == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]
