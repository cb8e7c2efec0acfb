"""Settings: precedence and origin, the file format, and one line for each thing that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mecq_cli.config import (
    CHANGEABLE_ON_RESUME,
    FLAG_ONLY,
    Allotment,
    Allotted,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    LayerOverride,
    QuantizeConfig,
    explain,
    from_flags,
    from_toml,
    question,
    resolve,
    to_toml,
)
from mecq_cli.errors import UsageError
from mecq_cli.settings import bytes_of

FLAGS: dict[str, Any] = {"model": "resnet18", "wbits": 2, "abits": 4, "data": Path("images")}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_file_and_each_value_knows_its_origin(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.toml",
        'wbits = 3\nlr = 1\noptimizer = "adamw"\n[[layers]]\npattern = "layer4.*"\nwbits = 4\n',
    )
    config, origins = resolve(file, {**FLAGS, "distill": False, "epochs": None})
    assert (config.wbits, config.lr, config.optimizer, config.distill) == (2, 1.0, "adamw", False)
    assert config.layers == (LayerOverride(pattern="layer4.*", wbits=4),)
    assert config.epochs is None
    assert origins.keys() == QuantizeConfig.model_fields.keys()
    picked = {key: origins[key] for key in ("wbits", "distill", "lr", "layers", "epochs", "seed")}
    assert picked == {
        "wbits": "flag",
        "distill": "flag",
        "lr": "file",
        "layers": "file",
        "epochs": "default",
        "seed": "default",
    }


def test_to_toml_reproduces_every_setting_of_the_run(tmp_path: Path) -> None:
    overrides = (LayerOverride(pattern="a", abits=8), LayerOverride(pattern="b", wbits=1))
    changed: dict[str, Any] = {
        **FLAGS,
        "data": Path.cwd() / "images",
        "checkpoint": Path('/weights/näme "x".pth'),
        "val_split": 0.1,
        "lr": 0.02,
        "epochs": 0,
        "mec_weight": 0.0,
        "pretrained": False,
        "output": Path("elsewhere"),
        "force": True,
        "layers": overrides,
    }
    config, _ = resolve(None, changed)
    again = from_toml(write(tmp_path / "config.toml", to_toml(config)))
    assert again == config.model_copy(update={"output": None, "force": False})


def test_every_setting_that_may_be_none_is_none_by_default() -> None:
    # TOML has no null: what is left out of a file must come back as None.
    for kind in (QuantizeConfig, LayerOverride):
        for name, field in kind.model_fields.items():
            if "None" in str(field.annotation):
                assert field.default is None, name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"wbits": 9}, "--wbits: got 9; allowed: 1 to 8, or 32 to leave it in float"),
        ({"abits": 0}, "--abits: got 0; allowed: 1 to 8, or 32 to leave it in float"),
        ({"residual_bits": 4}, "--residual-bits: got 4; allowed: 8, or 32 to leave it in float"),
        ({"val_split": 1.0}, "--val-split: got 1.0; allowed: between 0 and 1"),
        ({"crop_pct": 0.0}, "--crop-pct: got 0.0; allowed: more than 0, at most 1"),
        ({"lr": float("nan")}, "--lr: got nan; allowed: a finite number"),
        ({"epochs": -1}, "--epochs: got -1; allowed: 0 or more"),
        ({"amp": "fp16"}, "--amp: got 'fp16'; allowed: auto, bf16 or off"),
        ({"model": " "}, "MODEL: got ' '; allowed: a name, not an empty one"),
        (
            {"mec_term": "divergence", "mec_views": "quantized"},
            "--mec-term divergence compares with the float model: it needs --mec-views "
            "fp+quantized",
        ),
        (
            {"mec_term": "alignment", "mec_on": "weights"},
            "--mec-term alignment compares with the float model: it needs features, such as "
            "--mec-on stages, beside weights or instead of them",
        ),
        (
            {"mec_experts": "exact", "mec_estimator": "taylor"},
            "--mec-experts are those of --mec-estimator moe, not of taylor",
        ),
        (
            {"mec_order": 6},
            "--mec-order is that of --mec-estimator taylor, not of moe",
        ),
        (
            {"ema": 0.99, "bn_images": 0},
            "--ema needs --bn-images above 0: the batch norm statistics that training leaves are "
            "not those of averaged weights",
        ),
        (
            {"resume": True},
            "--resume: which run? give --output RUN; runs/latest names the latest",
        ),
        (
            {"resume": True, "force": True},
            "--resume and --force: one continues a run, the other starts it over",
        ),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(None, {**FLAGS, **flags})
    assert str(caught.value) == message


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"^missing: MODEL, --wbits, --abits, --data;"):
        resolve(None, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wbit = 2", "unknown key 'wbit'; did you mean 'wbits'?"),
        ("val-split = 0.1", "unknown key 'val-split'; did you mean 'val_split'?"),
        ("force = true", "'force' is a flag only: --force"),
        ("lr = true", "'lr' in {file}: got True; allowed: a number"),
        ('epochs = "5"', "'epochs' in {file}: got '5'; allowed: a whole number"),
        ("epochs = 2.5", "'epochs' in {file}: got 2.5; allowed: a whole number"),
        ('layers = "conv1"', "'layers' in {file}: got 'conv1'; allowed: [[layers]] tables"),
        ('[[layers]]\npatern = "a"', "[[layers]]: unknown key 'patern'; did you mean 'pattern'?"),
        (
            '[[layers]]\npattern = "a"\nwbits = 9',
            "'layers[0].wbits' in {file}: got 9; allowed: 1 to 8, or 32 to leave it in float",
        ),
        ('[[layers]]\npattern = "a"', "allowed: wbits, abits or both"),
        ("a b", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "run.toml", text)
    with pytest.raises(UsageError) as caught:
        resolve(file, FLAGS)
    assert str(file) in str(caught.value)
    assert message.replace("{file}", str(file)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_settings_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="settings file"):
        resolve(tmp_path / name, FLAGS)


def test_resume_takes_the_settings_of_the_run_and_refuses_to_change_them(tmp_path: Path) -> None:
    started, _ = resolve(
        None,
        {**FLAGS, "epochs": 5, "lr": 0.02, "amp": "bf16", "quantizer": "lsq", "device": "cuda"},
    )
    write(tmp_path / "config.toml", to_toml(started))
    resuming = {"resume": True, "output": tmp_path}

    config, origins = resolve(None, resuming)
    assert (config.model, config.epochs, config.lr) == ("resnet18", 5, 0.02)
    assert (origins["lr"], origins["output"]) == ("checkpoint", "flag")
    assert resolve(None, {**resuming, "amp": "auto"})[0].amp == "bf16"
    assert resolve(None, {**resuming, "device": "auto"})[0].device == "auto"

    moved, origins = resolve(None, {**FLAGS, **resuming, "data": tmp_path, "workers": 2})
    assert (moved.data, moved.workers, origins["wbits"]) == (str(tmp_path), 2, "flag")

    with pytest.raises(UsageError, match=r"--lr: got 0.1, but .* was started with 0.02; leave"):
        resolve(None, {**resuming, "lr": 0.1})
    with pytest.raises(UsageError, match=r"--quantizer: got 'auto', but .* started with 'lsq'"):
        resolve(None, {**resuming, "quantizer": "auto"})


TARGET: dict[str, Any] = {"model": "resnet18", "abits": 4, "data": "images"}
ALLOTTED = {"layer": "conv1", "wbits": 3, "sensitivity": 0.1}


def test_a_target_takes_the_place_of_wbits() -> None:
    for average, whole in ((1.2, 1), (2.5, 2), (2.6, 3), (8, 8)):
        config, origins = resolve(None, {**TARGET, "target_avg_bits": float(average)})
        assert (config.wbits, config.sensitivity, origins["wbits"]) == (whole, "coding", "default")
    assert resolve(None, {**TARGET, "target_size": "0.5 MiB"})[0].target_size == "0.5 MiB"
    for size, count in (
        ("300kB", 300_000),
        ("1.2mb", 1_200_000),
        ("2 KiB", 2048),
        ("65536", 2**16),
    ):
        assert bytes_of(size) == count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target_avg_bits": 9.0}, "--target-avg-bits: got 9.0; allowed: 1 to 8"),
        ({"target_avg_bits": 0.5}, "--target-avg-bits: got 0.5; allowed: 1 to 8"),
        (
            {"target_size": "big"},
            "--target-size: got 'big'; allowed: a size, such as 300kB or 1.2M",
        ),
        (
            {"target_size": "0kB"},
            "--target-size: got '0kB'; allowed: a size, such as 300kB or 1.2M",
        ),
        ({"target_avg_bits": 2.5, "target_size": "9kB"}, "both say how small; give one of them"),
        ({"target_avg_bits": 2.5, "wbits": 2}, "--wbits and --target-avg-bits: the target allots"),
        (
            {"target_avg_bits": 2.5, "sensitivity": "los"},
            "--sensitivity: got 'los'; allowed: coding, hessian or loss",
        ),
    ],
)
def test_a_wrong_target_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        resolve(None, {**TARGET, **flags})
    assert "\n" not in str(caught.value)


def test_a_run_keeps_its_allotment_until_another_target_is_given(tmp_path: Path) -> None:
    config, _ = resolve(None, {**TARGET, "data": str(tmp_path), "target_avg_bits": 2.5})
    begun = write(tmp_path / "config.toml", to_toml(config))
    assert from_toml(begun) == config
    resuming = {"resume": True, "output": tmp_path}
    assert resolve(None, resuming)[0].allotted == ()

    how = Allotment(asked=question(config.model_dump()), images=64, seconds=1.0, optimal=True)
    rows = (Allotted.model_validate(ALLOTTED),)
    met = config.model_copy(update={"allotted": rows, "allotment": how, "wbits": 3})
    file = write(tmp_path / "config.toml", to_toml(met))
    assert from_toml(file) == met
    for flags in (
        resuming,
        {**resuming, "target_avg_bits": 2.5},
        {**resuming, "model": "resnet18"},
    ):
        again, _ = resolve(None, flags)
        assert (again.wbits, again.allotted, again.allotment) == (3, met.allotted, how)
    for same in ({"lr": 0.1}, {**resuming, "checkpoint": tmp_path / "moved.pth"}):
        assert resolve(file, same)[0].allotted == met.allotted
    with pytest.raises(UsageError, match=r"^--wbits: .* was started with --target-avg-bits 2.5, w"):
        resolve(None, {**resuming, "wbits": 2})
    changes: tuple[dict[str, Any], ...] = (
        {"target_avg_bits": 4.0},
        {"target_size": "9kB"},
        {"sensitivity": "loss"},
        {"model": "resnet56_cifar"},
        {"quantizer": "lsq"},
        {"first_last_bits": 2},
        {"checkpoint": tmp_path / "other.pth"},
    )
    assert all(resolve(file, change)[0].allotted == () for change in changes)
    plain, _ = resolve(file, {"wbits": 4})
    assert (plain.wbits, plain.target, plain.allotted) == (4, None, ())
    with pytest.raises(UsageError, match=r"--target-avg-bits: got 3.0, but .* started with 2.5"):
        resolve(None, {**resuming, "target_avg_bits": 3.0})
    shown = explain(None, {"target_avg_bits": 3.4}, None)["settings"]
    assert (shown["wbits"]["value"], shown["target_avg_bits"]["origin"]) == (3, "flag")


def test_an_edited_target_is_allotted_anew(tmp_path: Path) -> None:
    config, _ = resolve(None, {**TARGET, "data": str(tmp_path), "target_avg_bits": 2.5})
    how = Allotment(asked=question(config.model_dump()), images=64, seconds=1.0, optimal=True)
    rows = (Allotted.model_validate(ALLOTTED),)
    met = config.model_copy(update={"allotted": rows, "allotment": how, "wbits": 3})
    text = to_toml(met)
    assert resolve(write(tmp_path / "same.toml", text), {})[0].allotted == rows
    edited = write(tmp_path / "edited.toml", text.replace("avg_bits = 2.5", "avg_bits = 6.0"))
    again, _ = resolve(edited, {})
    assert (again.allotted, again.allotment, again.wbits) == ((), None, 6)


def test_a_sensitivity_without_a_target_is_told_apart_from_one_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--sensitivity: it is what a target is met by"):
        resolve(None, {**FLAGS, "sensitivity": "loss"})
    plain, _ = resolve(None, {**FLAGS, "data": str(tmp_path)})
    assert resolve(write(tmp_path / "run.toml", to_toml(plain)), {})[0] == plain


def test_what_the_program_chose_is_open_again_in_a_new_run_and_holds_in_the_same(
    tmp_path: Path,
) -> None:
    asked, _ = resolve(None, {**FLAGS, "data": str(tmp_path), "scale_lr": 0.5})
    chosen = {"lr": 0.05, "weight_decay": 2.5e-5, "mec_on": "stages"}
    run = asked.model_copy(update={**chosen, "chosen": chosen})
    text = to_toml(run)
    file = write(tmp_path / "config.toml", text)
    assert from_toml(file) == run
    again, origins = resolve(file, {"wbits": 4})
    assert (again.lr, again.weight_decay, again.mec_on, again.chosen) == (None, None, None, {})
    assert (again.scale_lr, origins["scale_lr"], origins["lr"]) == (0.5, "file", "default")
    for flags, lr in (({}, 0.05), ({"scale_lr": 1.0}, None), ({"weight_decay": 0.0}, 0.05)):
        assert explain(None, flags, file)["settings"]["lr"]["value"] == lr
    edited = write(tmp_path / "edited.toml", text.replace("lr = 0.05", "lr = 0.03", 1))
    assert resolve(edited, {})[0].lr == 0.03
    resuming = {"resume": True, "output": tmp_path}
    for config_file in (None, file):
        resumed, _ = resolve(config_file, resuming)
        assert (resumed.lr, resumed.weight_decay, resumed.chosen) == (0.05, 2.5e-5, chosen)


def test_resume_without_a_run_and_without_flags_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run to continue"):
        resolve(None, {"resume": True, "output": tmp_path / "none"})


def test_resume_of_a_folder_without_a_run_starts_with_the_flags(tmp_path: Path) -> None:
    config, origins = resolve(None, {**FLAGS, "resume": True, "output": tmp_path / "new"})
    assert (config.wbits, origins["wbits"], origins["lr"]) == (2, "flag", "default")


def test_a_launcher_that_restarts_may_begin_with_a_target(tmp_path: Path) -> None:
    flags = {key: value for key, value in FLAGS.items() if key != "wbits"}
    flags |= {"target_avg_bits": 2.5, "output": tmp_path / "new"}
    config, _ = resolve(None, flags, restarts=True)
    assert (config.resume, config.target_avg_bits) == (True, 2.5)
    with pytest.raises(UsageError, match="--wbits or a target"):
        resolve(None, {**flags, "target_avg_bits": None}, restarts=True)


def test_the_small_commands_check_their_flags_too() -> None:
    config = from_flags(EvalConfig, {"target": None, "img_size": 64, "simulator": True})
    assert config == EvalConfig(img_size=64, simulator=True)
    assert from_flags(DemoConfig, {"output": Path("~/x")}).output == Path.home() / "x"
    with pytest.raises(
        UsageError,
        match=r"--profile: got 'tflite'; allowed: ort, portable or qonnx",
    ):
        from_flags(ExportConfig, {"profile": "tflite"})


def test_flags_that_say_what_to_do_now_are_off_by_default() -> None:
    assert all(QuantizeConfig.model_fields[name].default is False for name in FLAG_ONLY)


OTHER: dict[str, Any] = {
    "model": "resnet50", "wbits": 3, "abits": 3, "pretrained": False, "reset_classifier": True,
    "fit_classifier": False,
    "target_avg_bits": 2.5, "target_size": "90kB", "sensitivity": "loss",
    "allotted": [{"layer": "conv1", "wbits": 3, "sensitivity": 0.1}],
    "allotment": {"asked": "other", "images": 7, "seconds": 0.7, "optimal": True},
    "chosen": {"lr": 0.7},
    "task": "segment",
    "first_last_bits": 4, "residual_bits": 32, "reduce_range": True, "val_split": 0.3,
    "img_size": 96, "crop_pct": 0.5, "epochs": 7, "max_steps": 3, "batch_size": 7, "lr": 0.7,
    "optimizer": "adamw", "weight_decay": 0.7, "scale_lr": 0.7, "warmup_epochs": 0.7, "seed": 7,
    "amp": "bf16", "compile": "model", "distill": False, "distill_weight": 0.7,
    "distill_temperature": 7.0, "teacher": "float", "mec_weight": 0.7, "mec_distortion": 0.7,
    "mec_warmup": 0.7, "quantizer": "pact", "recipe": "best", "ema": 0.9,
    "freeze_oscillations": 0.1, "lower_from": 4,
    "mec_on": "layers", "mec_views": "quantized", "mec_align": 0.7, "mec_grid": 2,
    "mec_estimator": "exact", "mec_experts": "exact", "mec_order": 2, "mec_term": "entropy",
    "calibration_images": 7, "bn_images": 7, "layers": [{"pattern": "conv1", "wbits": 3}],
    "data": "/elsewhere", "checkpoint": Path("/w.pth"), "output": Path("/run"), "workers": 3,
    "device": "cpu", "checkpoint_every": 3, "keep_checkpoints": 3,
    "eval_every": 3, "log": "tensorboard",
    "accumulate": 2,
}  # fmt: skip


def test_every_setting_either_may_change_on_resume_or_is_refused_by_name(tmp_path: Path) -> None:
    """A new setting must be given a place here, and so a decision."""
    started, _ = resolve(None, {**FLAGS, "amp": "off", "compile": "off"})
    write(tmp_path / "config.toml", to_toml(started))
    assert {*OTHER} == {*QuantizeConfig.model_fields} - FLAG_ONLY
    for key, value in OTHER.items():
        # Bits that are not of this target are forgotten; the order needs its estimator.
        if key in ("output", "allotted", "mec_order"):
            continue
        changed = {"resume": True, "output": tmp_path, key: value}
        if key in CHANGEABLE_ON_RESUME:
            assert getattr(resolve(None, changed)[0], key) == value
            continue
        with pytest.raises(UsageError) as caught:
            resolve(None, changed)
        message, flag = str(caught.value), "--" + key.replace("_", "-")
        assert message.startswith((f"{flag}: got ", f"{key.upper()}: got ")), message
        before = getattr(started, key)
        with_it = "without it" if before is None else f"with {before!r}"
        assert f"was started {with_it}" in message or key == "layers"
        for name in CHANGEABLE_ON_RESUME - {"output"}:
            assert "--" + name.replace("_", "-") in message
