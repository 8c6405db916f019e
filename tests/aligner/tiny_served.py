"""A tiny policy that vLLM's CPU attention takes (heads of 32), in NeMo and as an HF folder, and a server of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import tiny_aligner
import tiny_policy
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
SHAPE = tiny_policy.SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODEL = {
    "model.hidden_size": SHAPE["hidden_size"],
    "model.ffn_hidden_size": SHAPE["intermediate_size"],
    "model.num_attention_heads": SHAPE["num_attention_heads"],
    "model.num_query_groups": SHAPE["num_key_value_heads"],
}
ARCHITECTURE = dataclasses.replace(
    tiny_aligner.ARCHITECTURE,
    **{name: SHAPE[name] for name in SHAPE if hasattr(tiny_aligner.ARCHITECTURE, name)},
    head_dim=32,
)


def write_folder(folder: Path, tokenizer: Path) -> None:
    """The policy as an HF checkpoint."""
    shutil.copytree(tokenizer, folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps({**config, **SHAPE, "torch_dtype": "float32"}))
    save_file(weights(tokenizer.parent), str(folder / "model.safetensors"), {"format": "pt"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """`tiny_aligner.talkative_weights` in this shape."""
    return tiny_aligner.talkative_weights(folder, SHAPE)


def settings(hf_folder: str, url: str, **servers: Any) -> dict[str, Any]:
    """`model.pivotrl`'s keys for turns from the server at `url`."""
    return {
        "model.pivotrl.generation": "servers",
        "model.pivotrl.hf_folder": hf_folder,
        "model.pivotrl.servers": {"servers": [url], **servers},
    }


class Server:
    """`nemo-pivotrl serve CONFIG --refit` in vLLM's environment, of a NeMo-Aligner config."""

    def __init__(self, python: str, home: Path, hf_folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", home / "server.log"
        engine = {"servers": [self.url], "kv_cache_gib": 0.06, "max_num_seqs": 16}
        lengths = {"max_length": tiny_aligner.MAX_LENGTH}
        block = {"generation": "servers", "hf_folder": str(hf_folder), "servers": engine, "length_params": lengths}
        config = {
            "defaults": ["gpt_pivotrl", "_self_"],
            "trainer": {"precision": 32},
            "exp_manager": {"explicit_log_dir": str(home / "logs")},
            "model": {"encoder_seq_length": 128, "pivotrl": block},
        }
        (home / "served.yaml").write_text(json.dumps(config))
        command = [python, "-m", "nemo_pivotrl.cli", "serve", str(home / "served.yaml"), "--refit"]
        settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdout=out,
                stderr=out,
                env={**os.environ, **settings, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
                start_new_session=True,
            )

    def wait(self, seconds: float = 240.0) -> None:
        """Until it is healthy. Raises AssertionError with its last words."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise AssertionError(f"no server:\n{self.log.read_text(errors='replace')[-4000:]}")

    def kill(self) -> None:
        """The server and its engine, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
