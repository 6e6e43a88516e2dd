"""Every key of the config, with its default and a line of documentation; see `wamjax.config`."""

from __future__ import annotations

from typing import Any

from wamjax.models import keys as models
from wamjax.wam.cosmos_policy import keys as cosmos_policy
from wamjax.wam.fast_wam import keys as fast_wam
from wamjax.wam.video import keys as video

METHOD_KEYS = (
    ("objective.name", "fast_wam", "which method: a key of wam.METHODS, or MODULE:ATTRIBUTE"),
    # What several methods read.
    ("objective.video_shift", 5.0, "time shift of the noise level of video"),
    ("objective.weighting", "wan", "loss weight over noise levels: wan, uniform or min_snr"),
    ("objective.action_weight", 1.0, "of the action loss, or of the action's slot in the loss"),
    ("objective.infer_steps", 10, "solver steps when acting, and when sampling"),
    ("objective.solver", "euler", "a key of diffusion.solvers.SOLVERS, or ancestral"),
    *fast_wam.TABLE,
    *video.TABLE,
    *cosmos_policy.TABLE,
    *models.TABLE,
)

# (key, default, what it is).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("seed", 0, "seed of initialisation, noise and data order"),
    ("total_steps", 1000, "optimiser steps of the whole run"),
    ("log_every", 50, "steps between lines on the terminal and timing columns in metrics.jsonl"),
    ("mesh.data", -1, "devices along which the batch alone is split; -1 takes what is left"),
    ("mesh.fsdp", 1, "devices along which batch and parameters are split; -1 takes what is left"),
    ("mesh.tensor", 1, "devices along which heads and hidden units are split"),
    ("precision.params", "float32", "dtype of the master parameters and of the optimiser state"),
    ("precision.compute", "float32", "dtype parameters are cast to for the loss; or bfloat16"),
    ("optim.name", "adamw", "adamw, or muon for the matrices of the blocks (adamw for the rest)"),
    ("optim.learning_rate", 1e-4, "peak learning rate"),
    ("optim.b1", 0.9, "AdamW decay of the first moment"),
    ("optim.b2", 0.95, "AdamW decay of the second moment"),
    ("optim.weight_decay", 0.01, "AdamW weight decay, on all parameters, times the learning rate"),
    ("optim.warmup_fraction", 0.05, "share of total_steps in linear warm-up from peak / steps"),
    ("optim.final_fraction", 0.01, "the cosine ends at this share of the peak learning rate"),
    ("optim.anchor_steps", (), "steps between which the rate is linear instead; () = the cosine"),
    ("optim.anchor_factors", (), "factors of the peak rate at those steps; of two at one, a jump"),
    ("optim.clip_norm", 1.0, "global gradient norm is clipped to this; 0 = never"),
    ("optim.accumulate", 1, "microbatches that one batch is computed in; saves memory"),
    ("optim.ema_decay", 0.0, "decay of the exponential moving average of parameters; 0 = none"),
    (
        "optim.ema_warmup",
        True,
        "the decay starts low and grows to ema_decay; False = as published, see step.ema_weights",
    ),
    ("optim.freeze", (), "regexes of parameters' whole paths that are not trained; see partition"),
    ("lora.rank", 0, "rank of adapters beside the targets (see adapters); 0 = none"),
    ("lora.targets", (), "regexes of whole paths of the kernels that get an adapter"),
    ("init_from.path", "", "folder of wamjax.convert, or run, to start from; more as PREFIX=DIR"),
    ("init_from.missing", (), "regexes of parameters that it may lack; these start fresh"),
    ("init_from.unused", (), "regexes of parameters that it may have and the model has not"),
    ("init_from.fresh", (), "regexes of parameters that start fresh even if it has them"),
    ("guard.max_consecutive_skips", 10, "stop after this many non-finite steps in a row"),
    (
        "compile.cache",
        "",
        "folder of compiled programs; '' = JAX_COMPILATION_CACHE_DIR or the user's cache, or none",
    ),
    ("compile.flags", True, "compile with the flags of the chip, wamjax.training.compile.FLAGS"),
    ("checkpoint.every", 1000, "steps between checkpoints; one is saved at the end in any case"),
    ("checkpoint.keep", 2, "checkpoints kept"),
    ("profile.start", 0, "step at which a profiler trace starts"),
    ("profile.steps", 0, "steps traced, into media/profile; 0 = none"),
    ("log.tensorboard", False, "also write TensorBoard events (pip install 'wamjax[log]')"),
    ("log.wandb", "", "project to also log to at wandb (pip install 'wamjax[log]'); '' = none"),
    ("data.root", "", "folder that relative source paths start at; '' = the cache for tabletop"),
    ("data.kind", "episodes", "episodes (windows of data.sources), arrays or branches"),
    ("data.branches", "", "folder of wamjax.branches, below data.root; what a judge is trained on"),
    ("data.arrays", "", "NAME or NAME:option=value,...: arrays and how they are made, data.makers"),
    ("data.embeddings", "", "text-embedding cache, below data.root; read if text.kind is context"),
    ("data.batch_size", 32, "examples in a batch, over all devices and processes"),
    ("data.frames", 5, "raw video frames in a window (f)"),
    ("data.frame_stride", 4, "control steps between frames of a window"),
    ("data.chunk", 16, "action steps in a window (j)"),
    ("data.cameras", ("overhead", "gripper"), "cameras, side by side in this order"),
    ("data.image_size", (0, 0), "(height, width) of each camera for the model; (0, 0) = as stored"),
    ("data.resize", "pad", "pictures get that size by pad (whole, black around) or stretch"),
    ("data.normalization", "min_max", "min_max, mean_std or quantile, of actions and proprio"),
    ("data.padding", "hold:grip", "behind the end: hold:NAME,... of actions, others 0; normalized"),
    ("data.instruction_length", 12, "instruction tokens (n); shorter ones are padded"),
    ("data.vocabulary", "words", "words: those of the data have an id each; hash: may share one"),
    (
        "data.declared.camera_size",
        (0, 0),
        "(height, width) of each camera; (0, 0) = as in the data",
    ),
    ("data.declared.action_dim", 0, "action dimensions (a); 0 = as in the data"),
    ("data.declared.proprio_dim", 0, "state dimensions (p); 0 = as in the data"),
    ("data.declared.arrays", "", "KEY=SHAPE[:VALUES],... of an example; '' = as in the data"),
    ("data.declared.control_hz", 20.0, "control steps per second, where the sizes are declared"),
    ("data.prefetch", 2, "batches made ahead of their use"),
    ("data.skip_bad", 0, "bad episodes that are passed over, by each process; 0 = an error"),
    ("data.outcome", False, "batches also say what comes of a window: state, score, steps to go"),
    *METHOD_KEYS,
    ("eval.env", "tabletop", "world that the policy is rolled out in"),
    ("eval.tasks", (), "tasks; () = those of the training data"),
    ("eval.episodes", 0, "episodes after training; 0 = no evaluation"),
    ("eval.execute", 8, "actions executed of each planned chunk"),
    ("eval.join", "sync", "how chunks follow each other under a delay: one of envs.joins.WAYS"),
    ("eval.delay", 0, "control steps that go by between an observation and the plan made of it"),
    ("eval.max_steps", 40, "control steps after which an episode has failed"),
    ("eval.batch_size", 64, "episodes in one program"),
    ("eval.seed", 0, "seed of the episodes"),
    ("eval.blind", True, "also replay the actions in another scene of their task, unseen"),
    ("eval.untrained", False, "also roll out the policy as it was before training"),
)

