"""What doctors cost that are LoRA adapters on one base inside vLLM: python benchmarks/lora_doctors.py

Random models, one thread, everything in one process and in turns, so that only ratios are worth reading: medians over rounds,
with the lowest and the highest. Each way decodes the same prompts to the same length; `doctors 2` is the second doctor, too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import vllm
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm_speed import PROMPT, ROWS, ratio, saved, seconds

from nemo_pivotrl.backends.vllm.decode import GuidedEngine
from nemo_pivotrl.config import Decode, Doctor, Patient, Vllm
from nemo_pivotrl.demo import tiny_models as tiny


def adapter(base: str, folder: Path, seed: int, r: int) -> str:
    """An adapter on every linear layer of the base."""
    torch.manual_seed(seed)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=layers, task_type="CAUSAL_LM")
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    made.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=384, help="of the patient")
    parser.add_argument("--layers", type=int, default=6, help="of the patient")
    parser.add_argument("--doctor-hidden", type=int, default=256)
    parser.add_argument("--doctor-layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = tiny.make_tokenizer([f"word{i} and {i * i}" for i in range(2000)], 2048)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        patient = saved(root / "patient", tokenizer, options.hidden, options.layers, 1)
        whole = [saved(root / f"whole{i}", tokenizer, options.doctor_hidden, options.doctor_layers, i) for i in (2, 3)]
        doctors = {f"whole{i}": Doctor(path=path) for i, path in enumerate(whole)}
        doctors |= {f"lora{i}": Doctor(path=adapter(whole[0], root / f"lora{i}", i, options.rank)) for i in (0, 1)}
        engine = GuidedEngine(
            Patient(model_name=patient, max_total_sequence_length=1024),
            Decode(doctors=doctors),
            Vllm(max_num_seqs=ROWS),
            tokenizer,
            frozenset(),
        )
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(8, 250, (PROMPT,), generator=generator).tolist() for _ in range(ROWS)]

        def run(names: tuple[str, ...], length: int) -> float:
            extra = {"guidance.alpha": 1.0, **{f"guidance.beta.{name}": 0.5 for name in names}}
            asked = vllm.SamplingParams(max_tokens=length, seed=1, ignore_eos=True, detokenize=False, extra_args=extra)
            return seconds(lambda: engine.engine._generate(prompts, [asked] * ROWS))

        ways: dict[str, tuple[str, ...]] = {
            "patient alone": (),
            "whole doctor": ("whole0",),
            "2 whole doctors": ("whole0", "whole1"),
            "LoRA doctor": ("lora0",),
            "2 LoRA doctors": ("lora0", "lora1"),
        }
        time: dict[str, list[float]] = {name: [] for name in ways}
        for names in ways.values():
            run(names, 4)
        for _ in range(options.rounds):
            for name, names in ways.items():
                time[name].append(run(names, options.length))
        size = [
            sum(p.stat().st_size for p in Path(f).glob("*.safetensors")) for f in (patient, whole[0], root / "lora0")
        ]
        print("MB of weights: patient {:.1f}, a doctor {:.2f}, an adapter {:.2f}".format(*(s / 1e6 for s in size)))
        print(f"{ROWS} rows, {options.length} new tokens, rank {options.rank}, float32, {options.rounds} rounds")
        for name, values in time.items():
            print(f"  tokens/s, {name:<16} {ROWS * options.length / statistics.median(values):8.1f}")

        def added(name: str) -> list[float]:
            return [a - b for a, b in zip(time[name], time["patient alone"], strict=True)]

        print(f"  speed, 2 LoRA / 1 LoRA           {ratio(time['LoRA doctor'], time['2 LoRA doctors'])}")
        print(f"  speed, 2 LoRA / 2 whole          {ratio(time['2 whole doctors'], time['2 LoRA doctors'])}")
        print(f"  speed, 1 LoRA / 1 whole          {ratio(time['whole doctor'], time['LoRA doctor'])}")
        print(f"  time added, 2 LoRA / 1 LoRA      {ratio(added('2 LoRA doctors'), added('LoRA doctor'))}")
        print(f"  time added, 2 LoRA / 2 whole     {ratio(added('2 LoRA doctors'), added('2 whole doctors'))}")
        engine.close()


if __name__ == "__main__":
    main()
