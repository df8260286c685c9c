"""Held-out loss after the same short training: by importance metric, random neurons, and LoRA.

SmolLM2-135M on docstrings, the quickstart's model and data (run `make quickstart` first, or name
the folders). All cases train as many parameters, to rounding. Each runs with every seed at every
learning rate. A row is written when its run ends; the same command goes on where it was stopped.

    python benchmarks/quality.py [--seeds 42 43] [--cases random group_taylor] [--max-steps 24]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fingerprint import code_fingerprint, fingerprint
from measuring import describe_machine, make_versions, positive
from peft import get_peft_model
from peft_adapters import ADAPTERS, nearest_rank
from quality_table import best_losses, render
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from trainer_ext import SpftConfig, SpftTrainer, measure_importance
from trainer_ext.files.atomic import write_bytes
from trainer_ext.tuner.targets import default_target_modules

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "quickstart"))

import evaluate  # noqa: E402 (the quickstart's scripts are no package)

CACHE = ROOT / "quickstart" / "cache"
R = 64  # neurons a layer, as in the quickstart
LORA = "lora"
# Fields of SpftConfig; LoRA has none.
CASES: dict[str, dict] = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "wanda": {"importance": "wanda"},
    "zo_taylor": {"importance": "zo_taylor"},
    # the module of the standard library that a function comes from
    "quantile_mean": {"importance": "quantile_mean", "class_field": "module"},
    "taylor": {"importance": "taylor"},
    "group_taylor": {"importance": "group_taylor"},
    "group_taylor, global": {"importance": "group_taylor", "allocation": "global"},
    LORA: {},
}


@dataclass(frozen=True)
class Setting:
    """What all rows of a table have in common; rows of another setting are not mixed with them.

    Attributes:
        code: fingerprint of the package's and this benchmark's source.
        rows: samples of a training step.
        held_out: held-out samples at most, the first of the file.
        device: name of the GPU or processor type.
        inputs: fingerprint of the model's and the data's files.
        torch: its version.
    """

    code: str
    inputs: str
    torch: str
    max_steps: int
    rows: int
    calibration_batches: int
    held_out: int
    device: str


@dataclass(frozen=True)
class Job:
    case: str
    seed: int
    learning_rate: float


def job_of(row: dict) -> Job:
    """The job that a row is the result of."""
    return Job(row["case"], row["seed"], row["learning_rate"])


class Bench:
    """The model's folder, the encoded data, and what is done with them; one in each process."""

    def __init__(self, args: argparse.Namespace, setting: Setting) -> None:
        self.args, self.setting = args, setting
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.train = self._samples("train.jsonl")
        self.held_out = self._samples("held_out.jsonl")[: setting.held_out]

    def _samples(self, name: str) -> list[dict]:
        rows = [json.loads(line) for line in (self.args.data / name).read_text().splitlines()]
        encoded = (evaluate.encode(row["messages"], self.tokenizer) for row in rows)
        return [
            {"input_ids": ids, "labels": labels, "module": row["module"]}
            for (ids, labels), row in zip(encoded, rows, strict=True)
        ]

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return evaluate.padded_batch(
            [(row["input_ids"], row["labels"]) for row in rows], self.tokenizer
        )

    def base(self):
        model = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.bfloat16)
        return model.to(self.args.device)

    def run(self, job: Job) -> dict:
        """Train one case; its row. Losses are nats a token of the held-out answers."""
        with tempfile.TemporaryDirectory(prefix="spft-quality-") as folder:
            trainer = self._trainer(job, Path(folder))
            before = self.held_out_loss(trainer.model)
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
            report = Path(folder, "spft_report.json")
            calibration = json.loads(report.read_text())["calibration"] if report.exists() else None
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        return {
            **asdict(job),
            "held_out_loss_before": before,
            "held_out_loss_after": self.held_out_loss(trainer.model),
            "trainable_parameters": sum(p.numel() for p in trained),
            "agreement_of_halves": (calibration or {}).get("agreement_of_halves"),
            "batches_wanted": (calibration or {}).get("batches_wanted"),
            "training_seconds": seconds,
        }

    def _trainer(self, job: Job, folder: Path) -> Trainer:
        args = TrainingArguments(
            str(folder),
            max_steps=self.setting.max_steps,
            per_device_train_batch_size=self.setting.rows,
            learning_rate=job.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=4,
            weight_decay=0.0,
            bf16=self.args.device == "cuda",  # weights are bf16 either way
            use_cpu=self.args.device == "cpu",
            seed=job.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        more = {"train_dataset": self.train, "data_collator": self.collate}
        model = self.base()
        if job.case == LORA:
            torch.manual_seed(job.seed)
            return Trainer(get_peft_model(model, self._lora(model)), args, **more)
        options = dict(CASES[job.case])
        if options.get("allocation") == "global":  # by the scores of a calibration of its own
            options["importance_file"] = self._scores(model, job, folder)
            model = self.base()
        return SpftTrainer(model, args, **more, spft_config=self._config(job, **options))

    def _config(self, job: Job, **options) -> SpftConfig:
        batches = self.setting.calibration_batches
        return SpftConfig(r=R, calibration_batches=batches, seed=job.seed, **options)

    def _lora(self, model):
        """LoRA on the same layers, at the rank whose number of parameters is nearest."""
        names = default_target_modules(model)
        layers = [model.get_submodule(name) for name in names]
        shapes = [(layer.in_features, layer.out_features) for layer in layers]
        budget = sum(min(R, d_out) * d_in for d_in, d_out in shapes)
        config = ADAPTERS[LORA].config(nearest_rank(ADAPTERS[LORA], shapes, budget), names)
        config.lora_alpha = config.r
        return config

    def _scores(self, model, job: Job, folder: Path) -> str:
        model = get_peft_model(model, self._config(job, importance="group_taylor"))
        count = self.setting.calibration_batches * self.setting.rows
        batches = self.batches(self.train[:count], self.setting.rows)

        path = folder / "scores.safetensors"
        measure_importance(model, batches).save(path)
        return str(path)

    def batches(self, samples: list[dict], rows: int) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(samples), rows):
            batch = self.collate(samples[start : start + rows])
            yield {key: value.to(self.args.device) for key, value in batch.items()}

    def held_out_loss(self, model) -> float:
        """Mean loss over the held-out answers' tokens, each token counting the same."""
        training = model.training
        model.eval()
        total = tokens = 0
        for batch in self.batches(sorted(self.held_out, key=lambda s: -len(s["input_ids"])), 16):
            total += evaluate.summed_loss(model, batch)
            tokens += int((batch["labels"][:, 1:] != -100).sum())
        model.train(training)
        return total / tokens


