# %% [markdown]
# # LLMdoctor on two Hugging Face models
# `PATIENT` is the large model, `DOCTOR` a small one with the same tokenizer; the defaults are what `make quickstart` leaves behind.

# %%
import json
import os
import tempfile
from pathlib import Path

import nemo_pivotrl
from nemo_pivotrl.config import Checkpointing, Doctor, Patient, Preferences, Reward, Tfpo, TrainedModel

patient = os.environ.get("PATIENT", "runs/llmdoctor/patient/policy")
doctor = os.environ.get("DOCTOR", "runs/llmdoctor/novice/policy")

# %% [markdown]
# Preferences: prompt, the better answer, the worse one.

# %%
folder = Path(os.environ.get("RUN_DIR") or tempfile.mkdtemp())
pairs = [
    {"prompt": f"how is the {thing}", "chosen": f"the {thing} is lovely , thank you", "rejected": f"the {thing} is bad"}
    for thing in "tea soup room bread lamp garden train book".split()
]
(folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
recipe = nemo_pivotrl.Recipe(
    algorithm="llmdoctor",
    run_dir=str(folder),
    patient=Patient(model_name=patient, max_total_sequence_length=256),
    doctor=TrainedModel(model_name=doctor, max_total_sequence_length=256),
    preferences=Preferences(objectives={"kindness": [str(folder / "pairs.jsonl")]}, validation_share=0.25),
    reward=Reward(faces={"kindness": {"positive": "be kind to the user", "negative": "be rude to the user"}}),
    tfpo=Tfpo(anchor="reference", max_num_steps=2, pairs_per_step=2, max_num_epochs=2, val_period=2),
    checkpointing=Checkpointing(save_period=2),
)

# %%
from nemo_pivotrl.llmdoctor.preferences import preferences  # noqa: E402  beside its use

preferences(recipe)
nemo_pivotrl.build_rewards(recipe)
trained = nemo_pivotrl.train_doctor(recipe)

# %% [markdown]
# The patient steered by the doctor, at three weights. 0 is the patient alone.

# %%
from nemo_pivotrl.backends.reference.guided import GuidedSamplingParams, load_guided  # noqa: E402

generator = load_guided(patient, {"kind": Doctor(path=str(trained), reference=doctor)}, mode="ratio")
asked = [{"role": "user", "content": "how is the tea"}]
prompt = generator.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
for weight in (-1.0, 0.0, 1.0):
    (answer,) = generator.generate([prompt], GuidedSamplingParams(beta={"kind": weight}, max_new_tokens=24))
    print(weight, generator.tokenizer.decode(answer.token_ids))
