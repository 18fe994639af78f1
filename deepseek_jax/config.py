"""Every setting of a run as nested frozen dataclasses, checked when they are made.

Names and defaults follow DeepSeek-V3 (arXiv:2412.19437, sections 2 and 4.2) where it
gives one. `ModelConfig` says what is computed; `RuntimeConfig` and `MeshConfig` say
how, and may change between a run and its continuation; `signature` is what may not.
Architecture is chosen by these fields, never by a model's name.
"""

import dataclasses
import typing
from dataclasses import dataclass, field

from deepseek_jax.nested import check as _check
from deepseek_jax.nested import flatten as flatten
from deepseek_jax.nested import from_dict as from_dict
from deepseek_jax.nested import one_of as _one_of
from deepseek_jax.nested import positive as _positive
from deepseek_jax.nested import to_dict as to_dict
from deepseek_jax.precision import policy

Changes = tuple[tuple[int, float], ...]  # (step, value) pairs: from that step on
Placements = tuple[tuple[str, str], ...]  # (pattern of names, axes of the dimensions)

ATTENTION_KINDS = ("mla", "mha", "gqa")
SCORES = ("sigmoid", "softmax")
GROUP_SCORES = ("top2", "max")
STRATEGIES = (
    "none",
    "loss_free",
    "loss_free_proportional",
    "multiplicative",
    "loss_free_frozen",
    "aux_batch",
    "aux_seq",
    "aux_global",
    "quantile",
    "z_loss",
    "v3",
)
LR_SCHEDULES = ("constant", "cosine", "wsd")
PACKINGS = ("concat", "best_fit")
COMPUTES = tuple(policy.POLICIES)
MOMENTS = ("f32", "bf16")
ATTENTION_PATHS = ("plain", "chunked")
EXPERT_PATHS = ("dense", "blocks")
AUTO = "auto"
IMPLEMENTATIONS = (AUTO, "xla", "mosaic_gpu", "interpret")
REMATS = ("policy", "none", "products", "full")
RULES = ("fsdp", "zero1", "ep", "replicated")
TRANSPORTS = ("all_to_all", "two_hop", "ragged", "ring")
SCHEDULES = ("none", "gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
KEEPS = ("inputs", "products")
PAYLOADS = ("exact", "bf16", "fp8", "fp8_ue8m0")


def _increasing(name: str, changes: Changes) -> None:
    steps = [step for step, _ in changes]
    _check(
        steps == sorted(set(steps)) and all(step > 0 for step in steps),
        name,
        changes,
        "must be (step, value) pairs with increasing positive steps",
    )
    _check(
        all(value >= 0 for _, value in changes), name, changes, "values must be >= 0"
    )


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; YaRN is on when `factor` > 1, whatever the input's length."""

    theta: float = 10_000.0
    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        _positive("model.attention.rope", self, "theta", "original_length")
        _check(
            self.factor >= 1,
            "model.attention.rope.factor",
            self.factor,
            "must be at least 1 (1 = plain RoPE, more = YaRN)",
        )


@dataclass(frozen=True)
class AttentionConfig:
    """MLA (section 2.1.1) or the baselines it is compared with.

    A query/key head has `nope_dim` unrotated and `rope_dim` rotated numbers, a value
    head `value_dim`, for every kind. `q_rank` = 0 leaves the query uncompressed; the
    ranks matter to `mla` only, `kv_heads` to `gqa` only.
    """

    kind: str = "mla"
    num_heads: int = 128
    kv_heads: int = 1
    q_rank: int = 1536
    kv_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        at = "model.attention"
        _one_of(f"{at}.kind", self.kind, ATTENTION_KINDS)
        _positive(at, self, "num_heads", "kv_heads", "kv_rank", "rope_dim", "value_dim")
        _check(
            self.q_rank >= 0, f"{at}.q_rank", self.q_rank, "must be 0 (none) or more"
        )
        _check(self.nope_dim >= 0, f"{at}.nope_dim", self.nope_dim, "must be 0 or more")
        _check(
            self.rope_dim % 2 == 0,
            f"{at}.rope_dim",
            self.rope_dim,
            "must be even: RoPE turns pairs",
        )
        _check(
            self.kind != "gqa" or self.num_heads % self.kv_heads == 0,
            f"{at}.kv_heads",
            self.kv_heads,
            f"must divide num_heads = {self.num_heads}",
        )


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE (section 2.1.2): routed and shared experts, node-limited routing."""

    num_experts: int = 256
    top_k: int = 8
    ffn_dim: int = 2048
    num_shared: int = 1
    num_groups: int = 8
    keep_groups: int = 4
    score: str = "sigmoid"
    group_score: str = "top2"
    normalize: bool = True
    scale: float = 2.5

    def __post_init__(self) -> None:
        at = "model.moe"
        _positive(
            at, self, "num_experts", "top_k", "ffn_dim", "num_groups", "keep_groups"
        )
        _check(
            self.num_shared >= 0, f"{at}.num_shared", self.num_shared, "must be >= 0"
        )
        _one_of(f"{at}.score", self.score, SCORES)
        _one_of(f"{at}.group_score", self.group_score, GROUP_SCORES)
        _check(
            self.num_experts % self.num_groups == 0,
            f"{at}.num_groups",
            self.num_groups,
            f"must divide num_experts = {self.num_experts}",
        )
        _check(
            self.keep_groups <= self.num_groups,
            f"{at}.keep_groups",
            self.keep_groups,
            f"must be at most num_groups = {self.num_groups}",
        )
        reachable = self.num_experts // self.num_groups * self.keep_groups
        _check(
            self.top_k <= reachable,
            f"{at}.top_k",
            self.top_k,
            f"must be at most {reachable}, "
            f"the experts in the {self.keep_groups} kept groups",
        )
        _check(
            self.num_groups == 1
            or self.group_score == "max"
            or self.num_experts // self.num_groups >= 2,
            f"{at}.group_score",
            self.group_score,
            "must be 'max' when a group has a single expert",
        )


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction (section 2.2); `input_norm`: h^0 is taken after the final
    norm.
    """

    depth: int = 0
    input_norm: bool = True

    def __post_init__(self) -> None:
        _check(0 <= self.depth <= 4, "model.mtp.depth", self.depth, "must be 0 to 4")


@dataclass(frozen=True)
class ModelConfig:
    """What is computed. The first `num_dense` layers have a dense SwiGLU, the rest a
    MoE.
    """

    vocab_size: int = 129_280
    dim: int = 7168
    num_layers: int = 61
    num_dense: int = 3
    dense_dim: int = 18_432
    norm_eps: float = 1e-6
    init_std: float = 0.006  # of every matrix; 0 = 1/sqrt(dim)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)

    def __post_init__(self) -> None:
        _positive(
            "model", self, "vocab_size", "dim", "num_layers", "dense_dim", "norm_eps"
        )
        _check(self.init_std >= 0, "model.init_std", self.init_std, "must be >= 0")
        _check(
            0 <= self.num_dense < self.num_layers,
            "model.num_dense",
            self.num_dense,
            f"must be 0 to {self.num_layers - 1}: at least one of the layers is a MoE",
        )

    @property
    def num_moe(self) -> int:
        """MoE layers of the main model."""
        return self.num_layers - self.num_dense

    @property
    def num_routers(self) -> int:
        """MoE layers of the main model and of the MTP modules, in that order."""
        return self.num_moe + self.mtp.depth


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens.

    `source` is "builtin" (built from installed packages), a corpus folder, or a path or
    glob of .txt, .jsonl, .jsonl.gz or .parquet files. `tokenizer` is "sentencepiece",
    "bpe", "bytes" or a tokenizer folder. `weights` mixes domains, as in
    "code=2,speech=1"; domains left out weigh 1, and "" mixes by size. `lanes` = 0 means
    one a row.
    """

    source: str = "builtin"
    tokenizer: str = "sentencepiece"
    batch: int = 16  # rows of the global batch
    length: int = 256  # L, predicted positions a row
    lanes: int = 0
    packing: str = "concat"
    segment_mask: bool = False  # the paper packs without one (section 4.1)
    weights: str = ""
    val_fraction: float = 0.01  # of each domain's bytes, from at least 12 texts

    def __post_init__(self) -> None:
        _positive("data", self, "batch", "length")
        _one_of("data.packing", self.packing, PACKINGS)
        lanes = self.lanes or self.batch
        _check(
            self.lanes >= 0 and self.batch % lanes == 0,
            "data.lanes",
            self.lanes,
            f"must divide data.batch = {self.batch} (0 = one lane a row)",
        )
        _check(
            0 < self.val_fraction < 1,
            "data.val_fraction",
            self.val_fraction,
            "must lie between 0 and 1",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate, and the weight of the MTP losses (section 4.2).

    `horizon` is the step at which the learning-rate schedule ends; 0 takes
    `train.steps` of the run's first start.
    """

    lr: float = 2.2e-4
    schedule: str = "wsd"
    warmup: int = 2000
    horizon: int = 0
    decay: float = 0.2  # wsd: the share of the horizon spent decaying
    final: float = 0.1  # learning rate at the horizon, as a share of lr
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    moments: str = "f32"  # what AdamW's are kept as; the paper's: bf16
    mtp_weight: float = 0.3  # lambda
    mtp_weight_changes: Changes = ()
    ema: float = 0.0  # decay of the parameters' mean, see train.average; 0 = none

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "clip")
        for name in ("b1", "b2", "ema"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"optim.{name}", value, "must lie in [0, 1)")
        for name in ("weight_decay", "mtp_weight"):
            value = getattr(self, name)
            _check(value >= 0, f"optim.{name}", value, "must be >= 0")
        _one_of("optim.schedule", self.schedule, LR_SCHEDULES)
        _one_of("optim.moments", self.moments, MOMENTS)
        _check(self.warmup >= 0, "optim.warmup", self.warmup, "must be >= 0")
        _check(self.horizon >= 0, "optim.horizon", self.horizon, "must be >= 0")
        _check(0 < self.decay <= 1, "optim.decay", self.decay, "must lie in (0, 1]")
        _check(0 <= self.final <= 1, "optim.final", self.final, "must lie in [0, 1]")
        _increasing("optim.mtp_weight_changes", self.mtp_weight_changes)


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing: a strategy of `ops.balancing` and its numbers.

    `speed` is u (gamma in the report) of the bias strategies, `alpha` the weight of the
    auxiliary loss, `z_weight` of the router z-loss. `biased_topk` counts the loss's f_i
    from s + b instead of the printed s (equation 18). `freeze_step` sets u to 0 from
    that step on for `loss_free_frozen`.
    """

    strategy: str = "v3"
    speed: float = 1e-3
    speed_changes: Changes = ()
    freeze_step: int = 0
    alpha: float = 1e-4
    biased_topk: bool = False
    z_weight: float = 1e-3

    def __post_init__(self) -> None:
        _one_of("balance.strategy", self.strategy, STRATEGIES)
        for name in ("speed", "alpha", "z_weight", "freeze_step"):
            value = getattr(self, name)
            _check(value >= 0, f"balance.{name}", value, "must be >= 0")
        _increasing("balance.speed_changes", self.speed_changes)
        _check(
            self.strategy != "loss_free_frozen" or self.freeze_step > 0,
            "balance.freeze_step",
            self.freeze_step,
            "must be positive for strategy 'loss_free_frozen'",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often: no mathematics, but that `aux_batch` sees micro-batches."""

    steps: int = 300
    accumulation: int = 1  # micro-batches a step
    log_every: int = 1
    routing_every: int = 10  # steps between records of loads and biases
    eval_every: int = 100
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_best: int = 1
    trackers: str = ""  # such as "wandb,mlflow"; see train.trackers

    def __post_init__(self) -> None:
        _positive("train", self, *(f.name for f in dataclasses.fields(self)[:-1]))


