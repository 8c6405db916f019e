"""The `megatron` backend: megatron-core over torch.distributed. Only files in this folder import megatron.

parallel.py      torch.distributed and the process groups, from the recipe
architecture.py  what an HF config says, as plain numbers; refuses what megatron-core would compute differently
model.py         TransformerConfig, layer specs and this rank's model chunks
mapping.py       which HF tensors make up which Megatron parameter, and how they are split over ranks
weights.py       HF safetensors into a model and back, along that mapping
torch_dist.py    megatron-core's checkpoint format: written and read without forks and without unpickling what it holds
checkpoint.py    training state in that format, for any layout of ranks to resume
pretrained.py    start weights from Megatron-LM's and NeMo's checkpoints
shapes.py        the same of published models, by name
memory.py        bytes of a rank by component, by arithmetic
legality.py      which layouts a model allows, before anything is built
precision.py     FP8: from the recipe to Megatron's fields, or a refusal with its reason
logprobs.py      log-probabilities over a vocabulary that is cut over ranks, whole or in chunks
microbatches.py  rows to the micro-batches of each data-parallel rank
stage.py         a pipeline stage that ends in log-probabilities and, for a doctor, log V
train.py         the verbs of `backends.base.Trainer`, with or without a value head
sampler.py       rollouts from the weights in training
workers.py       a stage on rank 0, its verbs on all ranks
launch.py        torchrun's and srun's variables, and a watch that ends all ranks with one error
cpu.py           stand-ins for a machine without CUDA; loaded only when `megatron.cpu` asks for it
"""
