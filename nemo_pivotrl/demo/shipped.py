"""The tiny models that come with the package, so that a quickstart need not train them, and the command that packs them.

Training them takes minutes, and gives other bytes on another processor. The start policy learns from careless clerks, as that of
benchmarks/pivotrl_claims.py does. Weights are packed in float16 and unpacked in float32. To make them anew:

    nemo-pivotrl warmup recipes/pivotrl/tiny.yaml run_dir=runs/start num_threads=1 world.expert_error_rate=0.8 \\
        world.warmup_tasks=2000 world.puzzle_warmup_tasks=16000 warmup.num_steps=1500 warmup.copy_steps=220
    nemo-pivotrl manners recipes/llmdoctor/tiny.yaml run_dir=runs/manners
    python -m nemo_pivotrl.demo.shipped runs/start/start/policy runs/manners/patient/policy runs/manners/novice/policy
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from nemo_pivotrl.core.atomic import replacing_folder
from nemo_pivotrl.core.errors import InputError, Problem

FOLDER = Path(__file__).with_name("models")
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
DIGESTS: dict[str, str] = {
    "start-policy": "e3ceab3a7ca91ea400c9f34b43f606030f547cf2089cde355f2bdeb2768ea207",
    "patient": "44049d5f64671f9450c128cfa5f1e43651740dc7dcbf7b4ee8c8746285c57898",
    "novice": "2f51738f0c2ed293fca1bcbbe7472e7f13d96c0e37a39bda396e327d400562d1",
}
"""Model -> digest of its files, names included."""


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and the bytes of a packed model's files."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        found.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def unpack(name: str, final: Path) -> Path:
    """Write a shipped model as the HF checkpoint `final`, in float32. Raises InputError for a damaged or unknown one."""
    source = FOLDER / name
    if name not in DIGESTS or not source.is_dir():
        remedy = f"install the package whole; it ships {', '.join(DIGESTS) or 'none'}"
        raise InputError(Problem(str(source), None, "model", "not there", remedy))
    if (found := folder_digest(source)) != DIGESTS[name]:
        raise InputError(
            Problem(str(source), None, "digest", found, f"expected {DIGESTS[name]}; install the package anew")
        )
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(source / "model.safetensors")
    with replacing_folder(final) as part:
        for path in source.iterdir():
            shutil.copyfile(path, part / path.name)
        save_file({key: value.to(torch.float32) for key, value in weights.items()}, part / "model.safetensors", _PT)
    return final


_PT = {"format": "pt"}


def pack(source: Path, name: str) -> str:
    """Copy an HF checkpoint's `FILES` into the package, its weights in float16; returns its digest, which goes into `DIGESTS`."""
    import torch
    from safetensors.torch import load_file, save_file

    target = FOLDER / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in FILES:
        shutil.copyfile(source / file, target / file)
    weights = load_file(source / "model.safetensors")
    save_file({key: value.to(torch.float16) for key, value in weights.items()}, target / "model.safetensors", _PT)
    return folder_digest(target)


def main() -> None:
    """Pack the start policy, the patient and the novice, and print what `DIGESTS` must say."""
    for name, source in zip(("start-policy", "patient", "novice"), sys.argv[1:], strict=True):
        print(f'    "{name}": "{pack(Path(source), name)}",')


if __name__ == "__main__":
    main()
