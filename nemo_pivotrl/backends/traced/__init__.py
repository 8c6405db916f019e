"""One rank's training step without a GPU: real Python of megatron-core, Transformer Engine and mamba_ssm over tensors that
have shapes and no numbers.

What stands in for compiled code refuses to be imported where CUDA is, and nothing but `nemo-pivotrl trace` imports it.
"""
