"""Text from a folder: prompt in, pieces of text out, with the times that people compare."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qbb_export.errors import QbbError
from qbb_export.format import MODES, mode_number
from qbb_export.generation.folder import TOKENIZER, foreign_code, read_config
from qbb_export.runtimes import gate, genai, ort
from qbb_export.runtimes.decoder import Decoder
from qbb_export.runtimes.sampling import Sampler, Sampling
from qbb_export.tokens import open_tokenizer


@dataclass(frozen=True)
class RunOptions:
    """How to write.

    Args:
        max_tokens: new tokens at most.
        sampling: how to choose them.
        runtime: ``"genai"``, ``"ort"`` (plain ONNX Runtime), or None: onnxruntime-genai where it is installed and the
            folder makes it load no code but a copy of our library.
        trust: let onnxruntime-genai load whatever the folder names.
        mode: of our kernels, see ``format.MODES``; None: as the file says.
        threads: of ONNX Runtime; None: its own choice.
    """

    max_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    runtime: str | None = None
    trust: bool = False
    mode: str | None = None
    threads: int | None = None


@dataclass
class Times:
    """Of one answer; filled while it is written.

    Attributes:
        prompt_tokens: in the prompt.
        new_tokens: written.
        load: seconds to open the folder.
        first: seconds from the prompt to the first token.
        rest: seconds for all other tokens.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    load: float = 0.0
    first: float = 0.0
    rest: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token left out."""
        return (self.new_tokens - 1) / self.rest if self.rest > 0 else 0.0


def generate(folder: Path, prompt: str, options: RunOptions, times: Times | None = None) -> Iterator[str]:
    """Continue a prompt.

    Args:
        folder: that ``qbb-export -o DIR`` wrote.
        prompt: text, as it is; special tokens as the tokenizer adds them.
        options: how to write.
        times: filled on the way.

    Yields:
        Pieces of text as soon as they are whole characters.

    Raises:
        QbbError: the folder is not complete, the prompt is empty or too long, or the runtime cannot run it.
    """
    times = Times() if times is None else times
    config = read_config(folder)
    model = config["model"]
    tokenizer = open_tokenizer(folder / TOKENIZER)
    ids = list(tokenizer.encode(prompt).ids) or [i for i in (model.get("bos_token_id"),) if isinstance(i, int)]
    room = int(model["context_length"]) - len(ids)
    if not ids:
        raise QbbError("prompt is empty", where="--prompt", expected="some text")
    if room < 1 or options.max_tokens < 1:
        where, got = ("--prompt", len(ids)) if room < 1 else ("--max-tokens", options.max_tokens)
        expected = f"< {model['context_length']} tokens" if room < 1 else ">= 1"
        raise QbbError("no room for an answer", where=where, expected=expected, got=got)
    limit = len(ids) + min(room, options.max_tokens)
    ends = model["eos_token_id"]
    ends = set(ends) if isinstance(ends, list) else {ends}
    if _runtime(folder, config, options) == "genai":
        written = _genai_tokens(folder, ids, limit, options, times)
    else:
        written = _ort_tokens(folder, model["decoder"], ids, limit, options, times)
    return _text(written, tokenizer, ends, times, len(ids))


def _runtime(folder: Path, config: Mapping[str, Any], options: RunOptions) -> str:
    """The runtime to use, after the gate where it is not plain ONNX Runtime, whose sessions have it themselves."""
    if options.runtime == "ort" or (options.runtime is None and not importlib.util.find_spec("onnxruntime_genai")):
        return "ort"
    foreign = None if options.trust else foreign_code(folder, config)
    if foreign is not None and options.runtime is None:
        return "ort"
    if foreign is not None:
        expected = "--runtime ort, or --trust if you trust whoever made it"
        raise QbbError("opening this folder would run code from it", where=folder, expected=expected, got=foreign)
    gate.check(folder / config["model"]["decoder"]["filename"])
    return "genai"


def _text(tokens: Iterator[int], tokenizer: Any, ends: set[int], times: Times, prompt_tokens: int) -> Iterator[str]:
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    times.prompt_tokens = prompt_tokens
    start = time.perf_counter()
    for token in tokens:
        now = time.perf_counter()
        if times.new_tokens == 0:
            times.first, start = now - start - times.load, now
        times.new_tokens += 1
        times.rest = now - start if times.new_tokens > 1 else 0.0
        if token in ends:
            return
        piece = stream.step(tokenizer, token)
        if piece:
            yield piece


def _genai_tokens(folder: Path, ids: list[int], limit: int, options: RunOptions, times: Times) -> Iterator[int]:
    session: dict[str, Any] = {} if options.threads is None else {"intra_op_num_threads": options.threads}
    if options.mode is not None:
        session["qbb.mode"] = MODES[mode_number(options.mode)]

    start = time.perf_counter()

    def opened() -> None:
        times.load = time.perf_counter() - start

    return genai.tokens(folder, ids, limit, options.sampling, session, opened)


def _ort_tokens(
    folder: Path, decoder: Mapping[str, Any], ids: list[int], limit: int, options: RunOptions, times: Times
) -> Iterator[int]:
    start = time.perf_counter()
    library = "custom_ops_library" in decoder["session_options"]
    session = ort.session(folder / decoder["filename"], library=library, mode=options.mode, threads=options.threads)
    decoding, sampler, tokens = Decoder(session, limit), Sampler(options.sampling), list(ids)
    times.load = time.perf_counter() - start
    logits = decoding.step(np.asarray([ids], dtype=np.int64))
    while True:
        tokens.append(sampler.choose(logits[0, -1], tokens))
        yield tokens[-1]
        if len(tokens) == limit:
            return
        logits = decoding.step(np.asarray([tokens[-1:]], dtype=np.int64))
