"""Schema of all settings: type, range, meaning and complaint of each key, in one place.

A key is one line with its type and one with its meaning. The type carries the end of the sentence "must be …"; the
meaning is what ``--help`` shows. Sections that accept further keys are open: options of a decoder, a transform or
Lightning's Trainer are checked where they are used.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ema_seg.runtime.errors import ConfigError, did_you_mean

__all__ = [
    "LONGEST_TIMEOUT",
    "Data",
    "DataArguments",
    "Demonstrating",
    "Evaluating",
    "Evaluation",
    "Predicting",
    "Pushing",
    "Rebuilding",
    "Section",
    "Sweep",
    "Training",
    "check_settings",
    "describe_settings",
    "require_plain",
    "suggest_own",
]

# Limits of a saved configuration, which has about a hundred values.
_MOST_VALUES, _DEEPEST = 20_000, 100

# Names of these settings in other training programs; by spelling alone, the hint could name a wrong setting.
_OTHER_NAMES = {
    "epochs": "max_epochs num_epochs n_epochs epoch trainer.epochs training.epochs",
    "optimizer.lr": "lr learning_rate base_lr optim.lr optimizer.learning_rate model.lr model.learning_rate",
    "optimizer.weight_decay": "weight_decay wd optim.weight_decay",
    "data.batch_size": "batch_size bs train_batch_size data.train_batch_size data.bs datamodule.batch_size",
    "data.workers": "num_workers workers data.num_workers datamodule.num_workers",
    "data.root": "root data_dir data_root dataset_root data.dir data.path data.data_dir data.data_root paths.data_dir",
    "data": "dataset datamodule",
    "data.augmentation.crop.height": "image_size img_size crop_size data.image_size data.img_size data.crop_size",
    "model": "arch architecture decoder model.arch model.architecture model.name",
    "model.encoder": "encoder backbone encoder_name model.encoder_name model.backbone",
    "model.encoder_weights": "pretrained weights encoder_weights model.pretrained model.weights",
    "optimizer": "optim",
    "schedule": "scheduler lr_scheduler",
    "trainer.devices": "gpus num_gpus n_gpus devices trainer.gpus trainer.num_gpus",
    "evaluation.batch_size": "batch_size",
    "evaluation.device": "device",
    "trainer.accelerator": "accelerator device trainer.gpu trainer.device",
    "trainer.precision": "precision amp fp16 bf16 trainer.amp",
    "training.compile": "compile torch_compile",
    "training.early_stopping": "early_stopping patience callbacks.early_stopping.patience",
    "training.progress_bar": "progress_bar trainer.enable_progress_bar",
    "logger": "trainer.logger loggers",
    "init_from": "finetune fine_tune finetune_from load_from init_weights initial_checkpoint train.init_from",
    "freeze.parts": "freeze_encoder freeze_backbone frozen_stages freeze_layers model.freeze trainer.freeze",
    "optimizer.layer_decay": "layer_decay layer_decay_rate llrd",
    "hydra.run.dir": "output_dir out_dir save_dir log_dir work_dir trainer.default_root_dir",
    "resume": "ckpt_path ckpt checkpoint checkpoint_path resume_from resume_from_checkpoint trainer.ckpt_path run",
    "ckpt": "ckpt_path checkpoint checkpoint_path model_path model",
    "run": "resume run_dir",
}


class Must(NamedTuple):
    """The complaint about a value of another type or out of range: "must be <text>, got <value>; <advice>"."""

    text: str
    advice: str = ""


Count = Annotated[int, Field(ge=0), Must("a whole number of at least 0")]
OptionalCount = Annotated[int | None, Field(ge=0), Must("a whole number of at least 0, or null")]
Positive = Annotated[int, Field(ge=1), Must("a whole number of at least 1")]
OptionalPositive = Annotated[int | None, Field(ge=1), Must("a whole number of at least 1, or null")]
# System calls overflow on longer timeouts.
LONGEST_TIMEOUT = 1_000_000
Timeout = Annotated[
    float,
    Field(gt=0, le=LONGEST_TIMEOUT),
    Must(f"a number of seconds above 0 and at most {LONGEST_TIMEOUT}"),
]
Flag = Annotated[bool, Must("true or false")]
Name = Annotated[str, Field(min_length=1), Must("a name")]
OptionalName = Annotated[str | None, Field(min_length=1), Must("a name or null")]
OptionalPath = Annotated[
    str | None, Field(min_length=1), Must("a path", "quote a path of digits twice, as in \"'2024'\"")
]
Number = Annotated[float, Field(allow_inf_nan=False), Must("a number")]
Colour = Annotated[
    Annotated[list[Number], Field(min_length=3, max_length=3)] | tuple[Number, Number, Number],
    Must("three numbers, one for each of red, green and blue"),
]
OptionalColour = Annotated[Colour | None, Must("three numbers, one for each of red, green and blue")]
OptionalSize = Annotated[
    Annotated[list[Positive], Field(min_length=2, max_length=2)] | None,
    Must("[height,width] in pixels, such as [512,1024]"),
]
Options = dict[str, Any]
_Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "16", "bf16", "32", "64"]
_PRECISIONS = get_args(_Precision)


class Section(BaseModel):
    """Settings by name; unknown names are errors."""

    # Lightning has an option that begins with "model_", which pydantic would keep for itself.
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())


class OpenSection(Section):
    """Settings by name; further names are checked elsewhere."""

    model_config = ConfigDict(extra="allow")


class _Loading(OpenSection):
    name: Name
    """data set"""
    root: OptionalPath
    """its folder or archive"""
    evaluation_batch_size: Positive
    """images in an evaluation batch of one process"""
    workers: Annotated[int, Field(ge=0, le=1024), Must("a whole number from 0 to 1024 (each worker is a process)")]
    """processes that load data"""
    augmentation: Annotated[Options, Must("steps by name")]
    """steps of the training's augmentation"""
    evaluation_split: Name
    """split of the final test"""
    timeout: Timeout = 300.0
    """seconds to wait for a disk that does not respond"""
    max_skipped: Count = 0
    """unreadable samples that may be skipped"""
    cache: OptionalPath = None
    """folder for decoded images, which all processes and runs share; null: decode the files each time"""


