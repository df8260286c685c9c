"""Only the calibration of an Axolotl YAML: a training run that ends when the scores are known."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import yaml
from axolotl.cli.train import do_cli
from axolotl.utils.distributed import cleanup_distributed
from axolotl.utils.tee import close_debug_log

from trainer_ext import ImportanceScores, SpftError

from .plugin import ADAPTER, NAME, SPFTPlugin, YamlCallback, named_plugins

# Keys that say what becomes of the scores, or what a run goes on with or leaves behind: without
# them the calibration is the same.
_WITHOUT = (
    "auto_resume_from_checkpoints",
    "hub_model_id",
    "resume_from_checkpoint",
    "spft_allocation",
    "spft_allocation_ceiling",
    "spft_allocation_floor",
    "spft_importance_file",
)


def calibrate_yaml(
    path: str | os.PathLike, output: str | os.PathLike, overrides: dict | None = None
) -> ImportanceScores | None:
    """Write the importance scores that a training run of a YAML would select by.

    The run's output_dir is not touched. Under several processes each calls this; the scores are
    those of all their data.

    Args:
        path: the YAML; its adapter is prune_spft.
        output: safetensors file to write, whole or not at all.
        overrides: key -> value to use instead of the YAML's; `a.b` is key b inside key a.

    Returns:
        The scores, on the process that wrote them; None on the others.

    Raises:
        SpftError: a mistake in the YAML; nothing is written.
    """
    output = Path(output)
    if output.is_dir():
        raise SpftError(f"the output {output} is a folder; give the name of the file to write")
    cfg = _read_yaml(path)
    for key, value in (overrides or {}).items():
        _set(cfg, key, value)
    _refuse_without_calibration(cfg, output)
    with tempfile.TemporaryDirectory(prefix="spft-calibrate-") as folder:
        cfg = {key: value for key, value in cfg.items() if key not in _WITHOUT}
        # Axolotl before 0.21 finds plugins by name alone
        cfg["plugins"] = list(dict.fromkeys([*named_plugins(cfg), NAME]))
        cfg["output_dir"] = str(Path(folder) / "out")
        file = Path(folder) / "calibrate.yml"
        file.write_text(yaml.safe_dump(cfg, sort_keys=False))
        done = _run(file)
    if not done.on_main_process:
        return None
    try:
        done.scores.save(output)
    except OSError as error:
        raise SpftError(f"the output {output} cannot be written: {error.strerror}") from None
    return done.scores


class _Calibrated(BaseException):
    """Ends the run with its result; no Exception, or Axolotl would report it as a crash."""

    def __init__(self, scores: ImportanceScores, on_main_process: bool) -> None:
        super().__init__("the calibration is done")
        self.scores = scores
        self.on_main_process = on_main_process


class _CalibrateAndStop(YamlCallback):
    @classmethod
    def attach(cls, trainer, cfg) -> None:
        super().attach(trainer, cfg)
        # First in line: trackers (Weights & Biases and others) open a run when training begins.
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())

    def on_train_begin(self, *args, **kwargs) -> None:
        raise _Calibrated(self.calibrate(), self.trainer.is_world_process_zero())


def _run(file: Path) -> _Calibrated:
    try:
        with _stopping_after_calibration():
            do_cli(str(file))
    except _Calibrated as done:
        return done
    except SystemExit:  # Axolotl turns an interrupt into a clean exit
        raise KeyboardInterrupt from None
    finally:
        close_debug_log()  # it lies in the temporary folder
        cleanup_distributed()
    raise RuntimeError("Axolotl ended without beginning to train")


@contextmanager
def _stopping_after_calibration():
    argv, callback_class = sys.argv, SPFTPlugin.callback_class
    # do_cli looks for options of its own in the command line
    sys.argv, SPFTPlugin.callback_class = argv[:1], _CalibrateAndStop
    try:
        yield
    finally:
        sys.argv, SPFTPlugin.callback_class = argv, callback_class


def _read_yaml(path: str | os.PathLike) -> dict:
    try:
        cfg = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpftError(f"{path} cannot be read: {error.strerror}; give an Axolotl YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SpftError(f"{path} is no YAML file: {reason}") from None
    if not isinstance(cfg, dict):
        raise SpftError(f"{path} holds no keys; give an Axolotl YAML")
    return cfg


def _set(cfg: dict, key: str, value) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(cfg.get(parent), dict):
            cfg[parent] = {}
        cfg = cfg[parent]
    cfg[name] = value


def _refuse_without_calibration(cfg: dict, output: Path) -> None:
    if cfg.get("adapter") != ADAPTER:
        raise SpftError(
            f"adapter is {cfg.get('adapter')!r}; only adapter: {ADAPTER} has scores to calibrate"
        )
    file = cfg.get("spft_importance_file")
    # The YAML may be that of the training run that is to use the file made here.
    if file and Path(str(file)).resolve() != output.resolve():
        raise SpftError(
            f"spft_importance_file is {file!r}, scores that exist already, and a run with them "
            "does not calibrate; drop the key, or give the same file as the output"
        )
    if cfg.get("lora_model_dir"):
        raise SpftError(
            f"lora_model_dir is {cfg['lora_model_dir']!r}, whose neurons are chosen already; "
            "drop the key"
        )
    if cfg.get("use_ray"):
        raise SpftError("use_ray is True; calibrate without Ray, by accelerate launch if need be")
