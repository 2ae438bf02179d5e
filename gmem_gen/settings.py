"""What can be set: one frozen dataclass a section. Every field says what it means, and refuses what makes no sense.

Sampling has a file of its own (sample_settings).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gmem_gen.choices import choose_all, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are learned, and as what."""

    image_size: int = 0
    """Side in pixels; 0: 64 (256 with an autoencoder), or the short side of the smallest image where that is smaller."""
    channels: int = 3
    """3: RGB; 1: grey, for pixels only."""
    allow_missing: bool = False
    """Train without the rows whose image or latent is gone, instead of stopping."""
    tokenizer: str = ""
    """pixels, sd-vae, taesd, dc-ae, taef2 or va-vae; "": what `latents` were made with, else pixels."""
    tokenizer_weights: str = ""
    """Folder or file with the tokenizer's weights, or OWNER/NAME on the hub; "": the tokenizer's own repository there."""
    tokenizer_revision: str = ""
    """Branch, tag or commit on the hub; "": its main branch. Checkpoints record the commit."""
    posterior: Literal["mean", "sample"] = "mean"
    """Of a variational autoencoder: the mean of each latent's distribution, or a sample that the image decides."""
    latents: str = ""
    """Folder that 'gmem-gen encode' wrote; "": the images are encoded into the run's cache before training starts."""
    encode_on_the_fly: bool = False
    """Encode the images of every batch as it is read, and keep no latents."""
    statistics_images: int = 4096
    """Of encoding on the fly: images whose latents decide mean and standard deviation of each channel, spread evenly over all."""
    flip: Literal["rows", "random", "none"] = "rows"
    """Mirrored twins of a bank ("#flip" rows). rows: each is a sample of its own; random: a picture and its twin are one
    sample, and a coin decides at every step for latent, snippet and patch tokens together; none: twins are left out."""
    validation_fraction: float = 0.0
    """Share of the pictures held out: never trained on, chosen by a hash of key and train.seed, a picture's twin with it."""
    validation_keys: str = ""
    """File with keys to hold out, one a line."""
    validation_concept: str = ""
    """Concept whose rows are held out."""
    tokens: str = ""
    """Folder that 'gmem-bank tokens' wrote: the encoder's patch tokens, which a projection head learns to predict (REPA)."""
    token_resampling: Literal["bilinear", "bicubic", "none"] = "bilinear"  # noqa: S105 - no password
    """How patch tokens come to the model's grid where it is another (with antialias where it is smaller); none: refused."""

    def __post_init__(self) -> None:
        choose_all(self, "data")
        require(0 <= self.validation_fraction < 1, "data", "validation_fraction", self.validation_fraction, "in [0, 1)")
        require(
            0 <= self.image_size <= 4096, "data", "image_size", self.image_size, "0 or a number of pixels up to 4096"
        )
        require(self.channels in (1, 3), "data", "channels", self.channels, "1 or 3")
        require(self.statistics_images >= 1, "data", "statistics_images", self.statistics_images, "at least 1")
        require(not (self.latents and self.encode_on_the_fly), "data", "encode_on_the_fly", self.encode_on_the_fly,
                 "false with data.latents, which are encoded already")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer: LightningDiT (RMSNorm, SwiGLU, rotary positions, adaLN) or, by its switches, SiT and what lies between."""

    width: int = 128
    """Width of a token."""
    depth: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads; width / num_heads must be a multiple of 4."""
    patch_size: int = 0
    """Side of a patch in pixels; 0: an eighth of the image (64 tokens), at least 1."""
    snippet_scale: float = 0.0
    """Factor on a snippet before its linear map; 0: √D in unit space, so that its elements have a mean square of 1, and 1
    in raw space. 1 is the published value; the condition is then learned much later (docs/EXPERIMENTS.md)."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width (times 2/3 with SwiGLU)."""
    use_rope: bool = True
    """Rotary position embedding in attention (Su et al. 2021)."""
    use_swiglu: bool = True
    """SwiGLU MLP (Shazeer 2020); False: GELU."""
    use_rmsnorm: bool = True
    """RMSNorm; False: LayerNorm without parameters."""
    use_qk_norm: bool = False
    """Normalise queries and keys."""
    use_shift: bool = True
    """adaLN with shift; False: scale and gate only."""
    condition: Literal["memory", "class", "none"] = "memory"
    """memory: a snippet of the bank; class: a label embedding with a null class, the baseline without memory; none:
    unconditional."""
    num_classes: int = 0
    """Classes of a class-conditional model, the null class not counted; 0: the concepts of the bank."""
    projection_dim: int = 0
    """Dimension of the encoder's patch tokens, which a projection head learns to predict (REPA, arXiv 2410.06940); 0: no
    head. Training only."""
    encoder_depth: int = 4
    """The projection head reads the tokens after this many blocks."""

    def __post_init__(self) -> None:
        choose_all(self, "model")
        for name in ("width", "depth", "num_heads"):
            value = getattr(self, name)
            require(1 <= value <= 65_536, "model", name, value, "1 to 65536")
        head = self.width / self.num_heads
        require(head == int(head) and int(head) % 4 == 0, "model", "num_heads", self.num_heads,
                 f"such that width {self.width} / num_heads is a multiple of 4")  # fmt: skip
        require(self.patch_size >= 0, "model", "patch_size", self.patch_size, "0 or a number of pixels")
        require(self.snippet_scale >= 0, "model", "snippet_scale", self.snippet_scale, "0 or positive")
        require(self.mlp_ratio > 0, "model", "mlp_ratio", self.mlp_ratio, "positive")
        require(0 <= self.num_classes <= 10**7, "model", "num_classes", self.num_classes, "0 to 10000000")
        require(0 <= self.projection_dim <= 65_536, "model", "projection_dim", self.projection_dim, "0 to 65536")
        require(self.encoder_depth >= 1, "model", "encoder_depth", self.encoder_depth, "at least 1")
        require(not self.projection_dim or self.encoder_depth <= self.depth, "model", "encoder_depth",
                 self.encoder_depth, f"at most model.depth, which is {self.depth}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The path from noise to data, what the network predicts on it, and the loss (arXiv 2303.08797, 2401.08740)."""

    path: Literal["linear", "gvp", "vp"] = "linear"
    """x_t = α x_1 + σ x_0. linear: α = t, σ = 1 − t; gvp: α = sin(πt/2), σ = cos(πt/2); vp: variance preserving, as in
    score-based models."""
    prediction: Literal["auto", "velocity", "noise", "score", "data"] = "auto"
    """What the network gives. auto: data where a patch has more values than half the model's width, since the noise of such
    a patch does not fit through the model (arXiv 2511.13720); else velocity."""
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    """Weight of the loss over t, for predictions of noise or score: none, as if the velocity were learned, or maximum
    likelihood (arXiv 2101.09258)."""
    cosine_weight: float = 0.0
    """Weight of 1 − cosine over the channels of the velocity, added to its squared error; published: 1."""
    projection_weight: float = 0.5
    """Weight of the projection head's loss, where model.projection_dim is set."""
    time_sampling: Literal["uniform", "logit-normal"] = "logit-normal"
    """How t is drawn in training."""
    time_mean: float = 0.0
    """Mean of logit(t), for logit-normal."""
    time_std: float = 1.0
    """Standard deviation of logit(t), for logit-normal."""

    def __post_init__(self) -> None:
        choose_all(self, "flow")
        require(self.time_std > 0, "flow", "time_std", self.time_std, "positive")
        for name in ("cosine_weight", "projection_weight"):
            value = getattr(self, name)
            require(value >= 0, "flow", name, value, "0 or more")
        require(self.weighting == "none" or self.prediction in ("noise", "score"), "flow", "weighting", self.weighting,
                 "'none' unless flow.prediction is 'noise' or 'score'")  # fmt: skip
        require(not self.cosine_weight or self.prediction in ("auto", "velocity", "data"), "flow", "cosine_weight",
                 self.cosine_weight, "0 for flow.prediction 'noise' and 'score', which have no velocity loss")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = 400
    """Passes over the images; the budget unless max_steps is given."""
    max_steps: int = 0
    """Optimizer steps; 0: as many as `epochs` takes."""
    max_minutes: float = -1.0
    """Stop after this much training time, earlier runs of the same training included; 0: no limit; -1: 10 on a CPU, none
    on a GPU."""
    batch_size: int = 64
    """Images a step, over all processes and parts; where there are fewer images, all of them."""
    accumulation: int = 1
    """Parts that each process computes its share of a step in, one after the other: the same step in less memory."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.95
    """AdamW."""
    weight_decay: float = 0.0
    """AdamW."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or cosine to 0 at the last step of the budget."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    ema_decay: tuple[float, ...] = (0.9999,)
    """Decay of the averaged weights that sampling uses; several are averaged side by side, and sampling chooses
    ('--weights ema' is the first, '--weights ema-0.999' another)."""
    ema_warmup: bool = True
    """Approach ema_decay as (1 + step) / (10 + step); False: from the first step, from the initial weights, as published."""
    null_probability: float = 0.1
    """Share of samples trained with the null snippet (zeros), which guidance needs."""
    snippet_dropout: float = 0.4
    """Share of a snippet's elements set to zero in training, the rest rescaled (the paper's random masking)."""
    snippet_noise: float = 0.0
    """Standard deviation of Gaussian noise added to a snippet in training, relative to its root mean square."""
    seed: int = 0
    """Decides initial weights, order, noise, times, dropout."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0: all."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this are kept for good; 0: none."""
    keep_best: bool = True
    """With validation: save at every best validation loss of the averaged weights, and keep the best."""
    log_every: int = 20
    """Steps between lines of log.jsonl."""
    validate_every: int = 500
    """Steps between validation losses, where something is held out."""
    sample_every: int = 0
    """Steps between grids of samples in RUN/samples, of the same rows from the same noise; 0: none."""
    sample_images: int = 16
    """Images of such a grid."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast, fp16 with scaled gradients; bf16 pays from a width of about 384 on a CPU with AMX, and on a GPU."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the beginning, faster steps; rounding differs."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what is in it: less memory, a third more work."""
    adamw: Literal["fused", "foreach", "loop"] = "fused"
    """How AdamW walks over the weights; fused is fastest on a CPU and on a GPU."""
    num_workers: int = 1
    """Threads that read the next batches while a step is computed; 0: none."""
    device: str = "auto"
    """auto, cpu, cuda, …; auto takes a GPU where there is one."""
    num_threads: int = 0
    """CPU threads; 0: as many as PyTorch takes, which is one a core. 1 is safer beside other busy programs."""

    def __post_init__(self) -> None:
        choose_all(self, "train")
        for name, least in (("batch_size", 1), ("checkpoint_every", 1), ("log_every", 1), ("epochs", 1), ("max_steps", 0),
                            ("warmup_steps", 0), ("keep_checkpoints", 0), ("keep_every", 0), ("num_threads", 0),
                            ("accumulation", 1), ("validate_every", 1), ("sample_every", 0), ("sample_images", 1),
                            ("num_workers", 0)):  # fmt: skip
            value = getattr(self, name)
            require(value >= least, "train", name, value, f"at least {least}")
        several: Any = self.ema_decay  # one number is one decay
        object.__setattr__(
            self, "ema_decay", tuple(several) if isinstance(several, (tuple, list)) else (float(several),)
        )
        require(len(set(self.ema_decay)) == len(self.ema_decay) > 0 and all(0 <= decay < 1 for decay in self.ema_decay),
                 "train", "ema_decay", self.ema_decay, "one or several different numbers in [0, 1)")  # fmt: skip
        for name in ("null_probability", "snippet_dropout", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, "train", name, value, "in [0, 1)")
        for name in ("weight_decay", "clip_norm", "snippet_noise"):
            value = getattr(self, name)
            require(value >= 0, "train", name, value, "0 or more")
        require(0 <= self.seed < 2**32, "train", "seed", self.seed, "0 to 4294967295")
        require(self.num_workers <= 64, "train", "num_workers", self.num_workers, "at most 64")
        require(self.sample_images <= 1024, "train", "sample_images", self.sample_images, "at most 1024")
        require(self.accumulation <= self.batch_size, "train", "accumulation", self.accumulation,
                 f"at most train.batch_size, which is {self.batch_size}")  # fmt: skip
        require(self.num_threads <= 1024, "train", "num_threads", self.num_threads, "at most 1024")
        require(self.learning_rate > 0, "train", "learning_rate", self.learning_rate, "positive")
