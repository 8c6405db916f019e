"""The embedded tool-use world for a tiny `MegatronGPTModel`: its pivots, and a start policy that half knows them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch

from nemo_pivotrl.config import Recipe, Verifier, World
from nemo_pivotrl.core.artifacts import Header, canonical_json, read_rows, write_artefact
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.gym_rows import message_of
from nemo_pivotrl.data.states import candidates_of, open_states, reference
from nemo_pivotrl.demo import service_desk as world
from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories as make_world
from nemo_pivotrl.demo.tiny_models import make_tokenizer
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.verifiers.loading import identity, load_verifier

MAX_LENGTH = 40
MODEL: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 4,
    "model.encoder_seq_length": 512,
    "model.max_position_embeddings": 512,
    "model.init_method_std": 0.05,
    "model.optim": {"name": "sgd", "lr": 0.2, "weight_decay": 0.0},
}


def write_world(folder: Path, pivots: int) -> None:
    """`tokenizer/` and `pivots.jsonl` in `folder`: turns of the service desk's experts, tool calls among them."""
    recipe = Recipe(run_dir=str(folder), world=World(train_tasks=40))
    recipe = _with_trajectories(recipe, make_world(recipe))
    rng = random.Random(0)
    texts = [canonical_json(world.expert_trajectory(t, rng)) for t in world.tasks(0, {"train": 200})["train"]]
    tokenizer = make_tokenizer(texts, 512)
    tokenizer.save_pretrained(folder / "tokenizer")
    source = extract(recipe)
    states = open_states(source)

    def words(row: dict[str, Any]) -> int:
        return sum(len(call.arguments) for call in states.candidate(row).expected.calls)

    calls = [row for row in read_rows(source) if row["split"] == "train" and row["calls"]]
    chat, settings = Chat(tokenizer), Verifier()
    rows = sorted(calls, key=words)[:pivots]  # short ones are soon learnt
    for row in rows:
        state = states.candidate(row)
        row["tokens_prompt"] = len(chat.prompt_ids(state.messages, state.tools))
    header = Header(
        stage="pivots",
        config_hash="",
        tokenizer=chat.fingerprint,
        chat_template=chat.template_digest,
        verifier=identity(load_verifier(settings), settings),
        extra={"sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": MAX_LENGTH}}
        | reference(states.path, folder / "pivots.jsonl"),
    )
    held_out = [row | {"split": "validation", "candidate_id": f"{row['candidate_id']}v"} for row in rows]
    write_artefact(folder / "pivots.jsonl", header, [*rows, *held_out])


def _with_trajectories(recipe: Recipe, path: Path) -> Recipe:
    return dataclasses.replace(
        recipe, extract=dataclasses.replace(recipe.extract, trajectories=(str(path),), near_duplicate=1.0)
    )


def imitate(trainer: Any, folder: Path, steps: int, copies: int) -> None:
    """Fine-tune on the pivots' expert turns: the clipped loss at ratio 1 with every advantage 1 has SFT's gradient."""
    model, chat = trainer.model, trainer.rm.chat
    rows = []
    for candidate in candidates_of(folder / "pivots.jsonl", "train"):
        state, expert = (candidate.messages, candidate.tools), message_of(candidate.expected)
        rows.append((chat.prompt_ids(*state), chat.action_ids(*state, expert)))
    rows = rows * copies
    width = max(len(p) + len(r) for p, r in rows)
    tokens = torch.full((len(rows), width), model.tokenizer.eos_id)
    mask = torch.zeros(len(rows), width - 1)
    for i, (prompt, response) in enumerate(rows):
        tokens[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        mask[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(steps):
        log_probs = model.get_inference_log_probs(tokens)
        ones = torch.ones(len(rows))
        batch = {"response_tokens": tokens, "prev_logprobs": log_probs, "advantages": ones, "valid": ones, "mask": mask}
        model.prepare_for_training()
        optimizer.zero_grad()
        model.prepare_for_training_step()
        model.get_loss_and_metrics(batch, forward_only=False)
        model.finish_training_step()
        optimizer.step()
