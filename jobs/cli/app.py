"""The command line application: shared options, exit codes and the console."""

import inspect
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from blocksight.jobs.plan.config import MODEL_INPUT, Execution, JobConfig, load_config, parse_parameters
from blocksight.jobs.plan.plan import Plan
from blocksight.storage.stores.store import ObjectStore

COMPLETE, USAGE, OVER_BUDGET, INCOMPLETE, UNRECONCILED, WEAK_STORE, FINDING = 0, 2, 3, 4, 5, 6, 7
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells and typer have it

app = typer.Typer(
    name="blocksight",
    help="Explains whole data sets: a saliency map for every image of a folder or a bucket, kept as Parquet.\n\n"
    "Begin with `blocksight demo`.\n\n"
    "Exit codes: 0 complete; 2 usage, configuration, data or model; 3 complete, with more rejected records or "
    "dead units than the budget allows; 4 units are still open; "
    "5 the output is not what was planned; 6 the store cannot create an object once; "
    "7 `audit --fail-on finding` has a finding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERSIONED = ("ray", "torch", "torchvision", "pyarrow", "numpy")
"""Packages whose versions `--version` prints: a report of a fault needs them."""


def _print_version(asked: bool) -> None:
    if asked:
        packages = ", ".join(f"{name} {version(name)}" for name in VERSIONED)
        sys.stdout.write(f"blocksight {version('blocksight')} (Python {platform.python_version()}, {packages})\n")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


LOG_WIDTH = 140
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
"""As wide as the terminal; in a log or a pipe lines are not wrapped."""

Existing = Annotated[str, typer.Argument(help="The output: folder or s3:// prefix.")]
Endpoint = Annotated[
    str | None, typer.Option(help="S3 endpoint, for stores other than AWS; BUCKET=URL,BUCKET=URL where they differ.")
]
Weights = Annotated[str | None, typer.Option(help="State dict: file or s3:// URI; a weight name; or `random`.")]
InputSize = Annotated[
    str | None, typer.Option(help="Pixels that the model takes: 224, or 192x256 (height, width).  [default: its own]")
]
Mean = Annotated[
    str | None, typer.Option(help="Subtracted from RGB in 0..1, such as 0.485,0.456,0.406.  [default: the model's]")
]
Std = Annotated[str | None, typer.Option(help="What the difference is divided by.  [default: the model's]")]
ClassNames = Annotated[
    str | None, typer.Option(help="File: names of the model's outputs, one a line or JSON.  [default: the model's]")
]
Channels = Annotated[int | None, typer.Option(help="That the model takes: 3 (RGB), or 1 (brightness).  [default: 3]")]
OutputKey = Annotated[
    str | None,
    typer.Option(help="Of a model with several outputs, the one to explain: logits, or 0.  [default: its logits]"),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="squash (whole image), crop (its centre) or own (as the model's own library prepares it).  [default: own "
        "for timm:, hf: and open_clip:, else squash]"
    ),
]
Blocks = Annotated[str | None, typer.Option(help="Blocks by hand, comma-separated, shallow to deep.")]
Parameters = Annotated[
    list[str] | None,
    typer.Option("-p", "--param", help="Of the explainer, such as mu=0.3; of what it wraps: base.mu=0.3."),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join.  [default: one is started]")]
Cores = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Worker processes.  [default: one per CPU core, or this process for little; of evaluate one per GPU, if "
        "there are any]",
    ),
]
ClusterOfTasks = Annotated[str | None, typer.Option("--address", help="Ray cluster to join.  [default: this machine]")]
"""With `Cores` where evaluate, versus, audit, regions and export work."""
Wait = Annotated[
    str | None,
    typer.Option(
        help="For a cluster that is still coming, at most so long: 90s, 20m, 2h. Ray's autoscaler is asked for "
        "--workers, and workers are added as nodes join.  [default: no wait]"
    ),
]
MinWorkers = Annotated[
    int | None, typer.Option(min=1, help="With --wait: begin once so many workers fit.  [default: 1]")
]
PyModules = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder of a package of yours that a cluster's workers get a copy of, for development; may be repeated. "
        "In production it belongs into the image."
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Masked inputs per forward.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")]
ClassMap = Annotated[
    Path | None, typer.Option(help='JSON: the classes that a label means, such as {"dog": [151, 152]}.')
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print figures as JSON alone; notes and progress go to standard error.")
]
ShownTruth = Annotated[
    str | None,
    typer.Option(
        "--truth",
        help="Ground truth whose boxes are drawn, as in `evaluate`.  [default: what `evaluate` or `audit` was given]",
    ),
]
OutputModel = Annotated[
    str | None, typer.Option(help="The model again, if it is code of yours: an output alone never has code imported.")
]
OutputWeights = Annotated[str | None, typer.Option(help="The weights file again, if the model came from one.")]
"""Options that commands share. `OutputModel` and `OutputWeights` name what an output was made with."""

