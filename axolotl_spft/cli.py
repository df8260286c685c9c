"""The `spft` command; its commands are `axolotl spft-calibrate` and `axolotl spft-merge`, too.

What a command needs is imported when it runs: help comes at once, and merging needs no Axolotl.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import click


@click.group()
@click.version_option(package_name="axolotl-spft", prog_name="axolotl-spft")
def main() -> None:
    """Structured-pruning-based sparse fine-tuning."""


@contextmanager
def _mistakes_in_one_line():
    from trainer_ext.errors import SpftError, show_mistake

    try:
        yield
    except SpftError as error:
        show_mistake(error)
        sys.exit(1)


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("config", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Safetensors file to write.")
@click.pass_context
def calibrate(ctx: click.Context, config: str, output: str) -> None:
    """Write the importance scores of an Axolotl YAML without training.

    A training run selects by them with spft_importance_file. Keys of the YAML can be replaced by
    --key=value. Several processes: accelerate launch -m axolotl_spft.cli calibrate ...
    """
    with _mistakes_in_one_line():
        from trainer_ext import SpftError

        try:
            from .calibrate import calibrate_yaml
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "axolotl":
                raise
            mend = "pip install 'axolotl-spft[axolotl]'"
            raise SpftError(
                f"spft calibrate needs Axolotl, which is not installed: {mend}"
            ) from None

        scores = calibrate_yaml(config, output, _overrides(ctx.args))
    if scores is not None:
        click.echo(
            f"axolotl-spft: {output} has the {scores.metric} scores of "
            f"{sum(scores.out_features.values())} neurons in {len(scores.scores)} layers "
            f"({scores.batches} batches)"
        )


@main.command()
@click.argument("adapter", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder to make.")
@click.option("--base", help="Original checkpoint. Default: the one that the adapter names.")
def merge(adapter: str, output: str, base: str | None) -> None:
    """Merge an adapter into its base's original checkpoint, file by file.

    No model is loaded, so memory is small whatever the size. An adapter over a 4- or 8-bit base is
    merged into the 16-bit checkpoint.
    """
    with _mistakes_in_one_line():
        from trainer_ext import merge_checkpoint

        merge_checkpoint(adapter, output, base)
    click.echo(f"axolotl-spft: {output} has the merged model")


def _overrides(arguments: list[str]) -> dict:
    """Keys of the YAML and their values from `--key=value` or `--some-key=value`."""
    import yaml

    from trainer_ext import SpftError

    overrides = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not name.startswith("--") or not separator:
            raise SpftError(f"{argument} is not understood; replace keys by --key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        overrides[name[2:].replace("-", "_")] = value
    return overrides


if __name__ == "__main__":
    main()
