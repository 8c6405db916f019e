"""Settings of models: how one is run, trained, spread over processes and served. `recipe.py` has the recipe that they are part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_pivotrl.config.schema import ranged


@dataclass(kw_only=True, slots=True, frozen=True)
class Lora:
    """Low-rank adapters: peft's on the reference backend, the same beside Megatron's layers. Off means that all weights train."""

    enabled: bool = False
    """Train adapters of low rank instead of all weights."""
    r: int = ranged(16, 1)
    """Rank of an adapter's two matrices."""
    alpha: int = ranged(32, 1)
    """Scale of the adapters: alpha / r times their product is added."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter, as transformers names them. On Megatron routed experts get none."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Generation:
    """How a turn is sampled, in profiling and in training alike (P5: temperature 1, top-p 1)."""

    temperature: float = ranged(1.0, 0.0, 10.0)
    """Divides the logits; 0 takes the likeliest token, which training cannot use."""
    top_p: float = ranged(1.0, 0.01, 1.0)
    """Sample from the fewest likeliest tokens whose probability reaches this; training needs 1.0."""
    max_new_tokens: int = ranged(512, 1)
    """Longest answer in tokens. A longer one is truncated and scores 0."""
    batch_tokens: int = ranged(16384, 16)
    """Prompt plus new tokens of all rows that are decoded together; bounds the KV cache."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Optimizer:
    """AdamW (P13: 1e-6 constant, no weight decay, gradient clip 1.0)."""

    lr: float = ranged(1e-6, 0.0, 1.0)
    """Learning rate after the warm-up."""
    weight_decay: float = ranged(0.0, 0.0, 1.0)
    """Decoupled weight decay of AdamW."""
    beta1: float = ranged(0.9, 0.0, 0.99999)
    """Decay of the running mean of the gradient."""
    beta2: float = ranged(0.999, 0.0, 0.99999)
    """Decay of the running mean of the squared gradient."""
    eps: float = ranged(1e-8, 0.0, 1.0)
    """Added to the root of the squared gradient's mean."""
    max_grad_norm: float = ranged(1.0, 0.0)
    """A gradient with a greater norm is scaled down to it."""
    warmup_steps: int = ranged(0, 0)
    """Steps over which the learning rate rises linearly from 0."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ChatSettings:
    """How messages reach the chat template, and what it may leave out."""

    roles: dict[str, str] = field(default_factory=dict)
    """Roles that are renamed before the template sees them, e.g. `developer: system` where it knows no developer."""
    accept_dropped: tuple[
        Literal["tools", "calls", "parallel_calls", "text_beside_calls", "tool", "system", "developer"], ...
    ] = ()
    """What the template may leave out of the prompt; anything else that it drops is an error."""
    special_tokens: Literal["as_text", "refuse"] = "as_text"
    """Special tokens in people's and tools' text: encode them as text, or exclude the state."""
    date: str = "2026-01-01"
    """The day that a template with a clock writes (YYYY-MM-DD): a state has the same tokens every day.

    It is a part of the template's fingerprint where the template has a clock.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainedModel:
    """A model that trains: where it starts, what runs it and how it is optimised."""

    model_name: str = ""
    """HF checkpoint folder to start from; of a policy also what is profiled, and the KL reference."""
    backend: Literal["reference", "megatron"] = "reference"
    """What runs and trains the model: transformers on one device, or megatron-core over many processes.

    Of a doctor, it says what trains it (`tfpo`); guided decoding runs `reference`.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the `reference` backend runs; `auto` takes CUDA where there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of the weights of the `reference` backend."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. `enable_thinking: false`."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    tool_parser: str = "auto"
    """How the model writes tool calls, as vLLM names it; `auto` finds out by rendering one."""
    max_total_sequence_length: int = ranged(4096, 16)
    """Prompt plus new tokens.

    A state that does not fit is excluded and counted, never scored 0.
    """
    train_micro_batch_tokens: int = ranged(16384, 16)
    """Padded tokens of one forward and backward pass."""
    prefix_sharing: bool = True
    """Run prompts and prefixes that rows share once (`prefix_tree.py`).

    Log-probabilities and gradient are the same, for fewer tokens. `off` runs every sample with its whole prompt.
    """
    prefix_attention: Literal["auto", "flex", "torch", "flash_attn_2", "flash_attn_3", "transformer_engine"] = "auto"
    """What computes attention over shared prefixes on GPUs; `auto` is FlexAttention there (`flex`).

    On CPUs `auto`, which is torch's fused attention there, is the only one. The others are kernels for packed sequences: PyTorch's
    own FlashAttention, the packages of FlashAttention 2 and 3, and cuDNN's by Transformer Engine. All compute the same
    (`tree_attention.py`).
    """
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapters (peft)."""
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(kw_only=True, slots=True, frozen=True)
class Policy(TrainedModel):
    """The start policy (pi_0) and how it is run."""

    sampler: Literal["backend", "vllm"] = "backend"
    """What generates turns: the backend itself, or vLLM as the `vllm` section says.

    vLLM gets the new weights after every training step.
    """
    generation: Generation = field(default_factory=Generation)


