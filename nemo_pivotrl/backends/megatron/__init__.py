"""The `megatron` backend: megatron-core over torch.distributed. Only files in this folder import megatron.

parallel.py      torch.distributed and the process groups, from the recipe
architecture.py  what an HF config says, as plain numbers; refuses what megatron-core would compute differently
model.py         TransformerConfig, layer specs and this rank's model chunks
mapping.py       which HF tensors make up which Megatron parameter, and how they are split over ranks
weights.py       HF safetensors into a model and back, along that mapping
cpu.py           stand-ins for a machine without CUDA; loaded only when `megatron.cpu` asks for it
"""