@dataclass(frozen=True)
class RuntimeConfig:
    """Which implementation computes each part; see `runtime.build`.

    `implementation` is that of attention, grouped and FP8 products: "auto" is the
    fastest that can, "mosaic_gpu" Pallas kernels for Hopper GPUs, "interpret" the same
    simulated, "xla" none. `strict`: where "auto" falls back is an error.
    """

    compute: str = "f32"  # see precision.policy
    fp8: policy.Pieces = field(default_factory=policy.Pieces)
    attention: str = "chunked"
    experts: str = "blocks"
    block: int = 128  # rows of an expert block
    # Kept for a block's backward pass: FP8 caches or products, all, products, nothing.
    remat: str = "policy"
    implementation: str = AUTO
    strict: bool = False

    def __post_init__(self) -> None:
        policy.pieces(self.compute, self.fp8)
        _one_of("runtime.attention", self.attention, ATTENTION_PATHS)
        _one_of("runtime.experts", self.experts, EXPERT_PATHS)
        _one_of("runtime.remat", self.remat, REMATS)
        _one_of("runtime.implementation", self.implementation, IMPLEMENTATIONS)
        _positive("runtime", self, "block")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, where arrays lie on them, how tokens reach experts.

    A batch's rows are split over all axes, so that each device has its own; but a
    pipeline's ranks share them. Experts are split over `node` x `expert`, where
    `expert` counts the devices of a node, and each share of them is copied over the
    other axes; the rules say where the rest lies.
    `own_rules` come before those of the preset: ("embed$", "-,fsdp") splits the second
    dimension of what is called embed over fsdp.
    """

    pipe: int = 1  # ranks of a pipeline; needs pipeline.schedule
    data: int = 1
    fsdp: int = 1
    node: int = 1
    expert: int = 1
    rules: str = "fsdp"  # see parallel.rules
    own_rules: Placements = ()
    transport: str = "all_to_all"  # see parallel.transport
    payload: str = "exact"  # what a token's copy is sent as
    capacity: float = 1.5  # room in a buffer, times what an even load needs

    def __post_init__(self) -> None:
        _positive("mesh", self, "pipe", "data", "fsdp", "node", "expert", "capacity")
        _one_of("mesh.rules", self.rules, RULES)
        _one_of("mesh.transport", self.transport, TRANSPORTS)
        _one_of("mesh.payload", self.payload, PAYLOADS)
        _check(
            self.transport != "ring" or self.payload == "exact",
            "mesh.payload",
            self.payload,
            "must be 'exact' with mesh.transport = 'ring', which sends what it has",
        )

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return self.pipe * self.data * self.fsdp * self.node * self.expert


@dataclass(frozen=True)
class PipelineConfig:
    """How micro-batches go through the ranks of `mesh.pipe`; see `parallel.pipeline`.

    What a stage keeps of a micro-batch until its backward pass is its input, and all
    else is computed again; or what `runtime.remat` keeps of each MoE block, as far as
    every stage has as many.
    """

    schedule: str = "none"
    microbatches: int = 1  # of a step, in place of train.accumulation
    chunks: int = 0  # stages of a rank, of the interleaved schedule; 0: 2
    keep: str = "inputs"

    def __post_init__(self) -> None:
        _one_of("pipeline.schedule", self.schedule, SCHEDULES)
        _one_of("pipeline.keep", self.keep, KEEPS)
        _positive("pipeline", self, "microbatches")
        _check(self.chunks >= 0, "pipeline.chunks", self.chunks, "must be >= 0")
        for name, plain in (("microbatches", 1), ("chunks", 0)):
            value = getattr(self, name)
            _check(
                self.schedule != "none" or value == plain,
                f"pipeline.{name}",
                value,
                "needs a pipeline.schedule",
            )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        mesh, schedule = self.mesh, self.pipeline.schedule
        piped = schedule != "none"
        _check(
            piped or mesh.pipe == 1,
            "mesh.pipe",
            mesh.pipe,
            f"needs a pipeline.schedule: {', '.join(SCHEDULES[1:])}",
        )
        _check(
            not piped or self.train.accumulation == 1,
            "train.accumulation",
            self.train.accumulation,
            "must be 1 in a pipeline, whose micro-batches are pipeline.microbatches",
        )
        _check(
            self.balance.strategy != "aux_global" or schedule in ("none", "gpipe"),
            "balance.strategy",
            self.balance.strategy,
            "counts the whole batch before any backward pass, which pipeline.schedule "
            f"= {schedule!r} does not wait for; take 'aux_seq' (per sequence), "
            "'aux_batch' (per micro-batch), or the schedule 'gpipe'",
        )
        rows, parts = self.data.batch, self.micro_batches * mesh.size // mesh.pipe
        name = "pipeline.microbatches" if piped else "train.accumulation"
        _check(
            rows % parts == 0,
            "data.batch",
            rows,
            f"must be a multiple of {name} x the mesh's devices / mesh.pipe = {parts}",
        )
        _check(
            rows % mesh.size == 0,
            "data.batch",
            rows,
            f"must be a multiple of the mesh's {mesh.size} devices",
        )
        shares = self.mesh.node * self.mesh.expert
        _check(
            self.model.moe.num_experts % shares == 0,
            "model.moe.num_experts",
            self.model.moe.num_experts,
            f"must be a multiple of mesh.node x mesh.expert = {shares}",
        )
        policy.check_alone(self.runtime.compute, self.runtime.fp8, mesh.size, schedule)

    @property
    def micro_batches(self) -> int:
        """Of an optimizer step, under a schedule or accumulated."""
        piped = self.pipeline.schedule != "none"
        return self.pipeline.microbatches if piped else self.train.accumulation


def signature(config: Config) -> dict[str, typing.Any]:
    """The fields that change the mathematics: they must match for a run to go on."""
    names = ("model", "data", "optim", "balance", "seed")
    fields = {name: to_dict(config)[name] for name in names}
    if config.balance.strategy == "aux_batch":  # micro-batches are part of its loss
        fields["train"] = {"accumulation": config.micro_batches}
    return fields