class Data(_Loading):
    """Section ``data``."""

    batch_size: Annotated[Literal["auto"] | Positive, Must("a whole number of at least 1, or auto")]
    """crops in a training batch of all processes together; auto: the most that fit on a GPU"""
    mean: OptionalColour
    """mean of each RGB channel, for images in [0, 1]; null: the encoder's"""
    std: OptionalColour
    """standard deviation of each RGB channel; null: the encoder's"""


class DataArguments(_Loading):
    """Arguments of the data module: the section ``data``, completed."""

    batch_size: Positive
    mean: Colour
    std: Colour


class Model(OpenSection):
    """Section ``model``."""

    decoder: Name
    """decoder of segmentation-models-pytorch, or linear"""
    encoder: Name
    """encoder of smp, or tu-<name> of timm"""
    encoder_weights: OptionalPath
    """packaged, imagenet, a file, or null"""
    auxiliary: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False), Must("a number above 0, such as 0.4, or null")
    ] = None
    """weight of the loss of an auxiliary head on the encoder, which only the training has; null: no such head"""


class Attention(OpenSection):
    """Section ``attention``."""

    name: Name
    """attention block"""


class Placement(Section):
    """Section ``placement``."""

    encoder: Flag
    """a block after encoder stages"""
    encoder_stages: Annotated[list[Count] | None, Must("a list of the encoder's stages, such as [1,2]")]
    """which of them; null: all"""
    decoder: Flag
    """a block after each decoder block"""
    head: Flag
    """a block before the segmentation head"""


