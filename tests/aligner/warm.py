"""What the parent of a test's ranks imports before it forks them: NeMo-Aligner on its stand-ins, and our components."""

import gc

import shims

shims.install()

import jobs  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

from nemo_pivotrl.integrations.nemo_aligner import actor, doctor_model, train_gpt_llmdoctor, train_gpt_pivotrl  # noqa: E402, F401

gc.collect()
gc.freeze()  # collections in the ranks pass over what is imported here
