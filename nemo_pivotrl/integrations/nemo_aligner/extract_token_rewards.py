"""Stage 1 of LLMdoctor from a `.nemo` patient:
`python -m nemo_pivotrl.integrations.nemo_aligner.extract_token_rewards key=value ...`.

Reads `preferences.jsonl` of the `preferences` stage in `model.llmdoctor.patient.run_dir` and writes `token_rewards.jsonl`
beside it, which `train_gpt_llmdoctor` trains on. The config is `conf/gpt_llmdoctor.yaml`; `pretrained_checkpoint` is the
patient, which must be of the doctor's tokenizer. The stage's code is the project's own; NeMo only scores.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from nemo.core.config import hydra_runner  # noqa: E402

from nemo_pivotrl.config.nemo_aligner import recipe_of  # noqa: E402
from nemo_pivotrl.config.nemo_aligner_blocks import FILE, LLMDoctorModelBlock, plain, read_block  # noqa: E402
from nemo_pivotrl.core.artifacts import digest, file_digest  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner import launch  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.patient import AlignerScorer, MegatronGPTPatientModel  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.pivot_data import chat_over  # noqa: E402
from nemo_pivotrl.llmdoctor.reward import write_token_rewards  # noqa: E402

launch.prepare()


def revision(checkpoint: Path) -> str:
    """Digest of a `.nemo` file, or of a folder of that form: equal iff the patient is the same."""
    if checkpoint.is_file():
        return file_digest(checkpoint)
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    return digest([[str(p.relative_to(checkpoint)), file_digest(p)] for p in files])


@hydra_runner(config_path="conf", config_name="gpt_llmdoctor")  # type: ignore[untyped-decorator]
def main(cfg: Any) -> None:
    """Write the token rewards of every pair; a run that was killed goes on where it was."""
    path = cfg.pretrained_checkpoint.restore_from_path
    block: LLMDoctorModelBlock = read_block(LLMDoctorModelBlock, cfg.model.llmdoctor, "model.llmdoctor")
    lightning, model, _ = launch.start(cfg, "llmdoctor", MegatronGPTPatientModel)
    launch.join(cfg, lightning, model)
    scorer = AlignerScorer(model, block.patient)
    if torch.distributed.get_rank() > 0:
        scorer.serve()
        return
    recipe = dataclasses.replace(recipe_of(plain(cfg), FILE), run_dir=block.patient.run_dir)
    try:
        chat = chat_over(model.tokenizer, "hermes", block.patient.template_kwargs)  # answers are text: no tool calls
        write_token_rewards(recipe, chat, lambda: revision(Path(path)), lambda: scorer, fresh=False)
    finally:
        scorer.close()


if __name__ == "__main__":
    mp.set_start_method("spawn", force=True)
    main()