class Optimizer(OpenSection):
    """Section ``optimizer``."""

    name: Name
    """optimiser of timm"""
    lr: Number
    """highest learning rate"""
    encoder_lr_factor: Number
    """factor of the encoder's learning rate"""
    weight_decay: Number
    """weight decay"""
    layer_decay: Annotated[float | None, Field(gt=0, le=1), Must("a number above 0 and at most 1, or null")] = None
    """factor of the learning rate for each stage of the encoder, from the decoder on; null: none"""


class Schedule(OpenSection):
    """Section ``schedule``."""

    name: Name
    """learning-rate schedule of timm"""


class Trainer(OpenSection):
    """Section ``trainer``: options of Lightning's Trainer."""

    precision: Annotated[_Precision | Literal[16, 32, 64] | None, Must(f"one of {', '.join(_PRECISIONS)}")] = None
    """precision of the training"""
    accumulate_grad_batches: Positive = 1
    """batches in an optimiser step"""
    check_val_every_n_epoch: OptionalPositive = 1
    """epochs between validations"""
    num_sanity_val_steps: Annotated[int | None, Field(ge=-1), Must("a whole number of at least -1, or null")] = None
    """validation batches before the training"""
    log_every_n_steps: OptionalCount = None
    """steps between values of a logger"""
    min_epochs: OptionalCount = None
    """epochs before early stopping"""
    max_steps: Annotated[int, Field(ge=-1), Must("a whole number of at least -1")] = -1
    """optimiser steps after which the training ends; -1: no limit"""
    min_steps: OptionalCount = None
    """optimiser steps before early stopping"""
    max_time: Annotated[str | Options | None, Must("a time of the form days:hours:minutes:seconds")] = None
    """time after which the training ends"""
    gradient_clip_val: Annotated[Number | None, Must("a number or null")] = None
    """norm or value to clip gradients at"""
    gradient_clip_algorithm: Annotated[str | None, Field(min_length=1), Must("norm or value")] = None
    """norm or value"""
    fast_dev_run: Annotated[bool | Count, Must("a number of batches")] = False
    """not supported: writes no checkpoint"""
    benchmark: Annotated[bool | None, Must("true or false")] = None
    """cuDNN's choice of kernels by measurement"""
    model_registry: OptionalName = None
    """Lightning's model registry"""
    profiler: OptionalName = None
    """Lightning's profiler"""
    sync_batchnorm: Flag = False
    """batch norm over all processes"""
    deterministic: Annotated[bool | Literal["warn"] | None, Must("true, false or warn")] = None
    """deterministic algorithms alone; follows reproducible"""


class Evaluation(Section):
    """Section ``evaluation``, which ``train.py`` and ``eval.py`` share."""

    device: Annotated[str, Field(min_length=1), Must("a device, such as auto, cpu or cuda:1")]
    """device of the final test"""
    precision: Annotated[
        Literal["32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16", 16, 32],
        Must("32-true, bf16-mixed or 16-mixed"),
    ]
    """its precision"""
    channels_last: Flag
    """channels-last memory format"""
    compile: Flag
    """torch.compile"""
    batch_size: Positive
    """larger batch size of the cost measurement"""
    size: OptionalSize
    """[height, width] of the cost measurement; null: those of the split's first image"""
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False), Must("a positive number of seconds")]
    """seconds for the cost measurement"""
    window: OptionalSize = None
    """[height, width] of sliding windows, whose logits are averaged; null: whole images"""
    window_stride: OptionalSize = None
    """their stride in rows and columns; null: two thirds of their size"""
    scales: Annotated[
        Annotated[list[Annotated[float, Field(gt=0, le=16)]], Field(min_length=1)] | None,
        Must("a list of factors above 0 and at most 16, such as [0.75,1,1.25], or null"),
    ] = None
    """factors of the images' size over which probabilities are averaged; null: [1]"""
    flip: Flag = False
    """average over the mirrored image, too"""
    boundary: Flag = False
    """also score the boundaries of classes: boundary IoU, and mIoU by the distance to a boundary"""
    calibration: Flag = False
    """also score the probabilities: expected calibration error, negative log-likelihood, Brier score"""
    corruptions: Annotated[Literal["standard"] | None, Must("standard or null")] = None
    """also score corrupted images: 12 kinds of noise, blur, weather and digital loss at five severities"""
    submission: OptionalPath = None
    """eval.py alone: new folder for the masks in the form that the benchmark's server reads (Cityscapes, ADE20K)"""