JOB_OPTIONS: dict[str, Any] = {
    "data": Annotated[str | None, typer.Option(help="Folder, file or s3:// prefix of images, tar shards or Parquet.")],
    "output": Annotated[str | None, typer.Option(help="Folder or s3:// prefix for the result.")],
    "inventory": Annotated[
        str | None,
        typer.Option(
            help="For millions of objects: s3:// URI of the manifest.json of an S3 inventory (Parquet or CSV) of the "
            "data's bucket, read instead of a listing."
        ),
    ],
    "config": Annotated[
        str | None, typer.Option(help="TOML file, or s3:// URI of one, with these options as keys; options win.")
    ],
    "endpoint_url": Endpoint,
    "model": Annotated[str | None, typer.Option(help="See `list models`.  [default: efficientnet_lite0]")],
    "weights": Weights,
    "input_size": InputSize,
    "mean": Mean,
    "std": Std,
    "class_names": ClassNames,
    "channels": Channels,
    "output_key": OutputKey,
    "blocks": Blocks,
    "explainer": Annotated[
        str | None,
        typer.Option(help="See `list explainers`; some wrap another, as in ucag(gradcam).  [default: sise]"),
    ],
    "param": Parameters,
    "preset": Annotated[
        str | None,
        typer.Option(
            help="fast: fewer steps for the dearest explainers, and half precision on a GPU where its scores are near "
            "enough; paper: the papers' constants in float32. What -p says wins.  [default: fast]"
        ),
    ],
    "precision": Annotated[
        str | None,
        typer.Option(
            help="Of masked forwards: float32, float16, bfloat16.  [default: float32 on a CPU; on a GPU by preset]"
        ),
    ],
    "budget": Annotated[
        str | None,
        typer.Option(
            help="Of sise: masks to score per image (a number, a share such as 0.1, or auto); the other "
            "scores are predicted.  [default: all are scored]"
        ),
    ],
    "fidelity": Annotated[
        str | None,
        typer.Option(
            help="Of sise: preview (no mask is scored), balanced (a tenth), full, or auto: full for records that "
            "are wrong, uncertain, rare among the class folders, or poorly mapped by a tenth.  [default: full]"
        ),
    ],
    "readout": Annotated[
        str | None,
        typer.Option(
            help="How a score is read from the model's output: softmax (classes exclude each other), sigmoid "
            "(independent labels), probabilities (it is one already) or identity (the raw output).  [default: the "
            "output is examined on a few images; softmax unless it looks otherwise, which is said]"
        ),
    ],
    "target": Annotated[
        list[str] | None,
        typer.Option(
            help="What is explained: predicted, label, top-3, 281, 'tabby'; why one and not the other: margin, "
            "281-282; also 0.5*281+0.5*282, logit(281), logprob(281); of CLIP and its like 'text:a photo of "
            "a dog'; of the feature vector similar:cat.png, prototype:CLASS of a bank, feature:17, direction:FILE.npy. "
            "Commas separate several, and it may be repeated. What begins with a double quote is a class's name: "
            "'\"T-shirt\"'.  [default: predicted]"
        ),
    ],
    "labels": Annotated[
        str | None,
        typer.Option(
            help="CSV or Parquet file with the columns key (file name or path) and label, for any layout; `none`: the "
            "data's labels do not count.  [default: the data's labels]"
        ),
    ],
    "class_map": ClassMap,
    "resize": Resize,
    "interpolation": Annotated[
        str | None,
        typer.Option(
            help="bilinear, bicubic, nearest, lanczos, box or hamming.  [default: as --resize own says, else bilinear]"
        ),
    ],
    "signed": Annotated[
        bool | None,
        typer.Option(
            "--signed", help="Also map what speaks against the target, in a second colour (gradients, CAMs, masks)."
        ),
    ],
    "limit": Annotated[int | None, typer.Option(help="Only the first so many records.")],
    "seed": Annotated[int | None, typer.Option(help="Of everything random.  [default: 0]")],
    "workers": Annotated[int | None, typer.Option(min=1, help="Explain actors.  [default: one per GPU, or CPU core]")],
    "runner": Annotated[
        str | None, typer.Option(help="ray, or local: this process alone, same bytes.  [default: ray]")
    ],
    "address": Address,
    "device": Annotated[
        str | None,
        typer.Option(help="gpu (an error without one), cpu, or auto: the GPUs if there are any.  [default: auto]"),
    ],
    "wait": Wait,
    "min_workers": MinWorkers,
    "py_modules": PyModules,
    "part": Annotated[
        str | None,
        typer.Option(
            help="Explain one of several parts, as each task of a batch system's array does: 0/16 to 15/16. All write "
            "into one output; the last to end completes it.  [default: all]"
        ),
    ],
    "batch_size": Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Masked inputs per forward.  [default: 8 with OpenVINO, else 4; on a GPU the fastest, or 256]",
        ),
    ],
    "tune": Annotated[
        bool | None,
        typer.Option(
            "--tune",
            help="Time a CPU's forwards first and take the fastest batch size: two outputs may then differ in bits.",
        ),
    ],
    "max_reject_fraction": Annotated[
        float | None, typer.Option(help="More rejected records are no success: exit 3.  [default: 0.5]")
    ],
    "max_dead_units": Annotated[int | None, typer.Option(help="More dead units are no success: exit 3.  [default: 0]")],
    "metrics_file": Annotated[
        str | None,
        typer.Option(
            help="Write the run's metrics here every few seconds, in Prometheus' text format: DIR/blocksight.prom, in "
            "the folder that node-exporter's textfile collector reads.  [default: none]"
        ),
    ],
    "log_json": Annotated[
        str | None,
        typer.Option(
            help="Add a line of JSON per unit to this file, or with - to standard error: run, part, unit, attempt, "
            "node, seconds, records, rejects.  [default: none]"
        ),
    ],
}
"""Options of `plan` and `explain`: what is computed, and how it runs."""


