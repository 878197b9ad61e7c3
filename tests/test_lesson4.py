"""Lesson 4 as a specification: acceptance criteria, equality with independent implementations, the command line, bad input."""
import ast
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lesson4_gpt as lesson
from lesson1_linreg import BadInput
from lesson3_charrnn import load_plays, save_checkpoint
from lesson4_gpt import GPT, BPETokenizer, GPTConfig, Muon, ScaledDotProductAttention, attention_mask, generate

ROOT = pathlib.Path(lesson.__file__).parent
SMALL = ["--n-layer", 2, "--n-embd", 32, "--n-head", 2, "--context", 16, "--batch-size", 4, "--device", "cpu"]
SENTENCE = "Server Engineer turns to AI"


def random_gpt(**changes):
    """A small model none of whose weights is zero, so that everything can influence everything."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**dict(vocab_size=20, context=16, n_layer=2, n_head=2, n_embd=32), **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(0).choices(["the king ", "my lord, ", "good night\n"], k=400)), encoding="utf-8")
    return path


# ---- the curriculum's acceptance criteria ---------------------------------------------------------

def test_attention_is_written_by_hand():
    source = pathlib.Path(lesson.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert any(isinstance(node, ast.ClassDef) and node.name == "ScaledDotProductAttention" for node in ast.walk(tree))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [n for n in names if n.startswith("Transformer") or n in ("MultiheadAttention", "scaled_dot_product_attention")]
    assert "softmax" in names


def test_overfit_recites_one_sentence_after_100_steps():
    name, passed, detail = lesson.overfit(torch.device("cpu"), SENTENCE, steps=100)
    assert passed and "27/27" in detail


def test_mask_lower_triangle_has_values_upper_is_masked():
    q, k, v = torch.randn(3, 2, 4, 7, 8).unbind(0)
    attend, mask = ScaledDotProductAttention(), attention_mask(7, 7)
    scores, (_, weights) = attend.scores(q, k, mask), attend(q, k, v, mask)
    upper = torch.ones(7, 7, dtype=torch.bool).triu(1)
    assert (scores[..., upper] == -math.inf).all() and scores[..., ~upper].isfinite().all()
    assert (weights[..., upper] == 0).all() and (weights[..., ~upper] > 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 7))


def test_mask_proofs_pass_and_can_fail(tmp_path, monkeypatch):
    assert all(passed for _, passed, _ in lesson.mask(tmp_path)) and (tmp_path / "mask.png").stat().st_size > 10_000
    honest = lesson.attention_mask
    for dishonest, broken in ((lambda Tq, Tk, real=None, device=None: torch.zeros(Tq, Tk), {"upper", "future"}),       # no mask
                              (lambda Tq, Tk, real=None, device=None: honest(Tq, Tk), {"padding"})):                    # no padding mask
        monkeypatch.setattr(lesson, "attention_mask", dishonest)
        failed = " ".join(name for name, passed, _ in lesson.mask(tmp_path) if not passed)
        assert all(word in failed for word in broken)


def test_padded_batch_equals_each_sentence_alone():
    model, rows = random_gpt(), [torch.randint(20, (n,)) for n in (3, 12, 7)]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    real = torch.arange(12) >= 12 - torch.tensor([[3], [12], [7]])
    for row, logits in zip(rows, model(idx, real=real)[0]):
        assert torch.allclose(logits[-len(row):], model(row[None])[0][0], atol=1e-4)


# ---- equality with independent implementations ----------------------------------------------------

@pytest.mark.parametrize("causal,padded", [(True, False), (False, True), (True, True)])
def test_attention_equals_pytorch(causal, padded):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    real = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5]).bool() if padded else None
    mask = attention_mask(6, 6, real).double()
    if not causal:                                              # a padding mask alone: every real key, and oneself
        mask = torch.zeros(3, 1, 6, 6, dtype=torch.float64).masked_fill(~real[:, None, None, :] & ~torch.eye(6).bool(), -math.inf)
    expected_mask = torch.ones(6, 6).bool().tril() if causal else torch.ones(6, 6).bool()
    if padded:
        expected_mask = expected_mask & real[:, None, None, :] | torch.eye(6).bool()
    ours, theirs = ScaledDotProductAttention()(q, k, v, mask)[0], F.scaled_dot_product_attention(q, k, v, expected_mask)
    assert torch.allclose(ours, theirs, atol=1e-12)
    direction = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), direction), torch.autograd.grad(theirs, (q, k, v), direction)):
        assert torch.allclose(a, b, atol=1e-12)


def test_rotary_equals_complex_multiplication():
    x, positions = torch.randn(2, 3, 5, 8), torch.arange(5)
    angle = lesson.angles(positions, 8)
    ours = lesson.rotate(x, angle.cos(), angle.sin())
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), positions[:, None] * 1e4 ** (-torch.arange(4) / 4))
    assert torch.allclose(ours, torch.cat([turned.real, turned.imag], -1), atol=1e-6)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 32).unbind(0)

    def score(at_q, at_k):
        a, b = (lesson.angles(torch.tensor([p]), 32) for p in (at_q, at_k))
        return (lesson.rotate(q, a.cos(), a.sin()) * lesson.rotate(k, b.cos(), b.sin())).sum()
    assert torch.allclose(score(7, 3), score(107, 103), atol=1e-4) and not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)


def test_sinusoids_are_those_of_the_paper():
    angle = lesson.angles(torch.arange(50), 16)
    expected = np.array([[t / 10000 ** (2 * i / 16) for i in range(8)] for t in range(50)])
    assert np.allclose(angle.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_muon_orthogonalization_against_svd(shape):
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    G = U * torch.linspace(0.05, 1, min(shape)) @ Vh             # singular values 1 : 20
    O = lesson.orthogonalize(G)
    singular = torch.linalg.svdvals(O)
    assert singular.min() > 0.6 and singular.max() < 1.3        # Newton-Schulz brings them near 1, not to 1
    ours, exact = O.flatten(1), (U @ Vh).flatten(1)
    assert (F.cosine_similarity(ours, exact) > 0.95).all()
    # the singular vectors are kept: U' O V is diagonal
    inner = U.mT @ O @ Vh.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


@pytest.mark.parametrize("weight_decay", [0, 1.0])
def test_muon_step_equals_torch_optim_muon(weight_decay):
    torch.manual_seed(0)
    start, grads = torch.randn(64, 32), [torch.randn(64, 32) for _ in range(3)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = Muon([ours], lr=0.02, momentum=0.95, weight_decay=weight_decay)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=weight_decay, nesterov=True)       # computes in bf16
    for g in grads:
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step(), b.step()
    moved = (ours - start).flatten()
    assert F.cosine_similarity(moved, (theirs - start).flatten(), dim=0) > 0.999
    assert abs(moved.norm() / (theirs - start).norm() - 1) < 0.02


def test_schedule_is_flat_then_falls_to_zero():
    config = GPTConfig(steps=100, decay=0.5)
    assert [lesson.schedule(s, config) for s in (0, 50, 75)] == [1, 1, 0.5] and math.isclose(lesson.schedule(99, config), 0.02)


def test_initial_loss_is_ln_v_and_gradients_match_finite_differences():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=20, context=8, n_layer=1, n_head=2, n_embd=16)
    idx, targets = torch.randint(20, (2, 2, 8)).unbind(0)
    assert abs(GPT(config)(idx, targets)[1].item() - math.log(20)) < 1e-5
    model = random_gpt(n_layer=1, n_embd=16).double()
    model.forward_loss = lambda: F.cross_entropy(model(idx)[0].double().flatten(0, 1), targets.flatten())
    p = model.blocks[0].attention.query.weight
    g, = torch.autograd.grad(model(idx, targets)[1], p)
    with torch.no_grad():
        for i, j in ((0, 0), (3, 5), (15, 2)):
            p[i, j] += 1e-2
            up = model(idx, targets)[1]
            p[i, j] -= 2e-2
            down = model(idx, targets)[1]
            p[i, j] += 1e-2
            assert abs((up - down) / 2e-2 - g[i, j]) < 1e-3


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_cached_and_uncached_logits_agree(position):
    model, idx = random_gpt(position=position), torch.randint(20, (3, 16))
    with torch.no_grad():
        whole, cache = model(idx)[0], {}
        parts = [model(idx[:, :5], cache=cache)[0]] + [model(idx[:, t:t + 1], cache=cache)[0] for t in range(5, 16)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_generation_with_cache_equals_without_beyond_the_context():
    model, idx = random_gpt(), torch.randint(20, (2, 3))
    assert torch.equal(generate(model, idx, 60, temperature=0), generate(model, idx, 60, temperature=0, cached=False))
    draws = [generate(model, idx, 30, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and draws[0].shape == (2, 33)


def test_micro_batches_equal_one_batch():
    idx = torch.randint(20, (8, 17), generator=torch.Generator().manual_seed(0))
    weights = []
    for accumulation in (1, 4):
        model = random_gpt()
        optimizers = lesson.make_optimizers(model, GPTConfig())
        losses = [lesson.train_step(model, optimizers, idx[:, :-1], idx[:, 1:], accumulation=accumulation) for _ in range(3)]
        weights.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert np.allclose(weights[0][0], weights[1][0], atol=1e-4) and torch.allclose(weights[0][1], weights[1][1], atol=1e-3)


@pytest.fixture(scope="module")
def bpe():
    """(text, tokenizer trained on it): a million characters."""
    text = load_plays()[:1_000_000]
    return text, BPETokenizer.train(text, 400)


def test_bpe_by_hand_equals_tiktoken(bpe):
    text, tokenizer = bpe
    assert len(tokenizer.vocabulary) == 400
    ids = tokenizer.encode(text)
    assert np.array_equal(ids, tokenizer.encode_by_hand(text)) and tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 1.6 and " the" in tokenizer.vocabulary


def test_bpe_takes_any_text_and_follows_the_merge_order():
    tokenizer = BPETokenizer.train("low low low lower lowest newest widest 你好", 270)
    for text in ("你好，船长 🏴‍☠️ é\t\u2028x  y", "", " ", "<|endoftext|>", "\u0300́"):
        assert tokenizer.encode(text) == tokenizer.encode_by_hand(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocabulary[256] == max(["lo", "ow", " l"], key=lambda p: (" low low low lower lowest newest".count(p), tuple(p)))


def test_bpe_learns_the_merges_that_tokenizers_learns(bpe):
    peer, (text, tokenizer) = pytest.importorskip("tokenizers"), bpe
    theirs = peer.Tokenizer(peer.models.BPE())
    theirs.pre_tokenizer = peer.pre_tokenizers.Sequence([
        peer.pre_tokenizers.Split(peer.Regex(lesson.WORD), "isolated"), peer.pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = peer.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([text], peer.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    merges = {t.replace("Ġ", " ").replace("Ċ", "\n") for t in theirs.get_vocab() if len(t) > 1}
    ours = set(tokenizer.vocabulary[256:])
    assert len(merges) == len(ours) == 144 and len(merges & ours) >= 140           # ties may fall either way


# ---- training: resume, several processes ----------------------------------------------------------

def train(run, out, *flags, **options):
    return run("lesson4_gpt.py", "train", *SMALL, "--out", out, *flags, **options)


@pytest.mark.slow
def test_resume_is_bitwise_equal_to_an_undisturbed_run(run, tmp_path, text_file):
    flags = ("--text", text_file, "--steps", 40, "--eval-every", 10, "--dropout", 0.1)
    train(run, tmp_path / "whole", *flags)
    process = subprocess.Popen([sys.executable, ROOT / "lesson4_gpt.py", "train", *map(str, SMALL), "--out", tmp_path / "cut",
                                *map(str, flags)], stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "last.ckpt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (130, 0)                          # 0: it was faster than the signal
    train(run, tmp_path / "cut", "--resume", "--text", text_file)
    a, b = (lesson.load_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 40 and a["rows"] == b["rows"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert (tmp_path / "whole" / "loss.csv").read_bytes() == (tmp_path / "cut" / "loss.csv").read_bytes()


@pytest.mark.slow
def test_two_processes_equal_one(run, tmp_path, text_file):
    flags = ["--text", text_file, "--steps", 8, "--eval-every", 4, "--precision", "fp32"]
    train(run, tmp_path / "one", *flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "lesson4_gpt.py",
                           "train", *map(str, SMALL + flags), "--accumulation", "2", "--out", tmp_path / "two"],
                          capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (lesson.load_checkpoint(tmp_path / name / "last.ckpt")["model"] for name in ("one", "two"))
    for key in a:
        assert torch.allclose(a[key], b[key], atol=2e-3), key


# ---- the command line -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model that the command line trained on the plays."""
    out = tmp_path_factory.mktemp("lesson4")
    subprocess.run([sys.executable, ROOT / "lesson4_gpt.py", "train", *map(str, SMALL), "--out", out, "--steps", "60",
                    "--eval-every", "20"], check=True, stdout=subprocess.DEVNULL)
    return out


