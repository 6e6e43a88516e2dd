"""Every key of the config, with its default and a line of documentation; see `wamjax.config`."""

from __future__ import annotations

from typing import Any

from wamjax.models import keys as models
from wamjax.wam.cosmos_policy import keys as cosmos_policy
from wamjax.wam.fast_wam import keys as fast_wam
from wamjax.wam.video import keys as video

METHOD_KEYS = (
    ("objective.name", "fast_wam", "method: a key of wam.METHODS, or MODULE:ATTRIBUTE"),
    # What several methods read.
    ("objective.video_shift", 5.0, "time shift of the video noise level"),
    ("objective.weighting", "wan", "loss weighting over noise levels: wan, uniform or min_snr"),
    (
        "objective.action_weight",
        1.0,
        "weight of the action loss; Cosmos Policy: of the action slot",
    ),
    ("objective.infer_steps", 10, "solver steps for acting and sampling"),
    ("objective.solver", "euler", "a key of diffusion.solvers.SOLVERS, or ancestral"),
    *fast_wam.TABLE,
    *video.TABLE,
    *cosmos_policy.TABLE,
    *models.TABLE,
)

# (key, default, what it is).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("seed", 0, "seed of initialization, noise and data order"),
    ("total_steps", 1000, "optimizer steps of the whole run"),
    ("log_every", 50, "steps between terminal lines and timing columns in metrics.jsonl"),
    ("mesh.data", -1, "devices that split the batch only; -1 takes the remaining devices"),
    ("mesh.fsdp", 1, "devices that split batch and parameters; -1 takes the remaining devices"),
    ("mesh.tensor", 1, "devices that split heads and hidden units"),
    ("precision.params", "float32", "dtype of the master parameters and the optimizer state"),
    (
        "precision.compute",
        "float32",
        "dtype that parameters are cast to for the loss: float32 or bfloat16",
    ),
    ("optim.name", "adamw", "adamw, or muon for the matrices of the blocks (adamw for the rest)"),
    ("optim.learning_rate", 1e-4, "peak learning rate"),
    ("optim.b1", 0.9, "AdamW decay of the first moment"),
    ("optim.b2", 0.95, "AdamW decay of the second moment"),
    ("optim.weight_decay", 0.01, "AdamW weight decay on all parameters, times the learning rate"),
    (
        "optim.warmup_fraction",
        0.05,
        "share of total_steps for linear warm-up, which starts at peak / steps",
    ),
    (
        "optim.final_fraction",
        0.01,
        "share of the peak learning rate at which the cosine schedule ends",
    ),
    ("optim.anchor_steps", (), "steps of a piecewise-linear schedule; () = the cosine schedule"),
    (
        "optim.anchor_factors",
        (),
        "share of the peak rate at each of these steps; two at one step: a jump",
    ),
    ("optim.clip_norm", 1.0, "maximum global gradient norm; 0 = no clipping"),
    ("optim.accumulate", 1, "microbatches per batch; saves memory"),
    ("optim.ema_decay", 0.0, "decay of the exponential moving average of parameters; 0 = none"),
    (
        "optim.ema_warmup",
        True,
        "start with a low decay that grows to ema_decay; False = as published, see "
        "step.ema_weights",
    ),
    (
        "optim.freeze",
        (),
        "regexes for the full paths of parameters that are not trained; see partition",
    ),
    ("lora.rank", 0, "rank of the adapters of lora.targets (see adapters); 0 = none"),
    ("lora.targets", (), "regexes for the full paths of kernels that get an adapter"),
    (
        "init_from.path",
        "",
        "output folder of wamjax.convert, or a run, to start from; more as PREFIX=DIR",
    ),
    ("init_from.missing", (), "regexes of parameters that the source may lack; they start fresh"),
    ("init_from.unused", (), "regexes of parameters in the source that the model may not have"),
    ("init_from.fresh", (), "regexes of parameters that start fresh even if the source has them"),
    (
        "prepare.denoiser",
        "",
        "weight family of init_from.path; '' = the run prepares nothing itself",
    ),
    ("prepare.codec", "", "weight family of the codec that encodes pictures into latents"),
    ("prepare.text", "", "weight family of the text encoder that fills data.embeddings"),
    ("prepare.template", "{instruction}", "prompt template for the text encoder"),
    ("prepare.checkpoint", "", "folder of published files; '' = already converted"),
    ("prepare.weights", "weights", "folder, below data.root, for converted weights, by family"),
    ("prepare.stand_in", False, "use small random weights instead of published ones"),
    ("guard.max_consecutive_skips", 10, "stop after this many non-finite steps in a row"),
    (
        "compile.cache",
        "",
        "folder for compiled programs; '' = JAX_COMPILATION_CACHE_DIR or the user's cache, or none",
    ),
    ("compile.flags", True, "use the compiler flags of the chip, wamjax.training.compile.FLAGS"),
    ("checkpoint.every", 1000, "steps between checkpoints; one is always saved at the end"),
    ("checkpoint.keep", 2, "number of checkpoints to keep"),
    ("profile.start", 0, "step at which a profiler trace starts"),
    ("profile.steps", 0, "steps to trace into media/profile; 0 = none"),
    ("log.tensorboard", False, "also write TensorBoard events (pip install 'wamjax[log]')"),
    ("log.wandb", "", "wandb project to log to as well (pip install 'wamjax[log]'); '' = none"),
    ("data.root", "", "folder for relative source paths; '' = the user's cache, for the tabletop"),
    ("data.kind", "episodes", "episodes (windows of data.sources), arrays or branches"),
    ("data.branches", "", "output folder of wamjax.branches, below data.root; trains a judge"),
    (
        "data.arrays",
        "",
        "NAME or NAME:option=value,...: arrays to generate or load, see data.makers",
    ),
    ("data.embeddings", "", "text-embedding cache, below data.root; read if text.kind is context"),
    ("data.batch_size", 32, "examples per batch, over all devices and processes"),
    ("data.frames", 5, "raw video frames per window (f)"),
    ("data.frame_stride", 4, "control steps between the frames of a window"),
    ("data.chunk", 16, "action steps per window (j)"),
    ("data.cameras", ("overhead", "gripper"), "cameras, side by side in this order"),
    (
        "data.layout",
        "",
        "arrangement of data.cameras in the picture: NAME:HEIGHTxWIDTH, + beside, / below; '' = "
        "one row",
    ),
    ("data.image_size", (0, 0), "(height, width) of each camera for the model; (0, 0) = as stored"),
    (
        "data.resize",
        "pad",
        "how pictures reach that size: pad (keep all, black borders) or stretch",
    ),
    ("data.normalization", "min_max", "of actions and proprio: min_max, mean_std or quantile"),
    (
        "data.padding",
        "hold:grip",
        "actions after the end: hold:NAME,... hold, the others are 0; or normalized",
    ),
    ("data.instruction_length", 12, "instruction tokens (n); shorter instructions are padded"),
    ("data.vocabulary", "words", "words: one id per word in the data; hash: words may share an id"),
    (
        "data.declared.camera_size",
        (0, 0),
        "(height, width) of each camera; (0, 0) = read from the data",
    ),
    ("data.declared.action_dim", 0, "action dimensions (a); 0 = read from the data"),
    ("data.declared.proprio_dim", 0, "state dimensions (p); 0 = read from the data"),
    ("data.declared.arrays", "", "KEY=SHAPE[:VALUES],... of an example; '' = read from the data"),
    ("data.declared.control_hz", 20.0, "control steps per second, if the sizes are declared"),
    ("data.prefetch", 2, "batches prepared ahead"),
    ("data.skip_bad", 0, "bad episodes that each process may skip; 0 = a bad episode is an error"),
    ("data.outcome", False, "add the outcome of a window to batches: state, score, steps to go"),
    *METHOD_KEYS,
    ("eval.env", "tabletop", "world in which the policy is evaluated"),
    ("eval.tasks", (), "tasks; () = those of the training data"),
    ("eval.episodes", 0, "evaluation episodes after training; 0 = no evaluation"),
    ("eval.execute", 8, "actions executed of each action chunk"),
    ("eval.join", "sync", "how one chunk follows another under a delay: one of envs.joins.WAYS"),
    ("eval.delay", 0, "control steps between an observation and the plan made from it"),
    ("eval.max_steps", 40, "control steps after which an episode counts as failed"),
    ("eval.batch_size", 64, "episodes in one program"),
    ("eval.seed", 0, "seed of the episodes"),
    ("eval.blind", True, "also replay the actions blind, in another scene of the same task"),
    ("eval.untrained", False, "also evaluate the policy as it was before training"),
)