_bench: Bench | None = None  # of a worker process


def _start_worker(args: argparse.Namespace, setting: Setting) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(args, setting)


def _run_in_worker(job: Job) -> dict:
    return _bench.run(job)


def run_all(jobs: list[Job], args, setting: Setting, deadline: float) -> Iterator[dict]:
    """Rows of the jobs as they end; none begins after the deadline (time.monotonic)."""
    if args.workers == 1:
        bench = Bench(args, setting)
        for job in jobs:
            if time.monotonic() > deadline:
                return
            yield bench.run(job)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, context, _start_worker, (args, setting))
    try:
        waiting, running = list(jobs), set()
        while True:
            while waiting and len(running) < args.workers and time.monotonic() <= deadline:
                running.add(pool.submit(_run_in_worker, waiting.pop(0)))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_rows(path: Path, setting: Setting) -> list[dict]:
    """The rows of earlier calls.

    Raises:
        ValueError: they were made by other code, with other options or on another device.
    """
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")  # a killed call may leave half a line at the end
    rows = [json.loads(line) for line in whole]
    for row in rows:
        for key, value in asdict(setting).items():
            if row["setting"].get(key) != value:
                raise ValueError(
                    f"{path} has rows with {key} = {row['setting'].get(key)}, this call has "
                    f"{value}; give another --output-dir, or remove the file"
                )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--max-steps", type=positive, default=24)
    parser.add_argument("--rows", type=positive, default=4, help="samples of a step")
    parser.add_argument("--calibration-batches", type=positive, default=8)
    parser.add_argument("--held-out", type=positive, default=1000, help="samples at most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=positive, default=1, help="runs at a time, on a GPU")
    parser.add_argument("--time-limit", type=positive, help="seconds; no run begins after them")
    parser.add_argument("--model", type=Path, default=CACHE / "model")
    parser.add_argument("--data", type=Path, default=CACHE / "data")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "quality-135m-docstrings",
    )
    args = parser.parse_args(argv)
    for folder in (args.model, args.data):
        if not folder.is_dir():
            parser.error(f"{folder} is not there; run make quickstart first, or name another")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run what has not been run yet, then print the table.

    Returns:
        the exit code: 1 if rows of something else are there, or runs are left for another call.
    """
    args = parse(argv)
    deadline = time.monotonic() + (args.time_limit or math.inf)
    machine = describe_machine(torch.device(args.device))
    setting = Setting(
        code=code_fingerprint([Path(__file__), Path(evaluate.__file__)]),
        inputs=fingerprint([*args.model.glob("*.safetensors"), *args.data.glob("*.jsonl")]),
        torch=torch.__version__,
        max_steps=args.max_steps,
        rows=args.rows,
        calibration_batches=args.calibration_batches,
        held_out=args.held_out,
        device=machine.get("gpu", "cpu"),
    )
    path = args.output_dir / "rows.jsonl"
    try:
        rows = read_rows(path, setting)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())  # whole lines only
    done = {job_of(row) for row in rows}
    wanted = [
        Job(case, seed, rate)
        for seed in args.seeds
        for rate in args.learning_rates
        for case in args.cases
    ]
    jobs = [job for job in wanted if job not in done]
    common = {"setting": asdict(setting), "machine": machine, "versions": make_versions()}
    with path.open("a") as file:
        for row in run_all(jobs, args, setting, deadline):
            rows.append({**row, "workers": args.workers, **common})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            write_bytes(args.output_dir / "table.md", render(rows).encode())
            print(
                f"{row['case']} seed {row['seed']} rate {row['learning_rate']:g}: "
                f"{row['held_out_loss_after']:.3f}",
                flush=True,
            )
    if rows:
        print(render(rows))
    finished = {job_of(row) for row in rows}
    missing = sum(job not in finished for job in wanted)
    best = sorted(best_losses(rows).items(), key=lambda item: item[1])
    parts = [f"{case} {loss:.3f}" for case, loss in best]
    print("; ".join([*parts, f"{missing} runs left"]))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