def test_train_writes_curve_weights_and_learns(trained):
    rows = (trained / "loss.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "step,loss,val,val_bits_per_char" and len(rows) == 4
    values = [float(row.split(",")[2]) for row in rows[1:]]
    assert values[-1] < values[0] < math.log(79) + 0.1
    assert (trained / "loss.png").stat().st_size > 5000 and (trained / "best.ckpt").exists()
    assert not [p for p in trained.iterdir() if p.name.startswith(".")]      # no temporary file left


def test_sample_is_deterministic_and_obeys_its_flags(run, capsys, trained):
    def say(*flags):
        lesson.main(["sample", "--out", str(trained), "--device", "cpu", *map(str, flags)])
        return capsys.readouterr().out
    assert say("--max-new-tokens", 50) == run("lesson4_gpt.py", "sample", "--out", trained, "--device", "cpu", "--max-new-tokens", 50).stdout
    first = say("--max-new-tokens", 50, "--seed", 3)
    assert first.startswith("The King") and first == say("--max-new-tokens", 50, "--seed", 3) != say("--max-new-tokens", 50, "--seed", 4)
    assert len(first) == len("The King") + 50 + 1
    greedy = say("--temperature", 0, "--max-new-tokens", 20)
    assert greedy == say("--top-k", 1, "--max-new-tokens", 20) == say("--top-p", 0.01, "--max-new-tokens", 20)
    stop = first[len("The King") + 10]
    assert stop not in say("--max-new-tokens", 50, "--seed", 3, "--stop", stop)[len("The King"):].rstrip("\n")
    assert len(say("--prompt", "To be, or not to be, that is the question", "--max-new-tokens", 5)) == 41 + 5 + 1      # beyond the context


@pytest.mark.parametrize("flags", [("--position", "learned"), ("--position", "sinusoidal"), ("--tokens", "bpe", "--vocab-size", 300),
                                   ("--precision", "bf16"), ("--accumulation", 4)])
def test_train_and_sample_with_every_option(capsys, tmp_path, text_file, flags):
    lesson.main(["train", *map(str, (*SMALL, "--out", tmp_path, "--text", text_file, "--steps", 6, "--eval-every", 3, *flags))])
    capsys.readouterr()
    lesson.main(["sample", "--out", str(tmp_path), "--device", "cpu", "--prompt", "the king", "--max-new-tokens", "30"])
    assert len(capsys.readouterr().out) > 30


@pytest.mark.slow
def test_help_shows_every_flag_with_its_default(run):
    text = run("lesson4_gpt.py", "train", "--help").stdout
    assert all(flag in text for flag in ("--text", "--resume", "--n-layer", "--adam-lr", "(default: 0.02)", "{learned,sinusoidal,rotary}"))
    assert "--stop" in run("lesson4_gpt.py", "sample", "--help").stdout


# ---- bad input: one line, exit code 2 -------------------------------------------------------------

@pytest.fixture
def bad(capsys):
    """bad("train", ...) runs the command line in this process, which must refuse; returns its line."""
    def call(*flags):
        with pytest.raises((BadInput, SystemExit)) as refused:
            lesson.main([str(f) for f in flags])
        assert refused.type is BadInput or refused.value.code == 2
        return str(refused.value) if refused.type is BadInput else capsys.readouterr().err
    return call


def test_bad_prompts_and_flags(run, bad, trained, tmp_path):
    assert "empty" in run("lesson4_gpt.py", "sample", "--out", trained, "--prompt", "", code=2).stderr     # the real program
    assert "'é' '船'" in bad("sample", "--out", trained, "--prompt", "é船") and "it knows" in bad("sample", "--out", trained, "--prompt", "é")
    assert "train" in bad("sample", "--out", tmp_path / "nowhere")
    assert "--n-embd" in bad("train", "--n-embd", 30, "--n-head", 4, "--out", tmp_path)
    assert "1e+30" in bad("train", "--lr", 1e30) and "temperature" in bad("sample", "--temperature", "nan") and "'two'" in bad("train", "--n-layer", "two")
    assert "--seed" in bad("train", "--seed", 2 ** 63)
    assert "rotten" in bad("train", "--position", "rotten") and "--steps" in bad("train", "--steps", 0)
    assert "divide" in bad("train", "--batch-size", 5, "--accumulation", 2, "--out", tmp_path)
    assert "quantum" in bad("overfit", "--device", "quantum") and "checkpoint" in bad("train", "--resume", "--out", tmp_path)


def test_bad_texts(bad, tmp_path):
    def refused(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return bad("train", *SMALL, "--out", tmp_path / "out", "--text", tmp_path / name)
    assert "characters" in refused("empty.txt", b"") and "characters" in refused("short.txt", b"to be")
    assert "UTF-8" in refused("latin.txt", "é".encode("latin-1") * 1000)
    assert "nothing.txt" in refused("nothing.txt") and refused("")


def test_damaged_and_foreign_weights(run, bad, tmp_path, text_file):
    train(run, tmp_path, "--text", text_file, "--steps", 4, "--eval-every", 2)
    best = tmp_path / "best.ckpt"
    whole = best.read_bytes()
    sample = ("sample", "--out", tmp_path, "--prompt", "the")
    again = ("train", *SMALL, "--out", tmp_path, "--text", text_file, "--resume")
    flipped = bytes(255 - b for b in whole[5000:5200])      # more than the padding between two tensors
    for damaged in (whole[:len(whole) // 2], whole[:5000] + flipped + whole[5200:], b""):
        best.write_bytes(damaged)
        (tmp_path / "best.prev").unlink(missing_ok=True)
        assert "damaged" in bad(*sample)
    saved = lesson.load_checkpoint(tmp_path / "last.ckpt")
    saved["config"]["n_layer"] = 3
    save_checkpoint(best, saved)
    (tmp_path / "best.prev").unlink()
    assert "another shape" in bad(*sample) and "another shape" in bad(*again, "--n-embd", 64)
    for name in ("last.ckpt", "last.prev"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    assert "damaged" in bad(*again)


def test_resume_refuses_another_text_other_tokens_and_another_lesson(monkeypatch, tmp_path, text_file):
    flags = ["train", *map(str, SMALL), "--out", str(tmp_path / "out"), "--eval-every", "2", "--steps", "2", "--text"]
    lesson.main(flags + [str(text_file)])
    before = (tmp_path / "out" / "last.ckpt").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[1:], encoding="utf-8")
    for more in ([str(other)], [str(text_file), "--tokens", "bpe"]):
        with pytest.raises(BadInput, match="another text or other tokens"):
            lesson.main(flags + [*more, "--resume"])
    assert (tmp_path / "out" / "last.ckpt").read_bytes() == before
    save_checkpoint(tmp_path / "out" / "last.ckpt", {"step": 3})
    with pytest.raises(BadInput, match="another lesson"):
        lesson.main(flags + [str(text_file), "--resume"])


def test_a_text_with_too_few_tokens_for_a_window_is_refused(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("the cat and the dog " * 70, encoding="utf-8")       # 140 characters to validate on, fewer tokens
    with pytest.raises(BadInput, match="tokens, --context 128 needs 130"):
        lesson.main(["train", "--tokens", "bpe", "--text", str(text), "--out", str(tmp_path), "--steps", "1"])


def test_nan_stops_with_advice_and_keeps_what_was_saved(monkeypatch, tmp_path, text_file):
    flags = ["train", *map(str, SMALL), "--text", str(text_file), "--out", str(tmp_path), "--eval-every", "2", "--steps"]
    lesson.main(flags + ["4"])
    before, honest = (tmp_path / "last.ckpt").read_bytes(), lesson.train_step
    monkeypatch.setattr(lesson, "train_step", lambda *args: honest(*args) * math.nan)
    with pytest.raises(BadInput, match="loss is nan at step 1: lower --lr"):
        lesson.main(flags + ["4"])
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_no_network_names_the_ways_out(monkeypatch, tmp_path):
    import lesson3_charrnn
    monkeypatch.setattr(lesson3_charrnn, "DATA", tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(BadInput, match="PIP_INDEX_URL.*uv pip"):
        load_plays()
    assert not [p for p in tmp_path.iterdir()]                   # nothing half-installed