@dataclass(kw_only=True, slots=True, frozen=True)
class Megatron:
    """How the `megatron` backend spreads a model and in which precision it computes. Names are Megatron's own."""

    tensor_model_parallel_size: int = ranged(1, 1)
    """Ranks that share each layer's matrices.

    It divides the model's key-value heads or is a multiple of them. In a hybrid it divides the Mamba groups.
    """
    pipeline_model_parallel_size: int = ranged(1, 1)
    """Ranks that hold consecutive layers; it divides the number of layers."""
    context_parallel_size: int = ranged(1, 1)
    """Ranks that share a sequence's tokens; sequences are padded to a multiple of twice this."""
    expert_model_parallel_size: int = ranged(1, 1)
    """Ranks that share a layer's experts; it divides their number.

    They are taken out of the data-parallel ranks.
    """
    expert_tensor_parallel_size: int = ranged(1, 1)
    """Ranks that share each expert's matrices."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence, too, over the tensor-parallel ranks.

    A mixture of experts with `tensor_model_parallel_size` above 1 needs it.
    """
    use_distributed_optimizer: bool = True
    """Spread the optimiser's state over the data-parallel ranks."""
    grad_reduce_in_fp32: bool = True
    """Keep and sum gradients in float32; false: in the weights' precision, for half the memory."""
    sequence_packing: bool = False
    """Lay the rows of a micro-batch one after another into one stream, without padding.

    It is not for models with Mamba layers.
    """
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """How tokens reach their experts; `flex` needs DeepEP."""
    moe_grouped_gemm: bool = True
    """One kernel for all of a rank's experts; it needs Transformer Engine, so `cpu` ignores it."""
    moe_freeze_router: bool = True
    """Leave routers as they are: the experts that profiled are the experts that train (P14)."""
    recompute: Literal["none", "selective", "full"] = "selective"
    """Activations computed again in the backward pass: none, the attention scores, or all of every layer."""
    bf16: bool = True
    """Weights and products in bfloat16, with the optimiser's copy in float32; false: all in float32."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """Matrix products in FP8: e4m3 throughout, or e5m2 for output gradients (`hybrid`); needs Transformer Engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 tensors are scaled. `blockwise` needs CUDA 12.9, `mxfp8` Blackwell."""
    fp8_param: bool = False
    """Keep the weights themselves in FP8."""
    first_last_layers_bf16: bool = True
    """With `tensorwise` or `blockwise`: leave the outermost layers in bfloat16."""
    num_layers_at_start_in_bf16: int = ranged(2, 0)
    """How many of the first layers `first_last_layers_bf16` leaves."""
    num_layers_at_end_in_bf16: int = ranged(2, 0)
    """How many of the last layers `first_last_layers_bf16` leaves."""
    load: str = ""
    """A torch_dist checkpoint to start from, in place of the weights in `policy.model_name`.

    It is Megatron-LM's (the folder with `latest_checkpointed_iteration.txt`, or one `iter_*` in it) or NeMo's (the folder with
    `weights`). Any layout of ranks may have written it. `policy.model_name` then needs to hold no more than config.json and the
    tokenizer.
    """
    logprob_chunk_tokens: int = ranged(1024, 1)
    """Response tokens whose logits exist at the same time, in float32.

    Fewer take less memory and more launches.
    """
    cpu: bool = False
    """Run on CPUs over gloo: for tests and for trying a recipe out.

    It replaces parts of torch.cuda and of megatron-core in this process by CPU twins (`backends/megatron/cpu.py`), and refuses
    to where there is a CUDA device.
    """
    distributed_timeout_minutes: int = ranged(30, 1)
    """A collective that waits longer ends the job."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Vllm:
    """vLLM for `policy.sampler: vllm` and `patient.backend: vllm`: an engine in this process, or servers."""

    servers: tuple[str, ...] = ()
    """Addresses of OpenAI-compatible servers of the policy, or of the patient with its doctors; empty: an engine in this process.

    For example http://127.0.0.1:8000. `nemo-pivotrl serve` starts one that can be refitted.
    """
    model: str = ""
    """Name under which all servers serve the policy; empty: what each says it serves."""
    api_key_env: str = "VLLM_API_KEY"
    """Environment variable that holds the servers' key; unset means that none is sent."""
    api_key_hosts: tuple[str, ...] = ()
    """Hosts (or host:port) that the key is sent to, over https or on this machine, and no others.

    One written `http://HOST` gets it over http, too: then the network to it must be private.
    """
    concurrency: int = ranged(64, 1)
    """Requests that one server holds at a time; the others wait here."""
    timeout_s: float = ranged(600.0, 0.1)
    """Seconds for one request, and for how long all servers may be away before the stage stops."""
    max_retries: int = ranged(6, 0)
    """Retries of a request; after the last one its sample is lost: counted, and never scored.

    It is retried for lost connections, time-outs, 408, 409, 425, 429, 5xx and malformed answers.
    """
    backoff_s: float = ranged(0.5, 0.001)
    """Seconds before the first retry of a request or a lost server; doubled up to 30 s, with jitter."""
    eject_after: int = ranged(3, 1)
    """Failures in a row after which a server gets no more requests until it is healthy again.

    A lost connection is enough.
    """
    colocated: bool = False
    """Spread the engine over the ranks of the job (`policy.backend: megatron`), on the same devices."""
    sleep: bool = False
    """Give the engine's memory back between rollouts: for one that shares its device with the trainer."""
    tensor_parallel_size: int = ranged(1, 1)
    """Ranks of the engine; a colocated one takes all ranks of the job."""
    gpu_memory_utilization: float = ranged(0.9, 0.01, 1.0)
    """Share of a GPU's memory that the engine may use."""
    kv_cache_gib: float = ranged(1.0, 0.01)
    """GiB of KV cache of an engine on CPUs."""
    enforce_eager: bool = False
    """Neither compile nor capture graphs: slower steps, and an engine that starts in seconds.

    It is always so on CPUs.
    """
    max_num_seqs: int = ranged(256, 1)
    """Sequences that are decoded at a time."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, as they are."""
    refit_folder: str = ""
    """Folder through which weights pass to servers and to engines in several processes.

    All of them must see it. Empty: a folder in memory (/dev/shm), which only this machine sees.
    """
    refit_tolerance: float = ranged(0.05, 0.0)
    """Nats a token by which engine and trainer may differ on a probe after a refit, as a mean."""
