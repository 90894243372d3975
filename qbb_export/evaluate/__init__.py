"""Compare models on a text: perplexity and KL of language models, embeddings of encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qbb_export.errors import QbbError
from qbb_export.evaluate.metrics import cosine, kl_and_nll, mean_interval, token_nll
from qbb_export.evaluate.results import (
    EncoderResult,
    LanguageResult,
    ModelSize,
    WindowFigures,
    encoder_result,
    language_result,
)
from qbb_export.evaluate.runners import Array, Ids, Runner, open_runner
from qbb_export.evaluate.sizes import bits_per_weight, file_bytes
from qbb_export.evaluate.text import encode_alike, given_tokenizer, sentence_ids, windows
from qbb_export.generation.folder import onnx_file
from qbb_export.tokens import read_text

__all__ = ["EncoderResult", "LanguageResult", "evaluate", "kl_and_nll", "mean_interval", "perplexity", "token_nll"]

# Called with (runs of a model on a window or sentence that are done, runs in all).
OnStep = Callable[[int, int], None]


def evaluate(
    models: Sequence[str | Path],
    text: Path,
    *,
    reference: str | Path | None = None,
    window: int = 1024,
    max_windows: int | None = None,
    tokenizer: Path | None = None,
    library: bool = True,
    mode: str | None = None,
    device: str = "cpu",
    chunk: int | None = None,
    on_step: OnStep | None = None,
) -> list[LanguageResult] | list[EncoderResult]:
    """Run models on a text, all of them on one window before the next, so that no logits are kept.

    Causal language models see non-overlapping windows of the text; the first token of a window is context only.
    Encoders see one sentence a line, with special tokens; the embedding is the mean over tokens.

    Args:
        models: .onnx files, folders of decoders, Hugging Face folders or hub ids, all of one kind.
        text: UTF-8 file.
        reference: the model to compare with, as a rule the float one; encoders need it.
        window: tokens per window, or per sentence at most.
        max_windows: stop after so many windows or sentences.
        tokenizer: a tokenizer.json; default: the one of the models, which must all read the text as the same tokens.
        library: for .onnx files; False runs the function body instead of our kernel.
        mode: for .onnx files: of our kernels, see ``format.MODES``; None: as the file says.
        device: for the others: where PyTorch runs them.
        chunk: for folders of decoders: tokens of a run, which finds those before them in the cache; None: a window.
        on_step: told the progress.

    Returns:
        One entry a model, the reference first if there is one.

    Raises:
        QbbError: a missing or unreadable file, models of different kinds or vocabularies, no tokenizer, a text below
            one window, or logits that are not finite.
    """
    if window < 2:
        raise QbbError("window is too short", where="--window", expected=">= 2", got=window)
    if max_windows is not None and max_windows < 1:
        raise QbbError("too few windows", where="--windows", expected=">= 1", got=max_windows)
    if chunk is not None and chunk < 1:
        raise QbbError("too few tokens a run", where="--chunk", expected=">= 1", got=chunk)
    content = read_text(text)  # what can be refused early is refused before a model is opened
    chosen = None if tokenizer is None else given_tokenizer(tokenizer)
    sources = [*models] if reference is None else [reference, *models]
    runners = _open(sources, library, mode, device, chunk)
    if reference is None and not runners[0].language_model:
        what = "not a language model, and encoders are compared with a reference"
        raise QbbError(what, where=sources[0], expected="an output logits, or --reference MODEL")
    tokenizers = (
        [runner.tokenizer for runner in runners if runner.tokenizer is not None] if chosen is None else [chosen]
    )
    if not tokenizers:
        expected = "a tokenizer.json in the folder or beside the file, or --tokenizer FILE"
        raise QbbError("no tokenizer", where=sources[0], expected=expected)
    sizes = [_size(source) for source in sources]
    tell = on_step or (lambda done, total: None)
    if runners[0].language_model:
        ids = encode_alike(tokenizers, lambda file: windows(content, file, window))[:max_windows]
        return _language_models(runners, sizes, ids, reference is not None, tell)
    sentences = [line for line in map(str.strip, content.splitlines()) if line][:max_windows]
    if not sentences:
        raise QbbError("no sentences", where=text, expected="one sentence a line")
    ids = encode_alike(tokenizers, lambda file: sentence_ids(sentences, file, window))
    return _encoders(runners, sizes, ids, sentences, tell)


def _open(
    sources: Sequence[str | Path], library: bool, mode: str | None, device: str, chunk: int | None
) -> list[Runner]:
    """All models, which are of one kind."""
    runners: list[Runner] = []
    for source in sources:
        runners.append(open_runner(source, library=library, mode=mode, device=device, chunk=chunk))
        first, last = runners[0], runners[-1]
        if first.language_model != last.language_model:
            expected = f"{_kind(first)} like {first.source}"
            raise QbbError("models of different kinds", where=source, expected=expected, got=_kind(last))
    return runners


def _kind(runner: Runner) -> str:
    return "a language model (logits)" if runner.language_model else "an encoder (no logits)"


def _size(source: str | Path) -> ModelSize:
    path = onnx_file(source)
    size = file_bytes(path or Path(source))
    bits = None if path is None else bits_per_weight(path)
    return ModelSize(str(source), None if size is None else size / 1e6, bits)


def _language_models(
    runners: list[Runner], sizes: list[ModelSize], inputs: list[Ids], compare: bool, tell: OnStep
) -> list[LanguageResult]:
    figures = [WindowFigures([], [], []) for _ in runners]
    for number, ids in enumerate(inputs):
        reference: Array | None = None
        for place, (runner, into) in enumerate(zip(runners, figures, strict=True)):
            logits = runner.logits(ids)
            try:
                if reference is None:  # the first model of a window, or all of them where nothing is compared
                    _append(into, token_nll(logits, ids[0]), np.zeros(1), np.ones(1))
                    reference = logits if compare else None
                else:
                    compared = kl_and_nll(reference, logits, ids[0])
                    _append(into, compared.nll, compared.kl, compared.agrees)
            except QbbError as error:
                raise QbbError(str(error), where=runner.source) from None
            tell(number * len(runners) + place + 1, len(inputs) * len(runners))
    return [
        language_result(size, found, figures[0] if compare else None, inputs[0].size - 1)
        for size, found in zip(sizes, figures, strict=True)
    ]


def _append(into: WindowFigures, nll: Array, kl: Array, agrees: Array) -> None:
    means = float(nll.mean()), float(kl.mean()), float(agrees.mean())
    if not np.isfinite(means).all():
        got = f"{means[0]} nats per token, KL {means[1]}, in window {len(into.nll) + 1}"
        raise QbbError("logits hold NaN or Inf", got=got)
    for values, mean in zip((into.nll, into.kl, into.agreement), means, strict=True):
        values.append(mean)


def _encoders(
    runners: list[Runner], sizes: list[ModelSize], inputs: list[Ids], sentences: list[str], tell: OnStep
) -> list[EncoderResult]:
    cosines: list[list[float]] = [[] for _ in runners]
    for number, ids in enumerate(inputs):
        reference = runners[0].embedding(ids)
        for place, (runner, into) in enumerate(zip(runners, cosines, strict=True)):
            try:
                into.append(cosine(reference, runner.embedding(ids) if place else reference))
            except QbbError as error:
                raise QbbError(str(error), where=f"{runner.source}, sentence {number + 1}") from None
            tell(number * len(runners) + place + 1, len(inputs) * len(runners))
    return [encoder_result(size, found, sentences) for size, found in zip(sizes, cosines, strict=True)]


def perplexity(
    model: Path,
    text: Path,
    *,
    window: int = 1024,
    tokenizer: Path | None = None,
    library: bool = True,
    max_windows: int | None = None,
    on_window: OnStep | None = None,
) -> LanguageResult:
    """:func:`evaluate` for one language model.

    Raises:
        QbbError: as there, and for an encoder.
    """
    (result,) = evaluate(
        [model],
        text,
        window=window,
        max_windows=max_windows,
        tokenizer=tokenizer,
        library=library,
        on_step=on_window,
    )
    assert isinstance(result, LanguageResult)  # an encoder needs a reference
    return result
