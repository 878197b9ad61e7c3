"""How good lesson 6 retrieves, refuses and answers, on questions about PDFs that other people wrote.

    apt-get download debian-history debian-faq developers-reference maint-guide-zh-cn debian-reference-zh-cn debmake-doc
    for f in *.deb; do dpkg -x "$f" unpacked; done          # no root needed; then collect the six PDFs in one folder:
    find unpacked -name project-history.en.pdf -o -name debian-faq.en.pdf.gz -o -name developers-reference.pdf \\
        -o -name maint-guide.zh-cn.pdf -o -name debian-reference.zh-cn.pdf -o -name debmake-doc.zh-cn.pdf \\
        | xargs -I F cp F pdfs/ && gunzip pdfs/*.gz
    python tests/eval_lesson6.py tests/eval_lesson6.jsonl --pdfs pdfs --retrieval-only

    apt-get download bash-doc installation-guide-amd64      # two more, with questions by people who knew nothing of lesson 6:
    for f in *.deb; do dpkg -x "$f" more; done              # bashref.pdf and install.zh_CN.pdf.gz go to the folder pdfs2
    python tests/eval_lesson6.py tests/eval_lesson6_second.jsonl --pdfs pdfs2 --data out/eval6b --retrieval-only

    apt-get download r-doc-pdf texlive-lang-chinese         # and two that nothing was fitted to: R-intro.pdf and
    for f in *.deb; do dpkg -x "$f" more; done              # lshort-zh-cn.pdf go to the folder pdfs3
    python tests/eval_lesson6.py tests/eval_lesson6_third.jsonl --pdfs pdfs3 --data out/eval6c --retrieval-only

Each line of the JSONL is {"id", "pdf", "lang", "question", "kind": "answerable" | "near_miss" | "off_topic", "page": n or
list, "answer_any": [...]}. A near miss asks what this document could say but does not; off topic is another world.
The index is kept in --data (default: out/eval6), so that a second run starts at once.
"""
import argparse
import hashlib
import json
import pathlib
import random
import shutil
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lesson6_rag_server as rag
from lesson1_linreg import given
from lesson2_mlp import Progress

CALIBRATION = {"debian-faq.en.pdf", "developers-reference.pdf", "maint-guide.zh-cn.pdf",        # constants come from these
               "bashref.pdf", "install.zh_CN.pdf"}
LEGS, KINDS = ("dense", "bm25", "fused", "reranked"), ("answerable", "near_miss", "off_topic")


def pages_of(question):
    page = question.get("page") or []
    return set(page if isinstance(page, list) else [page])


def auc(positive, negative):
    """The chance that a positive scores above a negative; ties count half."""
    if not len(positive) or not len(negative):
        return float("nan")
    p, n = np.array(positive)[:, None], np.array(negative)[None]
    return float((p > n).mean() + (p == n).mean() / 2)


def index(store, folder, names):
    """{pdf name: document id}, indexing what is not there yet."""
    ids = {}
    for name in sorted(names):
        upload = store.upload_path()
        shutil.copyfile(folder / name, upload)
        ids[name] = store.add(upload, hashlib.sha256(upload.read_bytes()).hexdigest(), name)["id"]
        upload.unlink(missing_ok=True)
    store.wait()
    for row in store.documents():
        if row["status"] == "failed":
            sys.exit(f"{row['name']}: {row['reason']}")
    return ids


def ask(store, question, doc, llm):
    """One row of results: ranks of the right page in each leg, the refusal score, and with an LLM the answer."""
    snapshot = store.snapshot.only([doc]) if doc else store.snapshot
    found = rag.retrieve(store, question["question"], 10, snapshot)
    legs = rag.retrieve(store, question["question"], 50, snapshot, candidates=100).hits     # all that any leg found
    gold = pages_of(question)

    def right(h):
        return h.chunk.page in gold and h.name == question["pdf"] and (not doc or h.chunk.doc == doc)

    def rank(leg):
        return min((h.legs[leg] for h in legs if right(h) and h.legs.get(leg)), default=999)
    row = dict(question, score=found.score, dense_on=found.dense, refused_by_gate=found.refused,
               ranks={leg: rank(leg) for leg in LEGS[:3]} |
               {"reranked": next((i for i, h in enumerate(found.hits, 1) if right(h)), 999)})
    if llm:
        for event, data in rag.answer(store, llm, question["question"], snapshot=snapshot):
            if event == "sources":
                row["retrieved"] = any(s["page"] in gold and s["name"] == question["pdf"] for s in data["sources"])
        cited = [c["page"] for c in data["citations"] if c["name"] == question["pdf"]]
        right = any(a.lower() in data["answer"].lower() for a in question.get("answer_any", []))
        row |= dict(answer=data["answer"], refused=data["refused"], gate=data["gate"], cited=cited, right=right,
                    draft=data.get("draft", ""), timings=data["timings"],
                    crag=0 if data["refused"] else 1 if right and question["kind"] == "answerable" else -1)
    return row