class Steps(Section):
    """Section ``training``."""

    channels_last: Flag
    """channels-last memory format"""
    compile: Flag
    """torch.compile"""
    tf32: Annotated[bool | None, Must("true, false or null")] = None
    """TF32 for float32 on GPUs: true in convolutions and matrix products, false in neither; null: in convolutions"""
    weight_averaging: Annotated[
        Literal[False, 0] | Annotated[float, Field(ge=0, lt=1)] | None, Must("a decay between 0 and 1, such as 0.999")
    ]
    """decay of the moving average of the weights; null: no average"""
    early_stopping: Annotated[Literal[False] | Count | None, Must("a number of validations, such as 10")]
    """validations without a better mIoU after which the training stops"""
    loss_strips: Annotated[Literal["auto", "off", False] | Positive, Must("a number of rows, auto or off")] = "auto"
    """rows of the image for which logits and loss are computed at once; off: all, as in other code"""
    checkpoint_every: Annotated[Positive | None, Must("a number of steps, or null for once in each epoch")] = None
    """optimiser steps between checkpoints within an epoch"""
    pictures_every: Annotated[Count | None, Must("a number of epochs", "0 draws none")]
    """epochs between pictures"""
    progress_bar: Annotated[bool | Literal["auto"], Must("true, false or auto")]
    """progress bar; auto: on a terminal"""


class Freeze(Section):
    """Section ``freeze``."""

    parts: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, Must("a list of parts or patterns, such as [encoder]")
    ] = None
    """parts of the model that do not train: encoder, decoder, head, attention, or patterns of names; null: none"""
    until: OptionalPositive = None
    """epochs after which they train; null: never"""


class Report(Section):
    """Section ``report``."""

    dir: OptionalPath
    """folder of the report; null: report/ in the run's folder"""


class Training(Section):
    """All settings of ``train.py``."""

    epochs: Annotated[int | None, Field(ge=-1), Must("a whole number of at least 1")]
    """length of the training"""
    seed: Annotated[int, Field(ge=0, lt=2**32), Must("a whole number from 0 to 4294967295")]
    """seed of all random numbers"""
    resume: OptionalPath
    """folder of the run to continue, or auto"""
    rerun: OptionalPath = None
    """folder of the run to repeat"""
    init_from: OptionalPath = None
    """run, checkpoint or shared model whose weights the training starts from where they fit"""
    freeze: Freeze = Freeze()
    reproducible: Flag = False
    """deterministic algorithms alone"""
    data: Data
    model: Model
    attention: Attention
    placement: Placement
    loss: Annotated[Options, Must("a section of terms by name")]
    """terms by name, each with a weight"""
    optimizer: Optimizer
    schedule: Schedule
    trainer: Trainer
    # With logger=[] the section is missing.
    logger: Annotated[
        Options, Must("loggers by name", "choose them with logger=<name> or logger=[<name>,<name>] in a new run")
    ] = {}
    """options by the logger's name"""
    evaluation: Evaluation
    training: Steps
    report: Report
    sweep: Annotated[Options, Must("a section of settings")] = {}
    """see ``Sweep``"""


_Rows = Annotated[
    list[Annotated[Options, Field(min_length=1)]],
    Field(min_length=1),
    Must("a list of settings of rows, as in [{variant: none}]"),
]
_Names = Annotated[list[str], Must("a list of names")]


