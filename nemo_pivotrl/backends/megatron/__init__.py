"""The `megatron` backend: megatron-core over torch.distributed. Only files in this folder import megatron.

What is arithmetic on a model and a layout lies in `sizing/`, and the variables of torchrun and srun in `backends/launch.py`.

parallel.py      torch.distributed and the process groups, from the recipe
model.py         TransformerConfig, layer specs and this rank's model chunks
lora.py          adapters beside linear layers; lora_mapping.py: which layers, and how they are split over ranks
mapping.py       which HF tensors make up which Megatron parameter, and how they are split over ranks
weights.py       HF safetensors into a model and back, along that mapping
torch_dist.py    megatron-core's checkpoint format: written and read without forks and without unpickling what it holds
checkpoint.py    training state in that format, for any layout of ranks to resume
pretrained.py    start weights from Megatron-LM's and NeMo's checkpoints
logprobs.py      log-probabilities over a vocabulary that is cut over ranks, whole or in chunks
microbatches.py  rows to the micro-batches of each data-parallel rank
pipeline_stage.py  a pipeline stage that ends in log-probabilities and, for a doctor, log V
train.py         the verbs of `backends.base.Trainer`, with or without a value head
sampler.py       rollouts from the weights in training
workers.py       a stage on rank 0, its verbs on all ranks
cpu.py           stand-ins for a machine without CUDA; loaded only when `megatron.cpu` asks for it
"""