SOURCE: tuple[tuple[str, Any, str], ...] = (
    (
        "path",
        "",
        "folder of the data set, below data.root, or FORMAT:PATH, or MODULE:ATTRIBUTE, which are "
        "read in place; '' = named by what is collected",
    ),
    ("weight", 1.0, "share of a batch, relative to the other sources; counts are exact"),
    ("action_free", False, "video only: the actions are treated as unknown"),
    ("episodes", 0, "use the first so many episodes; 0 = all"),
    ("rollout", False, "of a policy: teaches what comes of actions and is not to be imitated"),
    ("ended", "", "success or failure: only episodes that ended so; '' = all"),
    ("stand_in", 0, "random episodes to make if the folder does not exist: tries a config"),
    ("collect.env", "tabletop", "world whose expert is recorded"),
    ("collect.tasks", (), "tasks to collect if the folder does not exist; () = all"),
    ("collect.episodes", 0, "episodes to collect; 0 = the data set must exist"),
    ("collect.noise", 0.0, "standard deviation of the noise on the expert's actions"),
    ("collect.seed", 0, "seed of the collection"),
    (
        "collect.intended",
        False,
        "label steps with the expert's intention instead of the noisy action",
    ),
    ("collect.keep_failures", False, "keep episodes that fail, too"),
    ("collect.confusion", 0.0, "share of episodes whose expert takes things for their look-alikes"),
)

# Names of before, and what they are now.
RENAMED = {
    "objective.lambda_video": "objective.video_weight",
    "objective.lambda_action": "objective.action_weight",
    "model.lora_rank": "model.modulation_rank",
}

# What the code did before a key existed, where that is not the default of the key.
BEFORE = {"data.padding": "normalized", "data.vocabulary": "hash"}

# Keys that a checkpoint's meaning rests on: they refuse to change on resume.
FROZEN = (
    "seed",
    "model",
    "objective.name",
    "objective.variant",
    "objective.slots",
    "objective.visibility",
    "objective.process",
    # Sampling follows the noise of training.
    "objective.video_shift",
    "objective.action_shift",
    "objective.scheme",
    "objective.prefix_max",
    "precision.params",
    "optim.name",
    "optim.ema_decay",
    "optim.ema_warmup",
    "optim.freeze",
    "lora",
    "data.kind",
    "data.arrays",
    "data.normalization",
    "data.padding",
    "data.chunk",
    "data.frames",
    "data.frame_stride",
    "data.cameras",
    "data.image_size",
    "data.resize",
    "data.instruction_length",
    "data.vocabulary",
    "data.batch_size",
    "data.declared",
    "data.sources.*.weight",
    "data.sources.*.action_free",
    "data.sources.*.episodes",
    "data.sources.*.rollout",
    "data.sources.*.ended",
    "data.sources.*.collect",
)
