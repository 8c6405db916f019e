# %% [markdown]
# # PivotRL on a list of trajectories
# Run the cells one after another, or all of them: `python examples/pivotrl.py`. `MODEL` is a Hugging Face folder of the start policy,
# `TRAJECTORIES` a JSONL file of its expert's conversations. The defaults are what `make quickstart` leaves behind.

# %%
import json
import os
import tempfile
from pathlib import Path

import nemo_pivotrl
from nemo_pivotrl.config import Extract, Generation, Grpo, Optimizer, Policy, ProfileStage, Verifier

model = os.environ.get("MODEL", "runs/quickstart/start/policy")
source = Path(os.environ.get("TRAJECTORIES", "runs/quickstart/world/trajectories.jsonl"))
trajectories = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()][:40]
print(f"{len(trajectories)} conversations, the first of {len(trajectories[0]['messages'])} messages")

# %% [markdown]
# A recipe is a dataclass. `nemo_pivotrl.load_recipe("recipe.yaml", ["grpo.max_num_steps=100"])` reads one from a file instead.

# %%
folder = Path(os.environ.get("RUN_DIR") or tempfile.mkdtemp())
(folder / "mine.jsonl").write_text("".join(json.dumps(t) + "\n" for t in trajectories), encoding="utf-8")
recipe = nemo_pivotrl.Recipe(
    run_dir=str(folder),
    policy=Policy(
        model_name=model,
        max_total_sequence_length=512,
        generation=Generation(max_new_tokens=40),
        optimizer=Optimizer(lr=3e-4),
    ),
    extract=Extract(trajectories=[str(folder / "mine.jsonl")], validation_share=0.2),
    verifier=Verifier(message="any"),
    profile=ProfileStage(num_generations=4),
    grpo=Grpo(num_prompts_per_step=4, num_generations_per_prompt=4, max_num_steps=2),
)

# %% [markdown]
# Every stage takes the recipe and returns the file or folder that it wrote. A stage that was killed goes on where it stopped.

# %%
candidates = nemo_pivotrl.extract(recipe)
profiles = nemo_pivotrl.profile(recipe)

# %% [markdown]
# The rule of the paper on one turn: 3 of 8 samples passed.

# %%
print("pivot?", nemo_pivotrl.keep_pivot([1, 1, 1, 0, 0, 0, 0, 0], lambda_diff=0.6))

# %%
pivots = nemo_pivotrl.select_pivots(recipe)
policy = nemo_pivotrl.train(recipe)
print("policy:", policy)
