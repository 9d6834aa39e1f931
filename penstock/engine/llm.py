"""The Python API: a model, the memory it may use, and `generate`."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import ExitStack, closing
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import psutil
import torch

from penstock.engine.budget import check_activation_dtype, check_rehearsal_fits, find_device, limits_of, resolve
from penstock.engine.code_on_load import CodeOnLoad, check_plain
from penstock.engine.executor import Executor
from penstock.engine.flops import count_flops
from penstock.engine.forecast import Forecast, Length, forecast
from penstock.engine.generation import Generation
from penstock.engine.model.build import StreamedModel, load_model
from penstock.engine.model.compile import LayerCompiler, why_not_compile
from penstock.engine.model.tail import LOGIT_NBYTES
from penstock.engine.model.tokenizer import end_token_ids, load_tokenizer
from penstock.engine.outputs import RequestOutput, ScoreOutput
from penstock.engine.planner import Objective
from penstock.engine.planning import USUAL_WORK, kept_profile, plan_run
from penstock.engine.prepare import Preparer
from penstock.engine.rates import measured, rates_of
from penstock.engine.recorder import PassRecorder
from penstock.engine.rehearsal import rehearse, rehearse_compiled
from penstock.engine.report import Progress, RunReport, Traffic
from penstock.engine.request import Prompt, Request, ScoreRequest, is_whole, requests_of, score_requests_of
from penstock.engine.results import completion_of, score_of
from penstock.engine.sampler import Sampler
from penstock.engine.sampling_params import SamplingParams
from penstock.engine.scheduler import Scheduler
from penstock.engine.sequence import Sequence
from penstock.engine.startup import StartUp
from penstock.engine.warm_up import warm_up, warm_up_packed
from penstock.errors import (
    BudgetError,
    ClosedError,
    MissingFileError,
    PenstockError,
    RequestError,
)
from penstock.io.checkpoint import Checkpoint
from penstock.io.limits import peak_memory
from penstock.io.reserve import check_reserve, choose_directory
from penstock.io.settings import ReadSettings
from penstock.offload.blocks import KVCost
from penstock.offload.buffers import check_decoders
from penstock.offload.codec import CodecName, PackOptions
from penstock.offload.cost import Machine
from penstock.offload.disk_kv import DiskRoom
from penstock.offload.graphs import CudaGraphs
from penstock.offload.groups import open_kv
from penstock.offload.hardware import HardwareProfile
from penstock.offload.homes import KVHomes
from penstock.offload.kv_dtype import check_kv_dtype
from penstock.offload.peaks import Peaks
from penstock.offload.plan import SCORE_NBYTES, ModelShape, PassLimits, make_plan
from penstock.offload.stream import WeightStream
from penstock.offload.tiers import MemoryTiers
from penstock.offload.trace import Trace

__all__ = ["LLM", "Prompt"]

R = TypeVar("R", Request, ScoreRequest)
T = TypeVar("T")

DEFAULT_MODEL = Path(__file__).parents[1] / "data" / "tiny-python"
"""The bundled model."""

logger = logging.getLogger("penstock.engine")

SAMPLER_ROWS = {"cpu": 1, "cuda": 8}


class LLM:
    """A Hugging Face causal language model that runs within a memory budget, one layer at a time.

    `model` is a directory with `config.json` and safetensors files, read in place; the bundled model when left out.
    `tiers` bounds device and host memory; what does not fit stays on disk and is read again in every pass. `dtype` is
    "auto" (the checkpoint's) or a torch dtype's name. Keys and values rest as `kv_dtype`: "auto" (as they come),
    "bf16", or quantised: "fp8", "int8", "int4". With "fp8" as `activation_dtype`, what goes into linear layers whose
    weights are packed is quantised, too, and the products are those of e4m3 numbers. `micro_batch_tokens`,
    `pass_tokens` and `device_layers` replace the defaults of `PassLimits`. `io` says how the disk is read. `compile`
    compiles each kind of layer at start-up, or leaves all eager; "auto" compiles where that pays. A `checkpoint` that
    is given stands for the directory's own weights. With a `codec`, layers are coded as they are loaded, as `penstock
    pack` would do it, rest so in host RAM and travel so; none is left on NVMe. What moves and computes when goes into a
    `trace` that is given. The plan is the best for requests of the lengths that it `expects` on this `hardware`, by
    `objective`: the whole run soonest ("throughput"), or a request soonest on average ("latency"); without either, the
    usual one. With `tiers="auto"` the budgets are most of what is free, and the machine is what `penstock profile` has
    kept in ~/.cache, if it has. Code that is compiled for attention in host RAM is kept in `kernel_directory`, where
    given. Keys and values on NVMe are in a file without a name, in the directory `kv_scratch`: else in the model's, or
    /var/tmp where that cannot be. A context manager; `close` gives all memory back.

    Raises CheckpointError and ModelError for a model that cannot be read or run, and BudgetError for one that does not
    fit, saying what would be enough; TargetError and NoSpaceError for a disk that cannot have keys and values. Nothing
    else is written anywhere but what the compilers of torch and Triton cache.
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        *,
        tiers: MemoryTiers | Literal["auto"] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        micro_batch_tokens: int | None = None,
        pass_tokens: int | None = None,
        device_layers: int | None = None,
        io: ReadSettings | None = None,
        kv_dtype: str = "auto",
        activation_dtype: str = "auto",
        compile: bool | Literal["auto"] = "auto",  # noqa: A002 - torch's own word for it
        on_load: Callable[[int, int], None] | None = None,
        checkpoint: Checkpoint | None = None,
        codec: CodecName | PackOptions | None = None,
        trace: Trace | None = None,
        hardware: HardwareProfile | Peaks | Machine | None = None,
        expects: Items[Length] = (),
        objective: Objective = "throughput",
        kernel_directory: Path | None = None,
        kv_scratch: str | PathLike[str] | None = None,
    ) -> None:
        self.path = DEFAULT_MODEL if model is None else Path(model)
        self._device = find_device(device)
        self._io = io or ReadSettings()
        self._kv_dtype, in_fp8 = check_kv_dtype(kv_dtype), check_activation_dtype(activation_dtype, self._device)
        self._closed = False
        self._generation: Generation | None = None
        asked = {"micro_batch_tokens": micro_batch_tokens, "pass_tokens": pass_tokens, "device_layers": device_layers}
        fixed = {name: value for name, value in asked.items() if value is not None}
        limits = limits_of(self._device, fixed)
        budgets = MemoryTiers() if tiers is None or tiers == "auto" else tiers
        self._kv_scratch = _find_scratch(self.path, budgets.kv_nvme, kv_scratch)
        self._start_up = StartUp()
        checkpoint = checkpoint or Checkpoint.open(self.path)
        code = self._code_on_load(codec)
        self._model = load_model(self.path, checkpoint, dtype=dtype, device=str(self._device), code=code, in_fp8=in_fp8)
        check_decoders((self._model.resident, *self._model.layer_layouts), self._device)
        self.tokenizer = _find_tokenizer(self.path)
        self._end_ids = end_token_ids(self.path, self._model.config, self.tokenizer)
        self._prepare = Preparer(
            self.path,
            tokenizer=self.tokenizer,
            vocab_size=self._model.vocab_size,
            context_length=self._model.context_length,
        )
        self._start_up.end("model")
        self._compiler = LayerCompiler(self._model.layers)
        self._executor = Executor(self._model.layers)
        known = resolve(
            budgets, self._device, staging_nbytes=self._io.staging_nbytes, pretended=checkpoint.shares_bytes
        )
        check_rehearsal_fits(self._model, self._device)
        self._sampler = Sampler(vocab_size=self._model.vocab_size, num_rows=SAMPLER_ROWS[self._device.type])
        self._shape = self._rehearse(known, limits, compile)
        if tiers == "auto":
            hardware, expects = hardware or kept_profile(), expects or USUAL_WORK
        self._known_machine = machine = rates_of(hardware, self._model, self.path) if hardware else None
        if machine and expects:
            options: dict[str, Any] = {"tiers": known, "limits": limits, "kernel_directory": kernel_directory}
            machine = measured(machine, self._model, self._executor, self._shape, **options)
            self._known_machine = machine
        self._forget_rehearsals()
        self.plan, self._forecast, self._why = plan_run(
            self._shape,
            known,
            limits,
            machine=machine,
            flops=count_flops(self._model) if machine else None,
            expects=expects,
            fixed=fixed,
            splits_prompts=self._model.splits_prompts,
            objective=objective,
        )
        for name, what in (("micro_batch_tokens", "micro-batches"), ("pass_tokens", "passes")):
            fits = getattr(self.plan, name)
            if fits < fixed.get(name, 0):
                logger.warning("%s of %d tokens do not fit the budget, %d do", what, fixed[name], fits)
        if budgets.kv_nvme and not self.plan.kv_nvme_nbytes:
            logger.warning("this model keeps no keys and values, so none are put on NVMe")
        with ExitStack() as cleanup:
            self._open(checkpoint, kernel_directory, trace, cleanup)
            self._start_up.end("memory")
            cleanup.callback(self._model.unbind)
            self._bind()
            self._load(on_load)
            self._exit = cleanup.pop_all()
        self._load_bytes = self._weights.statistics().disk.bytes_read
        self.last_run: RunReport | None = None

    def _code_on_load(self, codec: CodecName | PackOptions | None) -> CodeOnLoad | None:
        """Return what codes weights on load. Raises ConfigError for options or a checkpoint that do not suit it."""
        options = PackOptions(codec) if isinstance(codec, str) else codec
        self._codec = None if options is None else options.resolved()
        if self._codec is None:
            return None
        check_plain(self.path)
        return CodeOnLoad(self._codec, self._device, self._io)

    def _rehearse(self, known: MemoryTiers, limits: PassLimits, wanted: bool | Literal["auto"]) -> ModelShape:
        """Learn what the model costs, and have all code for it that is compiled at some time."""
        shape = rehearse(self._model, self._executor, sampler_nbytes=self._sampler.nbytes, kv_dtype=self._kv_dtype)
        self._start_up.end("rehearsal")
        shape = self._compile(shape, known, limits, wanted)
        if self._device.type == "cuda":
            warm_up(self._model, self._executor, kv_dtype=self._kv_dtype)
            self._start_up.end("kernels")
        return shape

    def _compile(
        self, shape: ModelShape, known: MemoryTiers, limits: PassLimits, wanted: bool | Literal["auto"]
    ) -> ModelShape:
        """Compile the layers for the micro-batches that they will have; return what the model costs then."""
        reason = why_not_compile(self._device) if wanted == "auto" else None if wanted else "it was not wanted"
        self._compiles = reason is None
        if reason is not None:
            self._compiler.leave_eager(reason)
            return shape
        num_tokens = make_plan(shape, known, limits).micro_batch_tokens
        compiled = rehearse_compiled(self._model, self._executor, self._compiler, shape, num_tokens=num_tokens)
        self._start_up.end("compilers")
        try:
            make_plan(compiled, known, limits)
        except BudgetError:
            self._compiler.leave_eager("compiled code needs more workspace than the budget leaves")
            return shape
        return compiled

    def _forget_rehearsals(self) -> None:
        """Give back what they have taken, before what the plan says is taken."""
        self._model.unbind()
        if self._compiles:
            gc.collect()  # compilers leave cycles behind, which hold keys and values
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def foresee(self, machine: Machine, lengths: Iterable[Length]) -> Forecast | None:
        """Return what a run over requests of these lengths will take under the plan; None for a model without a count.

        Raises ProfileError for a rate that is not known, BudgetError for a request that can never run.
        """
        flops = count_flops(self._model)
        if flops is None:
            return None
        if known := self.machine:  # this model's layers have been measured
            machine = replace(
                machine,
                call_seconds=machine.call_seconds or known.call_seconds,
                layer_times=machine.layer_times or known.layer_times,
                attention=machine.attention or known.attention,
            )
        return forecast(
            self.plan, machine, flops, lengths, cost=self._kv_cost, splits_prompts=self._model.splits_prompts
        )

    @property
    def _kv_cost(self) -> KVCost:
        return self._shape.kv_cost

    def _open(
        self, checkpoint: Checkpoint, kernel_directory: Path | None, trace: Trace | None, cleanup: ExitStack
    ) -> None:
        """Take all memory that the plan says."""
        on_cpu = self.plan.device_nbytes if self._device.type == "cpu" else 0
        self._planned_nbytes = psutil.Process().memory_info().rss + on_cpu + self.plan.kv_host_nbytes
        self._planned_nbytes += self.plan.kv_landing_nbytes
        options: dict[str, Any] = {"cost": self._kv_cost, "device": self._device, "kv_dtype": self._kv_dtype}
        windows = {layer.layer: layer.window for layer in self._shape.kv_windows}
        self._kv = open_kv(limit_nbytes=self.plan.kv_nbytes, windows=windows, **options)
        options |= {"host_nbytes": self.plan.kv_host_nbytes, "kernel_directory": kernel_directory, "trace": trace}
        if self.plan.kv_nvme_nbytes:
            sizes = self.plan.kv_nvme_nbytes, self.plan.kv_landing_nbytes
            options["nvme"] = DiskRoom(*sizes, directory=self._kv_scratch, settings=self._io)
        self._homes = cleanup.enter_context(KVHomes(self._kv, **options))
        self._weights = cleanup.enter_context(
            WeightStream(
                self.plan,
                checkpoint=checkpoint,
                resident=self._model.resident,
                layers=self._model.layer_layouts,
                device=self._device,
                settings=self._io,
                trace=trace,
                checks=self._model.checks,
            )
        )
        self._planned_nbytes += self._weights.host_nbytes
        self._executor.parked_tokens = self.plan.micro_batch_tokens
        self._executor.runs_ahead = self.plan.runs_ahead
        on_gpu = self._device.type != "cpu"
        self._split_tokens = self.plan.split_tokens(self.kv_token_nbytes) if on_gpu else None
        self._executor.traced = self._weights.traced if trace else None
        self._recorder: PassRecorder | None = None
        if self._compiles and self._device.type == "cuda" and trace is None:
            self._recorder = PassRecorder(self._model, self._executor, self.plan, record=CudaGraphs(self._device))

    def _bind(self) -> None:
        self._model.bind_resident(self._weights.resident)
        for index in range(len(self._model.layers)):
            self._model.bind_layer(index, self._weights.buffer_of(index), self._weights.packed_of(index))
        self._model.check_bound()
        self._executor.weights = self._weights

    def _load(self, on_load: Callable[[int, int], None] | None) -> None:
        """Fill the tiers, and have loaded what computes with them as they rest."""
        self._weights.load(on_load)
        self._start_up.end("weights")
        if self.plan.packed_tokens:
            warm_up_packed(self._model, self.plan.packed_tokens)
            self._start_up.end("kernels")

    @property
    def model(self) -> StreamedModel:
        """The model as it is streamed: its config, its layouts, its vocabulary."""
        return self._model

    @property
    def machine(self) -> Machine | None:
        """The rates that runs are forecast with; None where no profile of this machine is known."""
        return self._known_machine

    def outlook(self) -> str:
        """Say in one line where the weights are, and what is forecast or why nothing is."""
        foreseen = f"{self._forecast.explain()}; " if self._forecast else ""
        return f"{self.plan.summary()}; {foreseen}{self._why}"

    @property
    def kv_token_nbytes(self) -> int:
        """Bytes that a token's keys and values take in all layers together."""
        return self._shape.kv_token_nbytes

    def sequences_at_once(self, num_tokens: int) -> int:
        """Return how many sequences of so many tokens, prompt and completion, have room at the same time.

        For between runs: it tries.
        """
        return self._homes.at_once(num_tokens)

    @property
    def context_length(self) -> int | None:
        """The most tokens that a prompt and its completion may have together, where the model has a limit."""
        return self._model.context_length

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt | Request],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        on_pass: Callable[[Progress], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts and return the results in their order.

        `sampling_params` is one for all prompts or one for each. Raises RequestError for a bad prompt and BudgetError
        for one whose keys and values can never fit: for a list or tuple of prompts before anything runs, for any other
        iterable when its turn comes.
        """
        outputs = list(self.stream(prompts, sampling_params, on_pass=on_pass))
        return sorted(outputs, key=lambda output: int(output.request_id))

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt | Request],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        on_pass: Callable[[Progress], None] | None = None,
        on_error: Callable[[Request, PenstockError], None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete prompts and yield each result as soon as it has finished; arguments and errors as in `generate`.

        An iterable that is no list or tuple is read one prompt at a time, when there is room for it, so it may be
        longer than memory. It may yield `Request`s, which bring parameters and numbers of their own. A request that
        cannot run goes to `on_error`, where given, and is left out. `on_pass` is called after each pass, when its
        results have been taken. One run at a time: raises RequestError while another stream of this model is open.
        """
        requests = requests_of(prompts, sampling_params)
        return self._start(requests, completion_of, on_pass, on_error, whole=is_whole(prompts))

    def score(
        self,
        prompts: Prompt | Iterable[Prompt | ScoreRequest],
        continuations: Iterable[str | Items[int]] | None = None,
        *,
        on_pass: Callable[[Progress], None] | None = None,
    ) -> list[ScoreOutput]:
        """Return the log-likelihoods of continuations of prompts, or of whole texts, in order; nothing is generated.

        With `continuations`, one for each prompt and of its kind, their tokens are scored: text is tokenised together
        with its prompt. Without, all of a text but its first token. Errors as in `generate`.
        """
        outputs = list(self.stream_scores(prompts, continuations, on_pass=on_pass))
        return sorted(outputs, key=lambda output: int(output.request_id))

    def stream_scores(
        self,
        prompts: Prompt | Iterable[Prompt | ScoreRequest],
        continuations: Iterable[str | Items[int]] | None = None,
        *,
        on_pass: Callable[[Progress], None] | None = None,
        on_error: Callable[[ScoreRequest, PenstockError], None] | None = None,
    ) -> Iterator[ScoreOutput]:
        """Score as `score` does and yield each result when it is known; read and report as `stream` does."""
        requests = score_requests_of(prompts, continuations)
        return self._start(requests, score_of, on_pass, on_error, whole=is_whole(prompts))

    def _start(
        self,
        requests: Iterator[R],
        result_of: Callable[[Sequence, Any], T],
        on_pass: Callable[[Progress], None] | None,
        on_error: Callable[[R, PenstockError], None] | None,
        *,
        whole: bool,
    ) -> Iterator[T]:
        if self._closed:
            raise ClosedError("the model is closed")
        if self._generation is not None:
            raise RequestError("another run of this model is going on", fix="Finish or close its stream first.")
        scheduler = Scheduler(
            self._homes,
            micro_batch_tokens=self.plan.micro_batch_tokens,
            pass_tokens=self.plan.pass_tokens,
            splits_prompts=self._model.splits_prompts,
            split_tokens=self._split_tokens,
        )
        sequences = self._prepared(requests, scheduler, on_error)
        before = self._traffic()
        generation = Generation(
            list(sequences) if whole else sequences,
            model=self._model,
            executor=self._executor,
            homes=self._homes,
            scheduler=scheduler,
            sampler=self._sampler,
            tokenizer=self.tokenizer,
            end_ids=self._end_ids,
            max_scores=self.plan.max_scores,
            score_rows=self._score_rows(),
            packed_tokens=self.plan.packed_tokens,
            read_packed=self._weights.read_packed,
            recorder=self._recorder,
            on_pass=on_pass,
            traffic=lambda: self._traffic() - before,
        )
        return self._run(generation, before, result_of)

    def _traffic(self) -> Traffic:
        return Traffic.of(self._weights.statistics(), self._homes.statistics())

    def _prepared(
        self, requests: Iterator[R], scheduler: Scheduler, on_error: Callable[[R, PenstockError], None] | None
    ) -> Iterator[Sequence]:
        for request in requests:
            try:
                sequence = self._prepare(request)
                scheduler.check(sequence)
            except (RequestError, BudgetError) as error:
                if on_error is None:
                    raise
                on_error(request, error)
            else:
                yield sequence

    def _score_rows(self) -> int:
        """How many rows of logits fit where a micro-batch's activations were, which are gone when its head runs."""
        room = self._sampler.nbytes + self._shape.workspace_nbytes * self.plan.micro_batch_tokens
        room += SCORE_NBYTES * self.plan.max_scores
        return max(1, min(room // (LOGIT_NBYTES * self._model.vocab_size), self.plan.micro_batch_tokens))

    def _run(self, generation: Generation, before: Traffic, result_of: Callable[[Sequence, Any], T]) -> Iterator[T]:
        start = time.perf_counter()
        if self._generation is not None:
            raise RequestError("another run of this model is going on", fix="Finish or close its stream first.")
        self._generation = generation
        try:
            with closing(generation.run()) as finished:
                for sequence in finished:
                    seconds = time.perf_counter() - start
                    self._report(generation, seconds, self._traffic() - before)
                    yield result_of(sequence, self.tokenizer)
                    if self._closed:
                        raise ClosedError("the model was closed during a run")
            self._report(generation, time.perf_counter() - start, self._traffic() - before)
        finally:
            self._generation = None

    def chat(
        self,
        conversations: Items[Mapping[str, str]] | Items[Items[Mapping[str, str]]],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete conversations of {"role", "content"} messages through the tokenizer's chat template."""
        several = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        return self.generate([self.template(messages) for messages in several], sampling_params)

    def template(self, messages: Any) -> dict[str, Any]:
        """Return the prompt that the tokenizer's chat template makes of {"role", "content"} messages."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("this model has no chat template", file=self.path, fix="Use plain prompts.")
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise RequestError(f"the chat template refuses these messages: {error}", got=repr(messages)[:80]) from error
        return {"prompt_token_ids": ids}

    def _report(self, generation: Generation, seconds: float, traffic: Traffic) -> None:
        self.last_run = RunReport(
            num_requests=generation.num_requests,
            num_passes=generation.num_passes,
            recorded_passes=generation.num_recorded,
            prompt_tokens=generation.prompt_tokens,
            generated_tokens=generation.generated_tokens,
            seconds=seconds,
            start_up=self._start_up,
            first_token_seconds=generation.first_token_seconds,
            load_bytes=self._load_bytes,
            peak_sequences=generation.peak_sequences,
            peak_hosted=generation.peak_hosted,
            peak_on_nvme=generation.peak_on_nvme,
            num_preemptions=generation.num_preemptions,
            recomputed_tokens=generation.recomputed_tokens,
            planned_process_nbytes=self._planned_nbytes,
            peak_process_nbytes=peak_memory(),
            peak_device_nbytes=torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0,
            model_nbytes=self._shape.nbytes,
            traffic=traffic,
            plan=self.plan,
            device=str(self._device),
            dtype=str(self._model.dtype).removeprefix("torch."),
            reader=self._weights.reader_choice.as_dict()
            | {"block_bytes": self._io.block_nbytes, "in_flight_bytes": self._io.in_flight_nbytes},
            compilation=self._compiler.report(),
            codec=None if self._codec is None else self._codec.codec,
            activation_dtype="fp8" if self._model.in_fp8 else "auto",
            product_dtype=self._model.product_dtype,
            forecast=self._forecast,
        )

    def settle(self) -> None:
        """Block until the layers that were fetched for a next pass are there, and the links are idle."""
        self._weights.settle()

    def close(self) -> None:
        """Give back all memory, descriptors and threads; later calls raise ClosedError."""
        if not self._closed:
            self._closed = True
            self._recorder = None
            self._exit.close()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find_scratch(model: Path, nbytes: int, asked: str | PathLike[str] | None) -> Path:
    """Return where keys and values on NVMe go, of which nothing is made if there are none. Raises TargetError."""
    if not nbytes:
        return model
    directory = choose_directory(model, nbytes) if asked is None else Path(asked)
    check_reserve(directory, nbytes)
    return directory


def _find_tokenizer(path: Path) -> Any | None:
    """Return the model's tokenizer, or None: token ids alone can be completed without one."""
    try:
        return load_tokenizer(path)
    except MissingFileError as error:
        logger.info("%s", error)
        return None
