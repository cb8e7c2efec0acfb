"""``mecq quantize``: train a model at low bits, down to an integer artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli import launch
from mecq_cli.cli import early
from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working
from mecq_cli.cli.completion import ESTIMATORS, QUANTIZERS, TASKS, model_names, one_of

_START = "Where it starts"
_BITS = "Bits"
_DATA = "Images"
_TRAINING = "Training"
_ENTROPY = "Entropy regularizer"
_FINER = "Training, finer points"
_RUN = "Run"


def quantize(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, torchvision/NAME, "
            "resnet20_cifar, resnet56_cifar, ...; to "
            "segment lraspp_mobilenet_v3_large, ...; to detect ssdlite320_mobilenet_v3_large, ...",
            metavar="MODEL",
            show_default=False,
            autocompletion=model_names,
        ),
    ] = None,
    wbits: Annotated[
        int | None,
        typer.Option(
            metavar="W", help="Bits of the weights: 1 to 8, 32 is float.", rich_help_panel=_BITS
        ),
    ] = None,
    abits: Annotated[
        int | None,
        typer.Option(
            metavar="A", help="Bits of the activations: 1 to 8, 32 is float.", rich_help_panel=_BITS
        ),
    ] = None,
    target_avg_bits: Annotated[
        float | None,
        typer.Option(
            metavar="B",
            help="Instead of --wbits: so many bits a weight on average, such as 2.5; each layer "
            "gets its own number.",
            rich_help_panel=_BITS,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Likewise: the bytes of all weights packed, such as 300kB or 1.2MB.",
            rich_help_panel=_BITS,
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("coding", "hessian", "loss"),
            metavar="NAME",
            help="What such a target goes by: what rounding a layer does to the features (coding; "
            "the default), by the loss's curvature (hessian), or to the outputs (loss).",
            rich_help_panel=_BITS,
        ),
    ] = None,
    first_last_bits: Annotated[
        int | None,
        typer.Option(
            metavar="B", help="Bits of the first and last layer (default 8).", rich_help_panel=_BITS
        ),
    ] = None,
    residual_bits: Annotated[
        int | None,
        typer.Option(
            metavar="B",
            help="Bits of the residual stream: 8, 32 is float (default 8).",
            rich_help_panel=_BITS,
        ),
    ] = None,
    reduce_range: Annotated[
        bool | None,
        typer.Option(
            "--reduce-range",
            help="Limit 8-bit weights to 7 bits, for CPUs without VNNI.",
            rich_help_panel=_BITS,
        ),
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*QUANTIZERS),
            metavar="NAME",
            help="How values are rounded (default auto); docs/method.md explains the names.",
            rich_help_panel=_BITS,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Folder with train/ and val/, each with a folder a class (to segment: with "
            "images/ and masks/; to detect: with annotations/ as COCO has); or tar files, "
            "wds/PATH, hfds/NAME.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*TASKS),
            metavar="NAME",
            help="What the model does: classify, segment or detect (default auto: what it is "
            "made for).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    val_split: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Share of train/ to hold out where there is no val/.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            help="Side of the input (default: the model's).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Share of the image that is kept (default: the model's). 1 keeps all.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images for the first activation scales (default 512).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Loader processes (default: one a core with a GPU, else 0).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,
            help="Weights: .pth or .safetensors.",
            rich_help_panel=_START,
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained/--no-pretrained",
            help="Without --checkpoint: the library's weights (default), or random ones.",
            show_default=False,
            rich_help_panel=_START,
        ),
    ] = None,
    reset_classifier: Annotated[
        bool | None,
        typer.Option(
            "--reset-classifier",
            help="Replace a classifier of another size by one fitted to the features; "
            "layers that segment or detect by random ones.",
            rich_help_panel=_START,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("quick", "standard", "best"),
            metavar="NAME",
            help="How long to train: quick (minutes), standard (an hour; the default) or best "
            "(as long as it takes).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Passes over the images; 0 only calibrates.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Stop after so many steps.", rich_help_panel=_TRAINING),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images a step, of all processes together (default 128, of more than 64 pixels "
            "32; fewer where there are few images).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="F", help="Learning rate.", rich_help_panel=_TRAINING)
    ] = None,
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill",
            help="Learn from the float model's outputs too, or not.",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Of weights and image order (default 0).", rich_help_panel=_TRAINING
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu, cuda, cuda:1, ... (default auto).", rich_help_panel=_TRAINING
        ),
    ] = None,
    mec_weight: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Weight of the entropy regularizer; 0 switches it off.",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_on: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="What is coded: penultimate, stages, layers, weights; joined by +.",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_views: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("quantized", "fp+quantized"),
            metavar="WHAT",
            help="Code the quantized features alone (quantized), or jointly with the float "
            "model's (fp+quantized).",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_term: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("entropy", "divergence"),
            metavar="NAME",
            help="With both: spread them together (entropy), or pull one's geometry to the "
            "other's (divergence). Controls: alignment, target, centring.",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_align: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="With both, for entropy and divergence: weight of their agreement beside the "
            "coding length.",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_distortion: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Distortion of its coding length (default 0.06).",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_warmup: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Share of the steps over which its distortion falls (default 0.1).",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_grid: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Average feature maps in N x N cells; 1: over the whole image.",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_estimator: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*ESTIMATORS),
            metavar="NAME",
            help="How the coding length is estimated: moe (default), exact or taylor.",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_experts: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Experts that the estimator moe may use (default all).",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    mec_order: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Order of the series of the estimator taylor (default 4).",
            rich_help_panel=_ENTROPY,
        ),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Compute each batch in K parts, for less memory (default 1).",
            rich_help_panel=_FINER,
        ),
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("auto", "bf16", "off"),
            metavar="WHAT",
            help="Mixed precision of the training step: auto (default), bf16 or off.",
            rich_help_panel=_FINER,
        ),
    ] = None,
    compile: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("auto", "model", "quantizers", "off"),
            metavar="WHAT",
            help="torch.compile of the training step: auto (default), model, quantizers or off.",
            rich_help_panel=_FINER,
        ),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Keep a moving average of the weights with this decay; 0 keeps the last ones.",
            rich_help_panel=_FINER,
        ),
    ] = None,
    freeze_oscillations: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Freeze weights that jump between two levels more often than this, such as 0.02. "
            "\\[default: 0.02 for networks of depthwise convolutions, else 0]",
            rich_help_panel=_FINER,
        ),
    ] = None,
    lower_from: Annotated[
        int | None,
        typer.Option(
            metavar="B",
            help="Begin with B bits and lower them step by step; 0 begins with those asked for.",
            rich_help_panel=_FINER,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings as TOML; flags win over it. It also takes bits of single layers, "
            "optimizer, weight_decay, ... mecq config show lists every key.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The run folder (default runs/MODEL-wWaA-TIME).",
            rich_help_panel=_RUN,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Save so often, in steps, to resume from.", rich_help_panel=_RUN
        ),
    ] = None,
    keep_checkpoints: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Keep the last N of them (default 2; with 1, none is left if it is damaged).",
            rich_help_panel=_RUN,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Evaluate so often, in epochs (default 0: only at the end).",
            rich_help_panel=_RUN,
        ),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("none", "tensorboard"),
            metavar="WHERE",
            help="Metrics in the run for tensorboard too (default none).",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume", help="Continue the run in --output.", rich_help_panel=_RUN),
    ] = None,
    force: Annotated[
        bool | None,
        typer.Option(
            "--force", help="Start over in an --output that is in use.", rich_help_panel=_RUN
        ),
    ] = None,
    dry_run: Annotated[
        bool | None,
        typer.Option(
            "--dry-run", help="Show what would be quantized; write nothing.", rich_help_panel=_RUN
        ),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq quantize resnet18 --wbits 4 --abits 4 --data DIR[/bold]

    Train a model with quantized weights and activations, and write it down
    as integers. For classes of your own in DIR/CLASS/*.jpg, without a val/:
    --reset-classifier --val-split 0.2. To try it out: --recipe quick.
    A size instead of bits: [bold]--target-avg-bits 2.5[/bold] or --target-size 300kB.
    """
    from mecq_cli.cli import following, render
    from mecq_cli.cli.views.run import summary
    from mecq_cli.cli.views.sites import sites
    from mecq_cli.config import resolve

    first = launch.rank() == 0
    settings, origins = resolve(config, flags_of(ctx, "config"), restarts=launch.restarts())
    early.check_training(settings.data, settings.val_split, settings.checkpoint)
    with working(quiet=quiet or not first) as listener:
        if launch.alone_by_mistake():
            listener.warn(
                "accelerate launch --cpu starts one process, whatever --num_processes says; "
                "torchrun --nproc-per-node N starts several"
            )
        from mecq_cli.workflow.quantize import quantize as quantize_model

        document = quantize_model(settings, origins, listener)
    if not first:
        return
    if settings.dry_run:
        render.show(document, sites, as_json=as_json)
        return
    render.show(document, summary, as_json=as_json)
    if not (as_json or quiet):
        following.advice(document)
        following.next_command(following.about_run("export", str(document["run"])))