MODEL_OPTIONS = (
    "model",
    "weights",
    *MODEL_INPUT,
    "blocks",
    "readout",
    "target",
    "resize",
    "interpolation",
    "endpoint_url",
)
"""Those of a job's options that say what the model is, how it is fed and what is explained."""

FEATURE_OPTIONS = ("weights", "input_size", "mean", "std", "resize", "interpolation", "endpoint_url")
"""Those that say how a model is fed whose features are taken."""


def takes_job(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a job, and calls it with the checked configuration and execution.

    Its keyword-only parameters are options of its own.
    """
    return _with_options(command, JOB_OPTIONS, job_of)


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `MODEL_OPTIONS`, and calls it with a dict of them.

    Its keyword-only parameters are options of its own.
    """
    return _with_options(command, MODEL_OPTIONS, lambda given: (_given(given, MODEL_OPTIONS),))


def takes_features(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `FEATURE_OPTIONS`, and calls it with a dict of them; as `takes_model`."""
    return _with_options(command, FEATURE_OPTIONS, lambda given: (_given(given, FEATURE_OPTIONS),))


def _with_options(
    command: Callable[..., None], names: Iterable[str], positional: Callable[[dict[str, Any]], Sequence[Any]]
) -> Callable[..., None]:
    """The command with these of a job's options; what `positional` makes of them comes before its own."""
    parameters = inspect.signature(command).parameters.values()
    own = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]

    def run(**given: Any) -> None:
        command(*positional(given), **{parameter.name: given[parameter.name] for parameter in own})

    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=JOB_OPTIONS[name])
        for name in names
    ]
    signature = inspect.Signature([*shared, *own])
    run.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def job_of(given: dict[str, Any]) -> tuple[JobConfig, Execution]:
    """The configuration and execution from the shared options and their TOML file."""
    options = _given(given, [name for name in JOB_OPTIONS if name not in ("config", "param", "budget")])
    asked = [*(given["param"] or []), *([f"budget={given['budget']}"] if given["budget"] is not None else [])]
    return load_config(given["config"], {**options, "parameters": parse_parameters(asked)})


def _given(given: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """These options; a list that nobody gave is None."""
    return {name: None if given[name] == [] else given[name] for name in names}


def existing(output: str, endpoint_url: str | None) -> tuple[ObjectStore, Plan]:
    """The output's store and its plan."""
    from blocksight.jobs.worker.rows import existing_output

    found = existing_output(output, endpoint_url)
    return found.store, found.plan