class _Evidence(Section):
    scores: _Names = []
    """miou, a size, a class or a group of classes of the sweep, or a score beyond the mIoU such as boundary_miou"""
    costs: Annotated[
        list[Literal["parameters", "gmacs", "latency", "memory"]], Must("some of parameters, gmacs, latency, memory")
    ] = []
    """some of parameters, gmacs, latency, memory"""
    curves: Annotated[
        list[Literal["train/gradient_norm", "train/gradient_norm_max", "train/loss", "val/loss"]],
        Must("some of train/gradient_norm, train/gradient_norm_max, train/loss, val/loss"),
    ] = []
    """columns of metrics.csv, of which less is better: their mean over the epochs and their unsteadiness"""
    interventions: Annotated[
        list[Literal["off", "uniform", "static", "swapped", "blurred"]],
        Must("some of off, uniform, static, swapped, blurred"),
    ] = []
    """interventions of ema-seg analyse on these rows and their baseline"""


class _Context(_Evidence):
    rows: _Rows | None = None
    expect: Annotated[Literal["better", "worse"] | None, Must("better or worse")] = None


class SweepClaim(_Evidence):
    """Claim of a sweep: rows that do better or worse than their baseline."""

    claim: Name
    """the claim in a sentence"""
    rows: _Rows
    """settings of the rows, as on the command line"""
    expect: Annotated[Literal["better", "worse"], Must("better or worse")]
    """how the rows compare with their baseline if the claim holds; a higher cost, gradient norm and spread is worse"""
    context: _Context | None = None
    """further evidence, which does not decide; rows and expect are those of the claim unless set"""


class Sweep(OpenSection):
    """Section ``sweep``, of which each sweeper uses a part."""

    baseline: Annotated[
        Annotated[Options, Field(min_length=1)] | None,
        Must("a non-empty mapping of settings, as in 'sweep.baseline={attention: none}'"),
    ]
    """settings that the jobs are compared with"""
    groups: Annotated[
        dict[str, list[Any]], Must("a mapping of names to lists of classes, as in 'sweep.groups={thin: [pole, fence]}'")
    ]
    """classes by the name of a group, which the comparison scores"""
    claims: Annotated[list[Options], Must("a list of claims, see docs/comparison.md")] = []
    """claims that the comparison judges"""
    retry: Flag
    """run jobs again that have failed twice"""
    grid: Annotated[Options | None, Must("a mapping, as in 'sweep.grid={attention: [se, ema]}'")] = None
    """values by key or group; every combination is a job"""
    variants: Annotated[
        dict[str, str | list[str]] | None,
        Must("a mapping of names to overrides, as in 'sweep.variants={wide: attention.factor=8}'"),
    ] = None
    """overrides by name; each name is one more value"""
    until: Annotated[float | None, Field(gt=0, le=100), Must("a number of points such as 0.5, or null")] = None
    """add seeds until the 95 % interval of each difference is at most this many points to each side"""
    max_seeds: Positive = 20
    """most seeds of a row, with until"""
    space: Annotated[Options | None, Must("a mapping, as in 'sweep.space={optimizer.lr: 'interval(1e-4,1e-2)'}'")] = (
        None
    )
    """searched keys"""
    trials: Positive = 1
    """trials of a search"""
    parallel: Positive = 1
    """trials at a time"""
    grace: Count = 0
    """first trials, and first epochs of each trial, without pruning"""
    seed: Count = 0
    """seed of a search"""


class _Normalisation(OpenSection):
    mean: OptionalColour
    std: OptionalColour


class _Open(OpenSection):
    pass


class Rebuilding(OpenSection):
    """The settings in a checkpoint that rebuilding and evaluating its model needs."""

    data: _Normalisation
    trainer: _Open
    model: Model
    attention: Attention
    placement: Placement


class Evaluating(Section):
    """All settings of ``eval.py``."""

    run: OptionalPath
    """folder of the run to evaluate"""
    ckpt: OptionalPath
    """checkpoint, exported file or shared model to evaluate"""
    devices: Annotated[str | int | list[Any], Must("a number of devices")]
    """number of processes, each on its own GPU if there are GPUs"""
    data: Data
    epochs: Any = None  # set by the configurations of the data sets
    evaluation: Evaluation
    report: Report


