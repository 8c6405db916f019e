"""What a model's head costs when it reads hidden states that `logits_to_keep` has cut, as they are and in one piece.

python benchmarks/head_cut.py      # SmolLM2's head, 49,152 x 576; 32 rows of 40 positions, 1 and 20 kept; one thread
"""

import resource
import time

import torch
from torch.nn.functional import linear


def main() -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        weight, hidden = (torch.randn(*shape).to(dtype) for shape in ((49152, 576), (32, 40, 576)))
        for kept in (1, 20):
            cut = hidden[:, -kept:]
            seconds = {}
            for name, given in (("in one piece", cut.contiguous()), ("cut", cut)):
                begun = time.process_time()
                linear(given, weight)
                seconds[name] = time.process_time() - begun
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            told = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
            print(f"{dtype}, {kept} kept: {told}; peak of the process {peak} MiB")


if __name__ == "__main__":
    main()
