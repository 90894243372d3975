"""Token by token in onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qbb_export.errors import QbbError
from qbb_export.runtimes.sampling import Sampling


def open_folder(folder: Path, session: dict[str, Any], cuda: dict[str, str] | None = None) -> Any:
    """``onnxruntime_genai.Model`` of a folder, with options of session and CUDA provider added to its configuration."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    for name, value in (cuda or {}).items():
        config.set_provider_option("cuda", name, value)
    return genai.Model(config)


def tokens(
    folder: Path,
    prompt: list[int],
    limit: int,
    sampling: Sampling,
    session: dict[str, Any],
    on_open: Callable[[], None],
) -> Iterator[int]:
    """Open a folder and write.

    Args:
        folder: with ``genai_config.json``.
        prompt: token ids.
        limit: length of prompt and answer together.
        sampling: how to choose tokens.
        session: session options to add to those of the configuration.
        on_open: called when the model is open.

    Yields:
        New tokens; the one that ends the text is the last.

    Raises:
        QbbError: onnxruntime-genai is not installed, or it cannot open or run the folder.
    """
    try:
        import onnxruntime_genai as genai
    except ImportError:
        expected = "pip install 'qbb-export[genai]', or --runtime ort"
        raise QbbError("onnxruntime-genai is not installed", where="--runtime genai", expected=expected) from None
    try:
        model = open_folder(folder, session)
        on_open()
        params = genai.GeneratorParams(model)
        options = {"max_length": limit, "do_sample": not sampling.greedy, "repetition_penalty": sampling.penalty}
        if not sampling.greedy:
            options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            options |= {"random_seed": sampling.seed} if sampling.seed is not None else {}
        params.set_search_options(**options)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])
    except (RuntimeError, ValueError, TypeError) as error:  # what it throws has no type of its own
        raise QbbError("onnxruntime-genai cannot run the folder", where=folder, got=error) from error