class Exporting(Section):
    """All settings of ``ema-seg export``."""

    run: OptionalPath
    """folder of a run, or a checkpoint"""
    format: Annotated[Literal["onnx", "torch", "openvino"], Must("onnx, torch or openvino")]
    """onnx, torch (a program of torch.export) or openvino"""
    precision: Annotated[Literal["fp32", "fp16", "int8"], Must("fp32, fp16 or int8")]
    """fp32, fp16, or int8, calibrated on the training split"""
    processing: Flag
    """uint8 RGB in, class ids out; false: normalised images in, logits out"""
    out: OptionalPath
    """folder; null: exported/<format>_<precision> in the run's folder"""
    images: Positive
    """images of the evaluation split to verify on"""
    calibration_images: Positive
    """images of the training split for int8"""
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False), Must("a positive number of seconds")]
    """seconds to time the model and the artefact for"""
    data: Data
    epochs: Any = None  # set by the configurations of the data sets


class Analysing(Section):
    """All settings of ``ema-seg analyse``."""

    run: OptionalPath
    """folder of a run with attention, or a checkpoint"""
    twin: OptionalPath
    """the same run with attention=none, to compare with; null: none"""
    out: OptionalPath
    """folder; null: analysis in the run's folder"""
    images: OptionalPositive
    """images of the evaluation split, spread evenly; null: all"""
    field_images: Positive
    """images for the effective receptive field"""
    device: Name
    """auto, cpu, cuda, cuda:1, mps"""
    precision: Annotated[Literal["32-true", "bf16-mixed", "16-mixed"], Must("32-true, bf16-mixed or 16-mixed")]
    """precision of autocast"""
    data: Data
    epochs: Any = None  # set by the configurations of the data sets


class Predicting(Section):
    """All settings of ``ema-seg predict``."""

    run: OptionalPath
    """folder of a run, checkpoint, exported file, or shared model"""
    source: OptionalPath
    """image or video, folder of them, pattern, or camera:0"""
    out: OptionalPath
    """folder for the results"""
    device: Name
    """auto, cpu, cuda, cuda:1, mps"""
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"] | None, Must("32-true, bf16-mixed or 16-mixed, or null")
    ]
    """precision of autocast; null: that of the run's evaluation"""
    compile: Flag
    """compile the model, once for each size of an image"""
    batch_size: Positive
    """images of equal size that are predicted together"""
    workers: Positive
    """threads that read and write"""
    alpha: Annotated[float, Field(ge=0, le=1), Must("a number from 0 to 1")]
    """share of the classes' colours in the overlays"""
    probabilities: Flag
    """also write probabilities/"""
    weight_maps: Flag
    """also write weight_maps/"""
    overwrite: Flag
    """predict again what is there"""


class Demonstrating(Section):
    """All settings of ``ema-seg demo``."""

    run: OptionalPath
    """folder of a run, or a checkpoint"""
    other: OptionalPath
    """a second one, to compare with; null: none"""
    examples: OptionalPath
    """folder of example pictures; null: some of the run's evaluation split, if its data is there"""
    port: Annotated[int | None, Field(ge=1, le=65535), Must("a port from 1 to 65535, or null for a free one")]
    """port of 127.0.0.1; null: a free one"""
    share: Flag
    """also give the page a public address on the internet, through a tunnel of Gradio's makers"""
    device: Name
    """auto, cpu, cuda, cuda:1, mps"""
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"] | None, Must("32-true, bf16-mixed or 16-mixed, or null")
    ]
    """precision of autocast; null: that of the run's evaluation"""


class Pushing(Section):
    """All settings of ``ema-seg push``."""

    run: OptionalPath
    """folder of a run, or a checkpoint"""
    to: OptionalPath
    """folder, or hf://user/name on the Hub"""
    license: Annotated[
        str | None,
        Field(pattern=r"^[a-z0-9][a-z0-9.-]*$"),
        Must("the Hub's identifier of a licence, such as mit or cc-by-4.0, or null"),
    ]
    """licence of the model; null: not stated"""
    private: Flag
    """a new model on the Hub is private"""
    overwrite: Flag
    """replace an earlier model"""


