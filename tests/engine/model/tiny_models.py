"""Tiny random checkpoints, transformers' own answers to them, and the same through streamed layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from penstock.engine.batch import MicroBatch, Span
from penstock.engine.executor import Executor
from penstock.engine.model.build import StreamedModel, load_model
from penstock.engine.model.compile import LayerCompiler
from penstock.offload.kv import KVStore
from penstock.offload.source import SynchronousWeights, WeightSource, read_unit

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

PROMPTS = [[5, 17, 33, 99, 101, 7, 12, 200, 45, 3, 77, 150], [9, 8, 250, 31], [60, 61, 62, 63, 64, 65, 66, 67],
           [11, 22], [199, 12, 13, 14, 15, 16, 17, 18, 19]]  # fmt: skip
ANSWERS = [[41, 42, 43, 44], [51, 52, 53, 54], [71, 72, 73, 74], [81, 82, 83, 84], [91, 92, 93, 94]]


def model_type(name: str) -> str:
    return FAMILIES[name].get("model_type", name)


def make_config(settings: dict[str, Any], name: str) -> Any:
    settings = copy.deepcopy(settings)
    return AutoConfig.for_model(settings.pop("model_type", name), **settings)


def save_checkpoint(config: Any, path: Path, *, dtype: torch.dtype = torch.float32, shard: str = "150KB") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    randomize(model)
    model.save_pretrained(path, max_shard_size=shard)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every weight a value that matters: initial ones are often zero or one."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or any(part in name for part in ("norm", "A_log", "conv1d")):
            parameter.add_(noise(parameter) * 0.1)
        elif any(part in name for part in ("embed", "wte", "wpe")):
            parameter.copy_(noise(parameter) * 0.5)
        else:
            fan = parameter.shape[-1] if parameter.dim() == 2 else min(parameter.shape[-2:])
            parameter.copy_(noise(parameter) * (1.2 / fan**0.5))
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name or "moe_statics" in name:
            buffer.copy_(noise(buffer) * 0.2)


@torch.no_grad()
def reference(
    path: Path, *, attention: str = "eager", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """Return transformers' logits [tokens, vocab] of every prompt and its answer, one sequence at a time, no cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()
    model = model.to(device)
    sequences = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return [model(torch.tensor([tokens], device=device), use_cache=False).logits[0].cpu() for tokens in sequences]


@dataclass(slots=True)
class Forwarded:
    """Copies what another source reads into a CPU slot to a slot on the device."""

    source: WeightSource
    slot: Tensor
    on_device: Tensor

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        with self.source.layer(index):
            self.on_device.copy_(self.slot)
            yield


@dataclass(slots=True)
class Stream:
    """A model whose layers go through one slot; `max_scores` attention scores are in memory at once."""

    model: StreamedModel
    executor: Executor
    kv: KVStore
    compiler: LayerCompiler
    max_scores: int = 1 << 24

    @classmethod
    def open(cls, path: Path, *, dtype: str = "auto", device: str = "cpu", backend: str | None = None) -> Stream:
        """Bind a model to one slot; with a `backend` of torch.compile, compile its layers."""
        model = load_model(path, dtype=dtype, device=device)
        compiler = LayerCompiler(model.layers, backend=backend or "inductor")
        resident = torch.zeros(model.resident.nbytes, dtype=torch.uint8)
        read_unit(model.resident, resident)
        model.bind_resident(resident.to(device))
        slot = torch.zeros(max(layout.nbytes for layout in model.layer_layouts), dtype=torch.uint8)
        on_device = slot.to(device)
        for index in range(len(model.layers)):
            model.bind_layer(index, on_device)
        model.check_bound()
        weights: WeightSource = SynchronousWeights(model.layer_layouts, slot)
        if device != "cpu":
            weights = Forwarded(weights, slot, on_device)
        executor = Executor(model.layers)
        executor.weights = weights
        stream = cls(model, executor, KVStore(device=device), compiler)
        if backend:
            with compiler.compiling():
                stream.kv.acquire(0, num_tokens=11)
                stream.run([[(0, 0, 11)]])
                stream.kv.release(0)
        return stream

    def run(self, batches: Sequence[Sequence[tuple[int, int, int]]], *, keep: Tensor | None = None) -> list[Tensor]:
        """Run a pass over micro-batches of (sequence, start, end).

        Returns the logits of every span, in order; with `keep`, of these tokens of each micro-batch.
        """
        runs = []
        for spans in batches:
            tokens = [(PROMPTS[s] + ANSWERS[s])[start:end] for s, start, end in spans]
            flat = torch.tensor([token for part in tokens for token in part], device=self.model.device)
            batch = MicroBatch(tuple(Span(s, start, end - start) for s, start, end in spans), self.kv, self.max_scores)
            kept = torch.arange(len(flat), device=flat.device) if keep is None else keep
            runs.append((batch, partial(self.model.forward, batch, flat, kept)))
        logits = self.executor.run_pass(runs)
        if keep is not None:
            return logits
        lengths = [[end - start for _, start, end in spans] for spans in batches]
        return [part for made, sizes in zip(logits, lengths, strict=True) for part in made.split(sizes)]


def worst_error(stream: Stream, wanted: list[Tensor]) -> float:
    """Return the largest of all `errors`."""
    return float(errors(stream, wanted).max())


def errors(stream: Stream, wanted: list[Tensor]) -> Tensor:
    """Return each token's largest error over a ragged prefill, decode, and passes that mix chunks and decode."""
    for sequence, prompt in enumerate(PROMPTS):
        stream.kv.acquire(sequence, num_tokens=len(prompt) + len(ANSWERS[sequence]))
    sizes = [len(prompt) for prompt in PROMPTS]
    found = []

    def run(*batches: list[tuple[int, int, int]]) -> None:
        spans = [span for batch in batches for span in batch]
        for (sequence, start, end), logits in zip(spans, stream.run(batches), strict=True):
            found.append((logits.cpu() - wanted[sequence][start:end]).abs().amax(-1))

    run([(0, 0, sizes[0]), (1, 0, sizes[1]), (2, 0, sizes[2])], [(3, 0, sizes[3]), (4, 0, sizes[4])])
    for step in range(3):
        run([(s, sizes[s] + step, sizes[s] + step + 1) for s in (0, 1, 2)],
            [(s, sizes[s] + step, sizes[s] + step + 1) for s in (3, 4)])  # fmt: skip
    for sequence in (0, 4):  # two sequences leave, and start again
        stream.kv.release(sequence)
        stream.kv.acquire(sequence, num_tokens=sizes[sequence] + len(ANSWERS[sequence]))
    cut = 5 if stream.model.splits_prompts else sizes[0]
    run([(2, sizes[2] + 3, sizes[2] + 4), (0, 0, cut), (3, sizes[3] + 3, sizes[3] + 4)], [(4, 0, sizes[4])])
    if cut < sizes[0]:
        run([(4, sizes[4], sizes[4] + 1), (0, cut, 9), (1, sizes[1] + 3, sizes[1] + 4)])
        run([(0, 9, sizes[0])])
    run([(0, sizes[0], sizes[0] + 1)])
    stream.kv.release(1)  # and only one token reaches the head
    stream.kv.acquire(1, num_tokens=sizes[1])
    (last,) = stream.run([[(1, 0, sizes[1])]], keep=torch.tensor([sizes[1] - 1], device=stream.model.device))
    found.append((last.cpu() - wanted[1][sizes[1] - 1]).abs().amax(-1))
    stream.kv.check_integrity()
    for sequence in range(len(PROMPTS)):
        stream.kv.release(sequence)
    stream.kv.check_integrity()
    return torch.cat(found)