SOURCE: tuple[tuple[str, Any, str], ...] = (
    (
        "path",
        "",
        "folder of the data set, below data.root; or FORMAT:PATH or MODULE:ATTRIBUTE, which are "
        "read in place; '' = named after what is collected",
    ),
    ("pictures", "", "data set, below data.root, to encode if the latents in path do not exist"),
    ("successes", False, "count its episodes as successes if nothing records how they ended"),
    ("weight", 1.0, "share of a batch, relative to the other sources; counts are exact"),
    ("action_free", False, "video only: treat the actions as unknown"),
    ("episodes", 0, "use only the first N episodes; 0 = all"),
    ("rollout", False, "episodes of a policy: they train world model and value, not imitation"),
    ("ended", "", "success or failure: use only episodes that ended this way; '' = all"),
    ("stand_in", 0, "random episodes to generate if the folder does not exist, to try a config"),
    ("collect.env", "tabletop", "world whose expert is recorded"),
    ("collect.tasks", (), "tasks to collect if the folder does not exist; () = all"),
    ("collect.episodes", 0, "episodes to collect; 0 = the data set must exist"),
    ("collect.noise", 0.0, "standard deviation of the noise on the expert's actions"),
    ("collect.seed", 0, "seed of the collection"),
    (
        "collect.intended",
        False,
        "label steps with the expert's intended action instead of the noisy one",
    ),
    ("collect.keep_failures", False, "also keep failed episodes"),
    ("collect.confusion", 0.0, "share of episodes in which the expert confuses look-alike targets"),
)

# Old names of keys, and the new ones.
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
    "data.layout",
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
    "data.sources.*.successes",
    "data.sources.*.collect",
)
