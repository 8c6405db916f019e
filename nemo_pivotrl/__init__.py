"""nemo_pivotrl: PivotRL and LLMdoctor for NVIDIA's NeMo/Megatron stack."""

__version__ = "0.1.0"
