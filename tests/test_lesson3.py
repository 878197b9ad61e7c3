"""Lesson 3 as a specification: acceptance criteria, equality with PyTorch, exact resume, the command line, bad input."""
import csv
import inspect
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lesson3_charrnn as lesson
from lesson1_linreg import BadInput, cli
from lesson3_charrnn import (LSTM, CharLSTM, CharTokenizer, LSTMCell, RNNConfig, ThroughTime, choose, clip_, evaluate, generate,
                             load_checkpoint, load_model, save_checkpoint, split_text, train, words)

ROOT = pathlib.Path(lesson.__file__).parent
SPEECH = "KING\nThe King hath sent for thee, my lord.\nWe go; and so, good night.\n\n"
SMALL = dict(hidden=16, embed=8, context=16, batch_size=4, steps=40, eval_every=10, warmup=5, dropout=0.1, reset=0.1)
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
LONG = 400                                                      # steps of a run that is stopped in the middle


@pytest.fixture(scope="module")
def text():
    """Speeches in an order of their own, so that a wrong data position shows."""
    lines, shuffle = SPEECH.splitlines(keepends=True), random.Random(0)
    return "".join(shuffle.choice(lines) for _ in range(300))


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """A finished small run that nobody interrupted: its folder."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(text, out, **SMALL)
    return out


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A longer one, on one thread as `program` runs: long enough to be stopped in the middle."""
    out, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)
    train(text, out, **{**SMALL, "steps": LONG})
    torch.set_num_threads(threads)
    return out


def random_model(dropout=0.0, layers=2, V=11):
    torch.manual_seed(1)
    return CharLSTM(RNNConfig(hidden=6, embed=5, layers=layers, dropout=dropout), V)


def same_run(a, b):
    """Bitwise: weights, optimizer, carried state, losses, data order, all generators."""
    a, b = load_checkpoint(a / "last.ckpt"), load_checkpoint(b / "last.ckpt")

    def equal(x, y):
        if torch.is_tensor(x):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(equal, x, y))
        return x == y
    return equal(a, b)


