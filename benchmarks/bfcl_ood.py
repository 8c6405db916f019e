"""What a policy must not lose, from the PyPI package `chatterbot-corpus` (BSD): talk that it did not train on, and trivia questions.

    python benchmarks/bfcl_ood.py texts FOLDER                  (where chatterbot-corpus is installed)
    python benchmarks/bfcl_ood.py likelihood FOLDER LABEL=POLICY ...

`texts` writes `questions.jsonl`, trivia as `evaluate.retention` reads it, and `talk.jsonl`, lines and answers that people wrote.
`likelihood` writes of each policy the nats of every such answer in its own chat template, and their tokens, to `likelihoods.json`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

TALK = ("conversations", "emotion", "food", "gossip", "greetings", "health", "history", "literature", "psychology")
QUESTIONS = 60


def corpus(name: str) -> list[list[str]]:
    """The conversations of one file, each a list of lines."""
    import yaml

    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        sys.exit("chatterbot-corpus is not installed: pip install --no-deps chatterbot-corpus==1.3.3")
    path = Path(spec.origin).parent / "data" / "english" / f"{name}.yml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    return [[str(line) for line in lines] for lines in found]


def write_texts(folder: Path) -> None:
    """The first questions whose answer is three words at most, and of every conversation of `TALK` the first two lines."""
    pairs = [(lines[0], lines[1]) for lines in corpus("trivia") if len(lines) == 2 and len(lines[1].split()) <= 3]
    asked = [{"messages": [{"role": "user", "content": q}], "answer": answer} for q, answer in pairs[:QUESTIONS]]
    talk = [lines[:2] for name in TALK for lines in corpus(name) if len(lines) > 1]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("questions", asked), ("talk", talk)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        print(f"{len(rows)} rows -> {folder / name}.jsonl")


def likelihood(folder: Path, policies: dict[str, str]) -> None:
    """{label: [[nats, tokens] of each answer]}; what is there stays."""
    import torch

    from nemo_pivotrl.backends.base import TokenBatch
    from nemo_pivotrl.backends.loading import load
    from nemo_pivotrl.components.rollout import load_chat
    from nemo_pivotrl.config import Policy

    torch.set_num_threads(1)
    pairs = [json.loads(line) for line in (folder / "talk.jsonl").read_text(encoding="utf-8").splitlines()]
    target = folder / "likelihoods.json"
    found = json.loads(target.read_text()) if target.exists() else {}
    for label, name in policies.items():
        if label in found:
            continue
        policy = Policy(model_name=name, dtype="float32", train_micro_batch_tokens=2048)
        chat = load_chat(policy)
        rows = [
            chat.example_ids([{"role": "user", "content": a}], (), {"role": "assistant", "content": b})
            for a, b in pairs
        ]
        batch = TokenBatch([p for p, _ in rows], range(len(rows)), [r for _, r in rows], {})
        totals = load(policy).get_inference_log_probs(batch).sum(1).tolist()
        found[label] = [[-total, len(r)] for total, (_, r) in zip(totals, rows, strict=True)]
        target.write_text(json.dumps(found))
        nats, tokens = (sum(column) for column in zip(*found[label], strict=True))
        print(f"{label}: {nats / tokens:.4f} nats a token over {len(rows)} answers, {tokens} tokens")


if __name__ == "__main__":
    if sys.argv[1] == "texts":
        write_texts(Path(sys.argv[2]))
    else:
        likelihood(Path(sys.argv[2]), dict(pair.split("=", 1) for pair in sys.argv[3:]))
