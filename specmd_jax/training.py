"""What there is to say about a training run: the shape of the network and how it is trained. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specmd_jax.errors import SpecmdError, unknown

SCHEDULES = ("wsd", "cosine")
OPTIMIZERS = ("muon", "adamw")
BALANCES = ("loss", "bias", "none")
ATTENTIONS = ("auto", "cudnn", "xla")
COMPUTE = ("bfloat16", "float32")
END = "<|end|>"
END_ID = 0


@dataclass(frozen=True)
class Training:
    """Everything that decides the weights besides the data. Sizes are in entries, the batch in sequences."""

    # the network: a qwen3_moe
    layers: int = 8
    width: int = 384
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    top_k: int = 4
    expert_width: int = 64
    dense: bool = False  # one expert as wide as top_k of them: a dense network with as many active weights
    rope_theta: float = 10000.0
    # the objective
    sequence: int = 512  # tokens
    balance: str = "loss"  # what keeps experts in use; a key of BALANCES
    balance_weight: float = 0.01  # of the load-balancing loss
    bias_rate: float = 0.001  # step of the choice's bias where balance is "bias"
    router_z_weight: float = 0.001
    dropout: float = 0.15  # of the embedding and of what each half of a layer adds
    # the optimizer
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    clip: float = 1.0  # of the gradient's global norm
    schedule: str = "wsd"
    warmup_steps: int = 200
    decay_share: float = 0.5  # of all steps, at the end (wsd)
    batch: int = 32
    epochs: float = 12.0  # most times that as many tokens as the training split has are read
    steps: int = 0  # 0: what `epochs` and the time allow
    # how it is run
    seed: int = 0
    compute: str = "bfloat16"
    attention: str = "auto"  # kernel of the attention; auto: cudnn where it works
    dispatch: int = 20  # steps of one program
    block_rows: int = 128  # rows of a block of the grouped product
    evaluations: int = 16  # over the run, each with a checkpoint
    evaluation_windows: int = 64  # most sequences of a domain, until the last evaluation

    def check(self) -> None:
        """Raises SpecmdError for numbers that make no sense."""
        for name, table in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("balance", BALANCES),
            ("attention", ATTENTIONS),
            ("compute", COMPUTE),
        ):
            if getattr(self, name) not in table:
                raise unknown(name, getattr(self, name), table)
        least_one = (
            "layers", "width", "heads", "kv_heads", "head_dim", "experts", "top_k", "expert_width", "sequence", "batch",
            "dispatch", "block_rows", "evaluations", "evaluation_windows", "warmup_steps",
        )  # fmt: skip
        for name in least_one:
            if getattr(self, name) < 1:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("dropout", "decay_share"):
            if not 0 <= getattr(self, name) < 1:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected 0 up to, but not including, 1")
        if not 0 < self.learning_rate < 1 or min(self.weight_decay, self.seed, self.steps) < 0 or self.epochs <= 0:
            raise SpecmdError("expected a learning rate between 0 and 1, epochs above 0, and the rest not below 0")
        if self.top_k > self.experts or self.heads % self.kv_heads or self.head_dim % 2:
            raise SpecmdError("expected top_k up to experts, heads a multiple of kv_heads, and an even head_dim")
        if self.batch * self.sequence % self.block_rows:
            raise SpecmdError(
                f"a batch of {self.batch} x {self.sequence} tokens is no multiple of block_rows {self.block_rows}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update sees."""
        return self.batch * self.sequence

    def hf(self, vocabulary: int, dtype: str = "bfloat16") -> dict[str, Any]:
        """Gives the ``config.json`` of the network, which transformers reads, too."""
        experts, top_k, inner = self.experts, self.top_k, self.expert_width
        if self.dense:
            experts, top_k, inner = 1, 1, self.top_k * self.expert_width
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": dtype,
            "vocab_size": vocabulary,
            "hidden_size": self.width,
            "intermediate_size": inner,
            "moe_intermediate_size": inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.sequence,
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "bos_token_id": END_ID,
            "eos_token_id": END_ID,
        }