def check_settings(config: Mapping[str, Any], schema: type[Section], path: str = "") -> None:
    """Check a resolved configuration against its schema.

    Args:
        config: the configuration as plain data, or a section of it.
        schema: the schema.
        path: the dotted name of the section, with a trailing dot.

    Raises:
        ConfigError: a setting is missing, unknown or has an invalid value.
    """
    try:
        schema.model_validate(config)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        unknown = [details for details in found if details["type"] == "extra_forbidden"]
        raise ConfigError(_complaint((unknown or found)[0]["loc"], config, schema, path)) from error


def _complaint(where: tuple[int | str, ...], config: Mapping[str, Any], schema: type[Section], path: str) -> str:
    """Describe an invalid setting in one sentence.

    Args:
        where: keys that lead to it; below a setting they lead into its value.
        config: the configuration.
        schema: its schema.
        path: the dotted name of the configuration, with a trailing dot.
    """
    value: Any = config
    for key in where:
        full = f"{path}{key}"
        if key not in schema.model_fields:
            return f"{full}: there is no such setting; leave it out.{_near(full, schema, path)}"
        if key not in value:
            return f"{full}: missing; every configuration must have it; restore it."
        field, value = schema.model_fields[str(key)], value[key]
        section = _section_of(field)
        if section is None or not isinstance(value, Mapping):
            must = _must(field) or Must("a section of settings", f"set {full}.<name>=<value>")
            return f"{full}: must be {must.text}, got {value!r}{must.advice and f'; {must.advice}'}."
        schema, path = section, f"{full}."
    return f"{path.rstrip('.') or 'configuration'}: must be a section of settings, got {value!r}."


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _must(field: FieldInfo) -> Must | None:
    return next((item for item in reversed(field.metadata) if isinstance(item, Must)), None)


def describe_settings(schema: type[Section], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the meaning of each setting that has one."""
    for name, field in schema.model_fields.items():
        section = _section_of(field)
        if section is not None:
            yield from describe_settings(section, f"{path}{name}.")
        elif field.description:
            yield f"{path}{name}", " ".join(field.description.split())


def require_plain(config: object) -> None:
    """Reject a saved configuration that holds anything but plain keys and values.

    An interpolation in it would be resolved, and so could read the environment of whoever evaluates or resumes the run;
    a list that contains itself is endless.

    Raises:
        ConfigError: the configuration holds an interpolation or a value of another type, or is too large or too deep.
    """
    count = 0
    below: list[tuple[str, object, int]] = [("", config, 0)]
    while below:
        path, value, depth = below.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise ConfigError(
                f"{path}: a saved configuration has at most {_MOST_VALUES:,} values in {_DEEPEST} levels; restore it."
            )
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{path}: a saved configuration must hold plain values, got the interpolation {value!r}; write "
                "the value."
            )
        if isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            below += [(f"{path}.{key}" if path else str(key), item, depth + 1) for key, item in items]
        elif not isinstance(value, str | int | float | None):
            raise ConfigError(f"{path}: a value must be text or a number, got {type(value).__name__}; restore it.")


def suggest_own(key: str, is_known: Callable[[str], bool]) -> str:
    """Return a hint for a key of other training programs; empty if there is none or our name for it is not known."""
    if key == "experiment":  # a config group, which sets no key of this name
        return " An experiment's file begins with the line: # @package _global_"
    own = [name for name, others in _OTHER_NAMES.items() if is_known(name) and key in others.split()]
    if "resume" in own:
        return (
            " resume=<folder of a run> goes on with a run; python eval.py ckpt=<file> evaluates a checkpoint; "
            "init_from=<run or checkpoint> starts from its weights; model.encoder_weights=<file> from an encoder's."
        )
    return f" Did you mean {' or '.join(map(repr, own))}?" if own else ""


def _near(full: str, schema: type[Section], path: str) -> str:
    own = suggest_own(full, lambda key: bool(path) or key.partition(".")[0] in schema.model_fields)
    return own or did_you_mean(full, [f"{path}{other}" for other in schema.model_fields])