def program(*arguments, **kwargs):
    return subprocess.run([sys.executable, "lesson3_charrnn.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def start(*arguments):
    return subprocess.Popen([sys.executable, "lesson3_charrnn.py", *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_step(out, step, process):
    """Until the run in `out` has saved step `step` (or later)."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if (out / "last.ckpt").exists() and load_checkpoint(out / "last.ckpt")["step"] >= step:
            return
        time.sleep(0.02)


# ---- the curriculum's acceptance criteria ---------------------------------------------------------

def test_the_model_is_an_lstm_written_by_hand():
    """Its parameters are plain matrices, and no module of torch does the recurrence."""
    model = random_model()
    assert {type(m) for m in model.modules()} == {CharLSTM, LSTM, LSTMCell, nn.Embedding, nn.ModuleList, nn.Linear}
    assert model.lstm.cells[0].w_h.shape == (6, 24) and not re.search(r"nn\.(LSTM|GRU|RNN)\w*\(", inspect.getsource(lesson))


def test_the_shape_of_each_step_stands_in_comments():
    source = pathlib.Path(lesson.__file__).read_text(encoding="utf-8")
    assert "(Batch, Seq, Hidden)" in source
    model = random_model()
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    logits, state = model(torch.zeros(3, 7, dtype=torch.long))
    assert seen == [(3, 7, 6)]                                  # Batch, Seq, Hidden
    assert logits.shape == (3, 7, 11) and state.shape == (2, 2, 3, 6)


def test_after_the_king_it_writes_words_spelled_as_in_the_text(tmp_path):
    text = SPEECH * 60
    train(text, tmp_path, **{**SMALL, "hidden": 64, "steps": 150, "eval_every": 150, "context": 32, "lr": 0.02, "dropout": 0.0})
    model, tokenizer = load_model(tmp_path / "best.ckpt")
    written = generate(model, tokenizer, "The King", 400, temperature=0.5)
    made = words(written[:written.rfind(" ")])
    assert len(written) == 400 and len(made) > 50
    assert sum(w in set(words(text)) for w in made) / len(made) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_checkpoints_are_saved_and_an_interrupted_training_resumes(number, text, whole, tmp_path):
    """Ctrl-C, SIGTERM and kill -9 in the middle of a run; resumed, everything is bitwise that of a run left alone."""
    if os.name == "nt" and number != "SIGKILL":
        pytest.skip("POSIX signals")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    flags = ["train", "--text", tmp_path / "text.txt", "--out", tmp_path / "run", "--device", "cpu"]
    process = start(*flags, *FLAGS, f"--steps={LONG}")
    wait_for_step(tmp_path / "run", 20, process)
    process.kill() if number == "SIGKILL" else process.send_signal(getattr(signal, number))
    stdout, stderr = process.communicate(timeout=60)
    if number == "SIGKILL":
        assert process.returncode != 0 and "stopped and saved" not in stdout
    else:
        assert process.returncode == 130 and "--resume" in stdout and "Traceback" not in stderr
    assert 20 <= load_checkpoint(tmp_path / "run" / "last.ckpt")["step"] < LONG
    again = program(*flags, "--resume")
    assert again.returncode == 0, again.stderr
    assert same_run(tmp_path / "run", whole)


# ---- equality with independent implementations ----------------------------------------------------

def test_outputs_states_and_all_gradients_equal_nn_lstm():
    """2 layers with copied weights, float64. nn.LSTM orders gates i, f, g, o and keeps matrices transposed."""
    torch.manual_seed(0)
    D, H, T, B = 5, 6, 9, 3
    ours, theirs = LSTM(D, H, 2, dropout=0.0).double(), nn.LSTM(D, H, 2).double()
    order = torch.cat([torch.arange(H) + k * H for k in (1, 2, 3, 0)])          # ours are o, i, f, g
    with torch.no_grad():
        for k, cell in enumerate(ours.cells):
            getattr(theirs, f"weight_ih_l{k}").copy_(cell.w_x[:, order].T)
            getattr(theirs, f"weight_hh_l{k}").copy_(cell.w_h[:, order].T)
            getattr(theirs, f"bias_ih_l{k}").copy_(cell.bias[order])
            getattr(theirs, f"bias_hh_l{k}").zero_()
    x, state = torch.randn(T, B, D, dtype=torch.float64), torch.randn(2, 2, B, H, dtype=torch.float64)
    (x1, s1), (x2, s2) = ((x.clone().requires_grad_(), state.clone().requires_grad_()) for _ in range(2))
    (_, y1), after1 = ours(x1, s1)
    y2, after2 = theirs(x2, (s2[:, 0].contiguous(), s2[:, 1].contiguous()))
    after2 = torch.stack(after2, 1)
    torch.testing.assert_close((y1, after1), (y2, after2))
    pull, pull_after = torch.randn_like(y1), torch.randn_like(after1)           # any gradient from above and from later
    for y, after in ((y1, after1), (y2, after2)):
        ((y * pull).sum() + (after * pull_after).sum()).backward()
    torch.testing.assert_close((x1.grad, s1.grad), (x2.grad, s2.grad))
    for k, cell in enumerate(ours.cells):
        torch.testing.assert_close(cell.w_x.grad[:, order].T, getattr(theirs, f"weight_ih_l{k}").grad)
        torch.testing.assert_close(cell.w_h.grad[:, order].T, getattr(theirs, f"weight_hh_l{k}").grad)
        torch.testing.assert_close(cell.bias.grad[order], getattr(theirs, f"bias_ih_l{k}").grad)


def test_backward_through_time_passes_gradcheck():
    generator, T, B, D, H = torch.Generator().manual_seed(0), 4, 2, 5, 3
    shapes = (T, B, D), (B, H), (B, H), (D, 4 * H), (H, 4 * H), (4 * H,)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(ThroughTime.apply, inputs)


def test_through_time_is_the_cell_step_by_step():
    torch.manual_seed(0)
    cell, x = LSTMCell(5, 6).double(), torch.randn(7, 3, 5, dtype=torch.float64)
    state = torch.randn(2, 3, 6, dtype=torch.float64).unbind(0)
    hs, h, c = ThroughTime.apply(x, *state, cell.w_x, cell.w_h, cell.bias)
    for t in range(7):
        state = cell(x[t], state)
        torch.testing.assert_close(hs[t], state[0])
    torch.testing.assert_close((h, c), state)


def test_float32_costs_little():
    """Against float64: the gradients of all weights."""
    model, exact, idx = random_model(), random_model().double(), torch.randint(11, (4, 33))
    for m in (model, exact):
        F.cross_entropy(m(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten()).backward()
    flat, right = (torch.cat([p.grad.flatten() for p in m.parameters()]).double() for m in (model, exact))
    assert 0 < (flat - right).norm() / right.norm() < 1e-5


def test_forget_gates_start_open_and_a_gate_order_is_kept():
    cell = LSTMCell(5, 6)
    assert cell.bias.tolist() == [0] * 12 + [1] * 6 + [0] * 6
    with torch.no_grad():
        cell.bias[12:18] = -100
        _, c = cell(torch.randn(2, 5), (torch.zeros(2, 6), torch.full((2, 6), 1e6)))
    assert c.abs().max() < 2                                    # the third block is the gate that keeps the old cell


def test_rnn_and_gru_cells_equal_torchs():
    torch.manual_seed(0)
    x, h, gru = torch.randn(4, 5), torch.randn(4, 6), [*range(6, 18), *range(6)]    # torch's order is r, u, candidate
    for ours, theirs, order in ((lesson.RNNCell(5, 6), nn.RNNCell(5, 6), list(range(6))),
                                (lesson.GRUCell(5, 6), nn.GRUCell(5, 6), gru)):
        with torch.no_grad():
            theirs.weight_ih.copy_(ours.w_x[:, order].T), theirs.weight_hh.copy_(ours.w_h[:, order].T)
            theirs.bias_ih.copy_(ours.bias[order]), theirs.bias_hh.zero_()
        torch.testing.assert_close(ours(x, (h,))[0], theirs(x, h))


def test_clipping_equals_clip_grad_norm():
    for limit in (0.1, 1e6):
        ours, theirs = random_model(), random_model()
        for model in (ours, theirs):
            model(torch.arange(10).view(2, 5))[0].square().sum().backward()
        norm = clip_(list(ours.parameters()), limit)
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(theirs.parameters(), limit).item(), rel=1e-5)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a.grad, b.grad)
        after = torch.cat([p.grad.flatten() for p in ours.parameters()]).norm()
        assert after <= limit * 1.0001


@pytest.mark.parametrize("length", [7, 10, 50])
def test_carried_evaluation_equals_one_long_forward_pass(length):
    model, ids = random_model().double(), torch.randint(11, (51,), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for start in range(0, 50, length):
        stop = min(start + length, 50)
        logits, _ = model(ids[None, start:stop])
        total += F.cross_entropy(logits[0], ids[start + 1:stop + 1], reduction="sum").item()
    assert evaluate(model, ids, length) == pytest.approx(total / 50, rel=1e-12)
    assert evaluate(model, ids, 51) == pytest.approx(evaluate(model, ids, 50), rel=1e-12)


def test_evaluation_in_chunks_carries_the_state():
    model, B, T = random_model().double(), 64, 300              # longer than the 2 ** 13 / 64 + 1 steps of one chunk
    ids = torch.randint(11, (B * T + 1,), generator=torch.Generator().manual_seed(0))
    logits, _ = model(ids[:-1].view(B, T))
    assert evaluate(model, ids, T) == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[1:]).item(), rel=1e-10)


def test_evaluation_and_sampling_switch_dropout_off():
    model, ids = random_model(dropout=0.5), torch.arange(60) % 11
    assert evaluate(model, ids, 10) == evaluate(model, ids, 10)
    tokenizer = CharTokenizer("abcdefghijk")
    assert generate(model, tokenizer, "abc", 50) == generate(model, tokenizer, "abc", 50)


def test_the_state_is_carried_and_gradients_are_cut():
    model = random_model()
    idx = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    whole, _ = model(idx)
    first, state = model(idx[:, :5])
    second, _ = model(idx[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


# ---- data -----------------------------------------------------------------------------------------

def test_plays_are_clean():
    plays = lesson.load_plays()
    assert 4_900_000 < len(plays) < 5_400_000 and len(set(plays)) == 79
    assert not set("*_\\#") & set(plays) and "\n\n\n" not in plays
    assert re.search(r"^HAMLET$", plays, flags=re.M) and "To be, or not to be" in plays
    assert not re.search(r"[ \t]$", plays, flags=re.M)


def test_streams_read_the_whole_text_in_order(text, tmp_path, monkeypatch):
    """B readers of T characters cover all training characters once in N / (B T) steps, each where it left off."""
    seen = []
    forward = CharLSTM.forward

    def spy(self, idx, state=None):
        if self.training:
            seen.append(idx.clone())
        return forward(self, idx, state)
    monkeypatch.setattr(CharLSTM, "forward", spy)
    B, T = 4, 16
    train(text, tmp_path, **{**SMALL, "steps": 12, "eval_every": 100})
    tokenizer = CharTokenizer.train(text)
    ring = split_text(text, T)[0] * 2
    streams = torch.cat(seen, 1)
    for row in streams:
        assert tokenizer.decode(row.tolist()) in ring
    assert len({tuple(row.tolist()) for row in streams}) == B


def test_tokenizer_round_trip_and_split():
    tokenizer = CharTokenizer.train("hello, world\n")
    assert tokenizer.decode(tokenizer.encode("old hero")) == "old hero"
    a, b = split_text("x" * 900 + "y" * 100, 16)
    assert (a, b) == ("x" * 900, "y" * 100)


# ---- resume, bit for bit --------------------------------------------------------------------------

def test_stopped_between_two_checkpoints_it_resumes_bitwise(text, undisturbed, tmp_path, monkeypatch):
    """SIGINT in the middle of a run: saved in order, resumed, bitwise equal at the end."""
    real, calls = lesson.clip_, []

    def interrupt(parameters, limit):
        calls.append(1)
        if len(calls) == 17:                                    # not at a multiple of eval_every
            signal.raise_signal(signal.SIGINT)
        return real(parameters, limit)
    monkeypatch.setattr(lesson, "clip_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path, **SMALL)
    assert load_checkpoint(tmp_path / "last.ckpt")["step"] == 17
    assert not same_run(undisturbed, tmp_path)
    train(text, tmp_path, resume=True)
    assert same_run(undisturbed, tmp_path)


# ---- damage ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(damage, tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1, "w": torch.arange(1000.0)})
    save_checkpoint(path, {"step": 2, "w": torch.arange(1000.0)})
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes({"flip": raw, "truncate": raw[:len(raw) // 2], "empty": b""}[damage])
    assert load_checkpoint(path)["step"] == 1
    assert "damaged" in capsys.readouterr().err
    path.with_suffix(".prev").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="is damaged"):
        load_checkpoint(path)


def test_killed_between_the_two_renames_the_one_before_is_there(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})
    path.rename(path.with_suffix(".prev"))
    assert load_checkpoint(path)["step"] == 1


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    save_checkpoint(tmp_path / "last.ckpt", {"x": Evil()})
    with pytest.raises(Exception):
        load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "evil").exists()


# ---- sampling -------------------------------------------------------------------------------------

def test_choose_keeps_to_its_limits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -9.0]]).expand(2000, 5)         # probabilities .64 .24 .09 .03 .00
    assert set(choose(logits, generator=generator, top_k=2).tolist()) == {0, 1}
    assert set(choose(logits, generator=generator, top_p=0.9).tolist()) == {0, 1, 2}
    for nearly in (dict(temperature=0), dict(temperature=1e-40), dict(top_p=0.0)):
        assert set(choose(logits, generator=generator, **nearly).tolist()) == {0}
    assert set(choose(logits, generator=generator, top_k=1, temperature=5.0).tolist()) == {0}
    for temperature in (0.5, 1.0, 2.0):
        drawn = choose(logits, temperature, generator=generator).bincount(minlength=5) / 2000
        torch.testing.assert_close(drawn, (logits[0] / temperature).softmax(0), atol=0.05, rtol=0)


def test_generate_is_determined_by_its_seed_stops_and_keeps_its_length():
    model, tokenizer = random_model(), CharTokenizer("abcdefghijk")
    a, b, c = (generate(model, tokenizer, "abc", 200, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert a == b != c and len(a) == 200
    assert generate(model, tokenizer, "abc", 200, temperature=2.0, seed=1, stop=a[50:52]) == a[:a.index(a[50:52])]
    assert generate(model, tokenizer, "abc", 0) == ""


def test_generate_with_carried_state_equals_reading_everything_anew():
    model, tokenizer = random_model(), CharTokenizer("abcdefghijk")
    text = "abc"
    for _ in range(30):
        text += tokenizer.decode(model(torch.tensor([tokenizer.encode(text)]))[0][:, -1].argmax(-1).tolist())
    assert "abc" + generate(model, tokenizer, "abc", 30, temperature=0) == text


# ---- experiments ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_story_shows_what_its_sentences_claim(text, undisturbed, tmp_path, capsys, monkeypatch):
    """The experiments run on a small model; the picture, the tables and honest checks are there."""
    checks = {name: passed for name, passed, _ in lesson.gradients(tmp_path)}
    assert checks == {"gradient": True, "gates": True, "clipping": True}
    shown = capsys.readouterr().out
    assert all(row in shown for row in ("GRU", "forget gate held shut", "limit inf")) and shown.count("Read: ") == 3
    assert {p.name for p in tmp_path.iterdir()} == {"gradients.png", "gradients.csv"}
    *_, last = csv.DictReader((tmp_path / "gradients.csv").read_text(encoding="utf-8").splitlines())
    last = {name: float(value) for name, value in last.items()}
    assert 0 < last["RNN"] < 1e-20 < last["GRU"] < last["LSTM"] < 1e-3 < last["LSTM, forget bias 3"] < 10 < last["RNN, matrix x 4"]
    model, tokenizer = load_model(undisturbed / "best.ckpt")
    model.lstm.cells[0].bias.data[2 * 16:3 * 16] = 0                 # unit 3 forgets at spaces and only there
    model.lstm.cells[0].w_h.data.zero_(), model.lstm.cells[0].w_x.data.zero_(), model.embed.weight.data.zero_()
    model.embed.weight.data[tokenizer.id_of[" "], 0] = 1
    model.lstm.cells[0].w_x.data[0, 2 * 16 + 3] = -10
    name, passed, detail = lesson.show_gates(model, tokenizer, text[:1000].replace("\n", " "))
    assert passed and "0.00 open at spaces, 0.50 elsewhere" in detail and "forget gate of unit 3," in capsys.readouterr().out
    model.lstm.cells[0].w_x.data.zero_()                             # no unit does: the check can fail
    assert not lesson.show_gates(model, tokenizer, text[:1000])[1]


def test_the_gradient_of_the_rnn_is_the_product_of_its_jacobians():
    """The measured curve against d h_T / d h_t = product of diag(1 - h²) U, multiplied out by hand."""
    torch.manual_seed(0)
    cell = lesson.RNNCell(9, 5).double()
    x = torch.randint(9, (6, 1))
    states = [(torch.zeros(1, 5, dtype=torch.float64, requires_grad=True),)]
    for x_t in F.one_hot(x, 9).double():
        states.append(cell(x_t, states[-1]))
    jacobian = torch.eye(5, dtype=torch.float64)
    for h, in states[1:]:
        jacobian = jacobian @ cell.w_h.detach() @ torch.diag(1 - h[0].detach() ** 2)
    rows = [torch.autograd.grad(states[-1][0][0, k], states[0][0], retain_graph=True)[0][0] for k in range(5)]
    torch.testing.assert_close(torch.stack(rows, 1), jacobian)


def test_copy_task_answers_are_the_letter_shown_last():
    x, y, age = lesson.copy_task(50, 20, torch.Generator().manual_seed(0))
    for b in range(20):
        last = when = None
        for t in range(50):
            if x[t, b] > 0:
                last, when = x[t, b], t
            assert y[t, b] == last and age[t, b] == t - when


# ---- the program ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_cli_train_sample_and_files(text, tmp_path):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    run = program("train", "--text", tmp_path / "text.txt", "--out", tmp_path / "o", "--device", "cpu", *FLAGS)
    assert run.returncode == 0, run.stderr
    assert re.search(r"step 40/40  loss \d\.\d+  val \d\.\d+  norm \d\.\d+ ", run.stdout)
    assert {p.name for p in (tmp_path / "o").iterdir()} >= {"last.ckpt", "last.prev", "best.ckpt", "loss.csv", "loss.png"}
    rows = (tmp_path / "o" / "loss.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 41 and rows[0].startswith("step,loss,val,norm,clipped,lr")
    one, two = (program("sample", "--out", tmp_path / "o", "--max-new-tokens", 30, "--seed", 3) for _ in range(2))
    assert one.returncode == 0 and one.stdout == two.stdout and one.stdout.startswith("The King")
    assert len(one.stdout.rstrip("\n")) <= 38


# ---- bad input ------------------------------------------------------------------------------------

def refused(told, monkeypatch, capsys, *arguments):
    """The program, in this process for speed, ends with code 2 and one line on stderr that holds all of `told`."""
    monkeypatch.setattr(sys, "argv", ["lesson3_charrnn.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli(lesson.main)
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and len(stderr.strip().splitlines()) == 1 and all(t in stderr for t in told), stderr


@pytest.mark.parametrize("arguments, told", [
    (("sample", "--prompt", "Zürich ß"), ("'ß'", "'ü'", "it knows")),
    (("sample", "--prompt", ""), ("empty",)),
    (("sample", "--temperature", "-1"), ("temperature",)),
    (("sample", "--top-p", "nan"), ("top-p",)),
    (("sample", "--out", "nowhere"), ("no checkpoint", "train")),
    (("train", "--hidden", "0"), ("hidden",)),
    (("train", "--lr", "much"), ("lr",)),
    (("train", "--text", "missing.txt"), ("missing.txt",)),
    (("train", "--text", "."), ("cannot read",)),
    (("train", "--device", "abacus"), ("abacus",)),
    (("train", "--resume", "--out", "nowhere"), ("no checkpoint",)),
    (("dance",), ("dance",)),
])
def test_bad_flags(arguments, told, undisturbed, monkeypatch, capsys):
    before = {p: p.read_bytes() for p in undisturbed.iterdir()}
    extra = () if "--out" in arguments or arguments[0] == "dance" else ("--out", undisturbed)
    refused(told, monkeypatch, capsys, *arguments, *extra)
    assert before == {p: p.read_bytes() for p in undisturbed.iterdir()}         # nothing saved is lost


def test_bad_input_costs_the_real_program_one_line():
    run = program("sample", "--out", "nowhere")
    assert run.returncode == 2 and run.stdout == "" and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("content, told", [
    (b"", ("0 characters",)), (b"too short", ("9 characters",)), (b"caf\xe9 " * 200, ("UTF-8",))])
def test_bad_texts(content, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_bytes(content)
    refused(told, monkeypatch, capsys, "train", "--text", tmp_path / "t.txt", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_bad_resumes(text, undisturbed, tmp_path):
    with pytest.raises(BadInput, match="other sizes"):
        train(text, undisturbed, resume=True, hidden=17)
    with pytest.raises(BadInput, match="other sizes"):
        train(text, undisturbed, resume=True, batch_size=5)
    with pytest.raises(BadInput, match="not trained on this text"):
        train(text + "!", undisturbed, resume=True)
    save_checkpoint(tmp_path / "last.ckpt", {"config": {"n_layer": 4}})         # lesson 4's, for instance
    with pytest.raises(BadInput, match="not trained on this text"):
        train(text, tmp_path, resume=True)
    save_checkpoint(tmp_path / "best.ckpt", {"something": "else"})
    with pytest.raises(BadInput, match="no checkpoint of this lesson"):
        load_model(tmp_path / "best.ckpt")


def test_an_infinite_loss_stops_with_advice_and_keeps_what_was_saved(text, tmp_path, monkeypatch):
    real, calls = lesson.loss_of, []

    def explode(logits, targets):
        calls.append(1)
        return real(logits, targets) * (math.nan if len(calls) > 30 and logits.requires_grad else 1)
    monkeypatch.setattr(lesson, "loss_of", explode)
    with pytest.raises(BadInput, match="--lr"):
        train(text, tmp_path, **SMALL)
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert saved["step"] >= 10 and all(v.isfinite().all() for v in saved["model"].values())


def test_no_network_and_no_pip_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "DATA", tmp_path)
    monkeypatch.setattr(lesson.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "No module named pip\n"))
    with pytest.raises(BadInput, match="No module named pip.*PIP_INDEX_URL.*uv pip install"):
        lesson.load_plays()
