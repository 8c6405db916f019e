"""PivotRL and LLMdoctor as NeMo-Aligner components: trainers, Megatron models, data sets, launch scripts.

The mathematics is in `algorithms`; here are only NeMo-Aligner's shapes around it. Its models are
`MegatronGPTModel`s of NeMo 1.x/2.x up to nemo-toolkit 2.4.1 and megatron-core 0.12.3, which know no LatentMoE: for
Nemotron-3-Super use `backends/megatron`.

A module of this package that needs NeMo-Aligner calls `versions.require` before it imports it, so that what is missing is
said by name. The default, tested set is nemo-aligner 0.7.0, nemo-toolkit 2.1.0 and megatron-core 0.10.0.
"""
