"""The first stage of benchmarks/gpu.sh: does a run train, save, load, merge and resume at all?

Each step prints one line; one that raises prints what its error says, and the others go on, but
for the first, with which they compare. The model is tiny, its base weights bf16, its deltas fp32.

    python benchmarks/gpu_smoke.py [--device cuda]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, TrainingArguments
from workload import SIZES, Workload

from trainer_ext import SpftConfig, SpftTrainer
from trainer_ext.tuner.model import deltas, spft_layers

STEPS = 4


class Smoke:
    """The runs and what they leave for the later ones."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.work = Workload(
            size=SIZES["tiny"],
            dtype=torch.bfloat16,
            device=torch.device(device),
            seq_len=32,
            batch_size=2,
            r=8,
            checkpointing=False,
        )

    def train(self, forward: str, name: str, resume: bool = False) -> SpftTrainer:
        """Run the trainer, from the last checkpoint in its folder if `resume`."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.work.size.vocab, (32, self.work.seq_len), generator=generator)
        args = TrainingArguments(
            str(self.folder / name),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            bf16=True,
            use_cpu=self.device == "cpu",
            save_steps=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SpftTrainer(
            self.work.base_model(),
            args,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            spft_config=SpftConfig(r=self.work.r, calibration_batches=2, forward=forward),
        )
        trainer.train(resume_from_checkpoint=str(self.checkpoint(name)) if resume else None)
        return trainer

    def checkpoint(self, name: str) -> Path:
        return self.folder / name / "checkpoint-2"

    def logits(self, model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=self.work.batch()["input_ids"]).logits.float()

    def write_through(self) -> None:
        self.trained = self.train("write_through", "run")
        self.trained.save_model()
        moved = [d.weight.norm().item() for d in deltas(self.trained.model).values()]
        assert min(moved) > 0, "a delta has not moved"
        assert self.trained.model.device.type == self.device, "the run was on another device"
        assert all(layer.written is None for layer in spft_layers(self.trained.model).values())

    def delta(self) -> None:
        first, second = (
            [entry["loss"] for entry in run.state.log_history if "loss" in entry]
            for run in (self.trained, self.train("delta", "delta"))
        )
        # bf16 has 8 bits: W0 + delta rounded or not differs by 2^-9 of a weight at most
        gap = max(abs(a - b) / a for a, b in zip(first, second, strict=True))
        assert gap < 2**-6, f"losses differ by {gap:.1e} from those of write-through"

    def load(self) -> None:
        model = PeftModel.from_pretrained(self.work.base_model(), self.folder / "run")
        expected = self.logits(self.trained.model)
        assert torch.equal(self.logits(model), expected), "a loaded adapter computes another thing"

    def merge(self) -> None:
        model = PeftModel.from_pretrained(self.work.base_model(), self.folder / "run")
        expected, saved = self.logits(model), self.folder / "merged"
        merged = model.merge_and_unload(safe_merge=True)
        result = self.logits(merged)
        merged.save_pretrained(saved)
        anew = LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).to(self.device)
        assert torch.equal(self.logits(anew), result), "the merged model was not saved as it is"
        error = ((result - expected).norm() / expected.norm()).item()
        assert error < 2**-5, f"the merged model is {error:.1e} from the adapter's"

    def resume(self) -> None:
        resumed = self.train("write_through", "run", resume=True)
        for name, delta in deltas(resumed.model).items():
            expected = deltas(self.trained.model)[name].weight
            error = ((delta.weight - expected).norm() / expected.norm()).item()
            # equal bits are shown by tests/cuda, under deterministic algorithms
            assert error < 2**-6, f"{name} is {error:.1e} from the undisturbed run's"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="spft-smoke-") as folder:
        smoke = Smoke(args.device, Path(folder))
        lines = [attempt(smoke.write_through)]
        if lines[0] is None:  # the others compare with it
            lines += map(attempt, (smoke.delta, smoke.load, smoke.merge, smoke.resume))
    failed = [line for line in lines if line]
    print("; ".join(failed) or f"{len(lines)} of {len(lines)} steps passed on {args.device}")
    return 1 if failed else 0


def attempt(step: Callable[[], None]) -> str | None:
    """Run a step and print how it went; what failed, in one line, or None."""
    started = time.perf_counter()
    try:
        step()
    except Exception as error:  # whatever it is, the other steps are to be seen too
        traceback.print_exc()
        said = traceback.format_exception_only(error)[0].splitlines()[0]  # CUDA adds advice
        print(f"{step.__name__}: FAILED: {said}", flush=True)
        return f"{step.__name__}: {said}"
    print(f"{step.__name__}: passed in {time.perf_counter() - started:.1f} s", flush=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
