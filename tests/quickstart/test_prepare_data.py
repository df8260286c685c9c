"""Invariants of quickstart/prepare_data.py (no network):

- Two processes with different hash seeds write the same bytes; a second run writes nothing.
- Train and held-out share no top-level module, no shown source and no docstring.
- Every sample is one user and one assistant message; the function shown parses, has no docstring
  and does not contain the answer; tests and what is not the library are left out.
- A stale, damaged or interrupted output is never taken for whole, and is written anew.
- A wrong option, or a library without sources, ends in exit code 1 and one line on stderr.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

FILES = ["held_out.jsonl", "prepared.json", "train.jsonl"]
DOCSTRING = "Return the sum of all the items."


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("prepare_data")


@pytest.fixture(scope="module")
def output(script, tmp_path_factory):
    """Return a folder with what the script makes of the real standard library."""
    folder = tmp_path_factory.mktemp("quickstart") / "cache" / "data"
    assert script.main(["--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def samples(output):
    """Return the train and the held-out samples of the real standard library."""
    texts = [(output / name).read_text() for name in ("train.jsonl", "held_out.jsonl")]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def shown_source(sample) -> str:
    content = sample["messages"][0]["content"]
    return re.fullmatch(r".*?\n\n```python\n(.*)\n```", content, re.DOTALL)[1]


def answer(sample) -> str:
    return sample["messages"][1]["content"].casefold()


def the_error_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_another_process_writes_the_same_bytes(script, output, tmp_path):
    command = [sys.executable, script.__file__, "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert sorted(os.listdir(tmp_path)) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_the_marker_says_what_is_there(output, samples):
    marker = json.loads((output / "prepared.json").read_text())
    for name, expected in marker["sha256"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == expected
    train, held_out = samples
    assert marker["counts"] == {"train.jsonl": len(train), "held_out.jsonl": len(held_out)}
    assert marker["held_out_modules"] == sorted({sample["module"] for sample in held_out})
    assert marker["python"] == sys.version.split()[0]
    assert "PSF" in marker["licence"]


def test_train_and_held_out_share_nothing(samples):
    train, held_out = samples
    for part in (shown_source, answer, lambda sample: sample["module"]):
        assert {part(sample) for sample in train}.isdisjoint({part(sample) for sample in held_out})


def test_both_are_large_and_mixed(script, samples):
    train, held_out = samples
    assert 1000 < len(train) <= script.MAX_TRAIN_SAMPLES
    assert len(held_out) == script.MAX_HELD_OUT_SAMPLES
    assert len({sample["module"] for sample in train[:64]}) > 20
    assert len({sample["module"] for sample in held_out}) > 8


def test_every_sample_is_a_fair_question(samples):
    for sample in samples[0] + samples[1]:
        assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
        docstring = sample["messages"][1]["content"]
        source = shown_source(sample)
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert docstring not in " ".join(source.split())
        assert len(source) <= 700
        assert 20 <= len(docstring) <= 240
        assert "\n" not in docstring


def write(library, path, source):
    target = library / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(textwrap.dedent(source).strip("\n") + "\n")


def test_a_method_is_shown_whole_and_without_its_docstring(script, tmp_path):
    write(
        tmp_path,
        "shapes.py",
        '''
        class Shape:
            if True:
                @classmethod
                def sum(cls):
                    """
                    Return the sum of
                    all the items.

                    It can take a while.
                    """

                    # the comment stays
                    text = "naïve"
                    return cls(text)
        ''',
    )
    (pair,) = script.collect_pairs(tmp_path)
    assert pair == script.Pair(
        module="shapes",
        source='@classmethod\ndef sum(cls):\n    # the comment stays\n    text = "naïve"\n'
        "    return cls(text)",
        docstring=DOCSTRING,
    )


@pytest.mark.parametrize(
    "function",
    [
        f'def f(x):\n    """{DOCSTRING}"""',
        f'def f(x): "{DOCSTRING}"; return x',
        f'def f(x):\n    """{DOCSTRING}"""; return x',
        f'def f(x):\n    """{"naïve " * 10}"""; return x',
        f'def f(x):\n    """{DOCSTRING}"""\n    "A second string."\n    return x',
        f'def f(x):\n    """{DOCSTRING}"""\n    # {DOCSTRING}\n    return x',
        f'def f(x):\n    """{DOCSTRING}"""\n    return "```"',
        f'def f(x):\n    """{DOCSTRING}"""\n    return "{"x" * 700}"',
        'def f(x):\n    """Too short."""\n    return x',
        'def f(x):\n    """Extraordinarily, incomprehensibly short."""\n    return x',
        f'def f(x):\n    """{"Very long. " * 30}"""\n    return x',
        'def f(x):\n    """Return one of these four things:\n\n    None"""\n    return x',
        'def f(x):\n    """>>> print(sum(range(100)), 1, 2)"""\n    return x',
        'def f(x):\n    """"""\n    return x',
        f'def f(x):\n    """{DOCSTRING}"""\n    return x +',
    ],
)
def test_no_fair_question_is_left_out(script, tmp_path, function):
    (tmp_path / "module.py").write_text(function + "\n")
    assert script.collect_pairs(tmp_path) == []


def function(name: str, docstring: str = DOCSTRING) -> str:
    return f'def {name}(x):\n    """{docstring}"""\n    return x\n'


def test_only_the_library_itself_is_read(script, tmp_path):
    kept = ["a.py", "package/__init__.py", "package/deep/b.py", "testing.py"]
    left_out = ["test/a.py", "package/tests/a.py", "idlelib/idle_test/a.py", "pydoc_data/a.py"]
    left_out += ["site-packages/a.py", "config-3.11-x86_64/a.py", "_sysconfigdata_linux.py"]
    for number, path in enumerate(kept + left_out):
        write(tmp_path, path, function(f"f{number}", f"{DOCSTRING} Number {number}."))
    pairs = script.collect_pairs(tmp_path)
    assert [pair.module for pair in pairs] == ["a", "package", "package", "testing"]


def test_nothing_comes_twice_over_all_modules(script, tmp_path):
    write(tmp_path, "a.py", function("f"))
    write(tmp_path, "b.py", function("g", DOCSTRING.upper()))
    write(tmp_path, "c.py", function("f", "Another docstring of the same source."))
    assert [pair.module for pair in script.collect_pairs(tmp_path)] == ["a"]


def test_no_module_drowns_the_others(script):
    sizes = {"big": 500, "small": 10, "tiny": 2}
    pairs = [script.Pair(m, f"{m}{n}", f"{m} {n}") for m in sizes for n in range(sizes[m])]
    train, held_out = script.split_pairs(pairs, 0.5)
    counts = Counter(pair.module for pair in train + held_out)
    assert counts == {"big": script.MAX_SAMPLES_PER_MODULE, "small": 10, "tiny": 2}


@pytest.fixture
def library(tmp_path):
    """Return a small library, enough for both parts at an even split."""
    for number in range(20):
        text = function(f"f{number}", f"{DOCSTRING} Number {number}.")
        write(tmp_path / "library", f"m{number}.py", text)
    return tmp_path / "library"


def damage_train(folder):
    with (folder / "train.jsonl").open("ab") as file:
        file.write(b"{}\n")


def lose_held_out(folder):
    (folder / "held_out.jsonl").unlink()


def cut_marker(folder):
    path = folder / "prepared.json"
    path.write_bytes(path.read_bytes()[:30])


def change_marker(key):
    def change(folder):
        path = folder / "prepared.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: 0}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        damage_train,
        lose_held_out,
        cut_marker,
        *map(change_marker, ["format", "python", "held_out_fraction", "sha256"]),
    ],
)
def test_only_a_whole_and_current_output_is_reused(script, library, tmp_path, damage):
    folder = tmp_path / "data"
    script.prepare(folder, 0.5, library)
    before = [(folder / name).read_bytes() for name in FILES]
    assert script.prepare(folder, 0.5, library) == f"data ready (cached): {folder}"

    damage(folder)
    assert "cached" not in script.prepare(folder, 0.5, library)
    assert [(folder / name).read_bytes() for name in FILES] == before
    assert "cached" not in script.prepare(folder, 0.6, library)


@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("had_older", [False, True])
def test_an_interrupted_run_is_not_taken_for_whole(
    script, library, tmp_path, monkeypatch, writes, had_older
):
    folder = tmp_path / "data"
    if had_older:
        script.prepare(folder, 0.3, library)
    real_replace, done = os.replace, []

    def cut(source, target):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(target)
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(script.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            script.prepare(folder, 0.5, library)
    assert not script.is_cached(folder, 0.5)
    assert script.is_cached(folder, 0.3) == (had_older and writes == 0)
    assert set(os.listdir(folder)) <= set(FILES)
    assert "cached" not in script.prepare(folder, 0.5, library)
    assert script.is_cached(folder, 0.5)


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan"])
def test_a_fraction_out_of_range_is_one_line(script, tmp_path, capsys, fraction):
    assert script.main(["--output", str(tmp_path), f"--held-out-fraction={fraction}"]) == 1
    assert "must lie between 0 and 1" in the_error_line(capsys)
    assert os.listdir(tmp_path) == []


def test_a_library_without_sources_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    assert script.main(["--output", str(tmp_path / "data")]) == 1
    assert "found 0 train and 0 held-out samples" in the_error_line(capsys)


def test_an_unwritable_output_is_one_line(script, library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(library))
    (tmp_path / "file").touch()
    options = ["--output", str(tmp_path / "file" / "data"), "--held-out-fraction=0.5"]
    assert script.main(options) == 1
    assert "writable folder" in the_error_line(capsys)