def mean(values):
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


def report(rows, title):
    """Print one block of tables; returns the numbers as a dict."""
    print(f"\n{title}")
    numbers = {}
    for lang in sorted({r["lang"] for r in rows}):
        of = {kind: [r for r in rows if r["lang"] == lang and r["kind"] == kind] for kind in KINDS}
        answerable = of["answerable"]
        print(f"  {lang}: " + ", ".join(f"{len(of[kind])} {kind}" for kind in KINDS))
        for leg in LEGS:
            if leg != "dense" or any(r["dense_on"] for r in answerable):
                recall = {k: mean(r["ranks"][leg] <= k for r in answerable) for k in (1, 5, 10)}
                numbers[lang, leg] = recall
                print(f"    recall  {leg:9}" + "".join(f"  @{k} {v:.3f}" for k, v in recall.items()))
        for kind in KINDS[1:]:
            numbers[lang, "auc", kind] = auc([r["score"] for r in answerable], [r["score"] for r in of[kind]])
        print("    AUC of the score, answerable against: " + ", ".join(
            f"{kind} {numbers[lang, 'auc', kind]:.3f}" for kind in KINDS[1:]))
        for what in ("refused_by_gate", "refused"):
            if what in rows[0]:
                rates = {kind: mean(r[what] for r in of[kind]) for kind in KINDS}
                numbers[lang, what] = rates
                print(f"    {what.replace('_', ' '):16}" + ", ".join(f"{kind} {v:.3f}" for kind, v in rates.items()))
        if "refused" in rows[0]:
            answered = [r for r in answerable if not r["refused"]]
            numbers[lang, "right"] = mean(r["right"] and not r["refused"] for r in answerable)
            seen = [r for r in answered if r["retrieved"]]
            numbers[lang, "cited"] = mean(bool(r["cited"]) and r["cited"][0] in pages_of(r) for r in seen)
            numbers[lang, "cited_any"] = mean(bool(set(r["cited"]) & pages_of(r)) for r in seen)
            numbers[lang, "crag"] = {kind: mean(r["crag"] for r in of[kind]) for kind in KINDS}
            print(f"    answers with a wanted string {numbers[lang, 'right']:.3f} of all answerable, "
                  f"{mean(r['right'] for r in answered):.3f} of the {len(answered)} answered")
            print(f"    first citation on the right page {numbers[lang, 'cited']:.3f}, any of the citations "
                  f"{numbers[lang, 'cited_any']:.3f} ({mean(len(r['cited']) for r in seen):.1f} pages each), "
                  f"of {len(seen)} answered with the page retrieved")
            print("    CRAG score  " + ", ".join(f"{k} {v:+.3f}" for k, v in numbers[lang, "crag"].items()))
    return {" ".join(k if isinstance(k, str) else map(str, k)): v for k, v in numbers.items()}


