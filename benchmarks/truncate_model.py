"""Make a smaller start model out of the first layers of a checkpoint: same tokenizer, embeddings, final norm and head.

python benchmarks/truncate_model.py runs/smollm2/base runs/smollm2/first-10 --layers 10
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--layers", type=int, required=True)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.source, num_hidden_layers=options.layers)
    model.save_pretrained(options.target)
    AutoTokenizer.from_pretrained(options.source).save_pretrained(options.target)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters -> {options.target}")


if __name__ == "__main__":
    main()