def answerability(store, ids, questions, steps):
    """A try that did not help: lesson 5's LoRA learns on the calibration documents whether a passage answers a question,
    and log P(yes) - log P(no) of the two best passages is the score. Prints its AUC beside that of the evidence."""
    import torch

    import lesson5_lora as lesson5

    def asked(question, passage):
        return [{"role": "user", "content": f"Passage: {passage}\n\nQuestion: {question}\n\nDoes the passage answer the question? "
                                            "Say yes or no."}]
    pairs, rows = {"yes": [], "no": []}, []
    for q in questions:
        if q["kind"] == "off_topic":
            continue
        found = rag.retrieve(store, q["question"], 6, store.snapshot.only([ids[q["pdf"]]]))
        rows.append((q, found))
        for hit in found.hits[:5] if q["pdf"] in CALIBRATION else ():
            there = hit.chunk.page in pages_of(q)
            if q["kind"] == "answerable" and there and any(a.lower() in hit.chunk.text.lower() for a in q["answer_any"]):
                pairs["yes"].append(asked(q["question"], hit.chunk.text))
            elif not there:
                pairs["no"].append(asked(q["question"], hit.chunk.text))
    random.Random(0).shuffle(pairs["no"])
    pairs["no"] = pairs["no"][:2 * len(pairs["yes"])]
    print({said: len(some) for said, some in pairs.items()}, "passages to learn from", flush=True)
    model, tokenizer = lesson5.load_model(weights="nf4")
    conversations = [tokenizer.encode_supervised([*messages, {"role": "assistant", "content": said}])
                     for said in ("yes", "yes", "no") for messages in pairs[said]]
    config = lesson5.TrainConfig(steps=steps, lr=1e-3)
    lesson5.add_adapter(model, config)
    lesson5.train(model, tokenizer, conversations, config)
    model, scores = lesson5.for_decoding(model, 16), []
    yes, no = (tokenizer.encode(said)[0] for said in ("yes", "no"))
    for q, found in rows:
        best = []
        for hit in found.hits[:2]:
            idx = torch.tensor([tokenizer.encode_chat(asked(q["question"], hit.chunk.text))])
            with torch.inference_mode():
                logits = model(idx, lesson5.KVCache(model, 1, idx.size(1)), torch.arange(idx.size(1))[None] == idx.size(1) - 1)
            best.append((logits[0, yes] - logits[0, no]).item())
        scores.append(max(best))
    for lang in sorted({q["lang"] for q, _ in rows}):
        for half, inside in (("calibration half", True), ("reported half", False)):
            some = [(q["kind"] == "answerable", found.score, s) for (q, found), s in zip(rows, scores)
                    if q["lang"] == lang and (q["pdf"] in CALIBRATION) == inside]
            right, evidence, said = map(np.array, zip(*some))
            both = (evidence - evidence.mean()) / evidence.std() + (said - said.mean()) / said.std()
            print(f"{half:17} {lang}: AUC against near misses by " + ", ".join(f"{name} {auc(x[right], x[~right]):.3f}" for name, x in (
                ("evidence", evidence), ("the adapter", said), ("their sum", both))), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=pathlib.Path)
    parser.add_argument("--pdfs", type=pathlib.Path, required=True, help="folder of the PDFs")
    parser.add_argument("--json", type=pathlib.Path, help="write all rows and numbers here")
    parser.add_argument("--together", action="store_true", help="ask of all documents at once, not of its own")
    parser.add_argument("--retrieval-only", action="store_true", help="without the language model")
    parser.add_argument("--answerability", type=int, metavar="STEPS", help="instead: train lesson 5's LoRA to judge passages")
    parser.add_argument("--data", default="out/eval6", help="folder of the index")
    parser.add_argument("--limit", type=int, help="every n-th question only, so that about this many are asked")
    parser.add_argument("--embedder", default=argparse.SUPPRESS)
    parser.add_argument("--model", default=argparse.SUPPRESS)
    parser.add_argument("--adapter", default=argparse.SUPPRESS)
    args = parser.parse_args()
    questions = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    if args.limit:
        questions = questions[::max(1, len(questions) // args.limit)]
    config = rag.Config(**given(args, rag.Config))
    store = rag.open_store(config)
    ids = index(store, args.pdfs, {q["pdf"] for q in questions})
    if args.answerability:
        answerability(store, ids, questions, args.answerability)
        return store.close()
    llm = None if args.retrieval_only else rag.make_llm(config)
    progress, rows = Progress(len(questions), name="question", unit="questions"), []
    for n, q in enumerate(questions, 1):
        rows.append(ask(store, q, None if args.together else ids[q["pdf"]], llm))
        progress(n, n)
    halves = {"calibration half": [r for r in rows if r["pdf"] in CALIBRATION],
              "reported half": [r for r in rows if r["pdf"] not in CALIBRATION]}
    numbers = {title: report(part, f"{title}: " + ", ".join(sorted({r["pdf"] for r in part})))
               for title, part in halves.items() if part}
    numbers["all"] = report(rows, "all documents")
    if args.json:
        args.json.write_text(json.dumps({"numbers": numbers, "rows": rows}, ensure_ascii=False, indent=1), encoding="utf-8")
    store.close()


if __name__ == "__main__":
    main()
