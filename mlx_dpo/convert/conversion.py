"""From SOURCE to a folder that mlx-lm opens, checked against its source before it gets its name."""

import json
import shutil
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_dpo import __version__
from mlx_dpo.convert import verify
from mlx_dpo.convert.events import Checks, Converted, Event, Phase
from mlx_dpo.convert.folder_source import FolderSource, open_folder
from mlx_dpo.convert.gguf_source import GgufSource, open_gguf
from mlx_dpo.convert.quantize import described
from mlx_dpo.convert.request import Dtype, Quantize, Request
from mlx_dpo.convert.sources import Source, located
from mlx_dpo.models.load import one_line
from mlx_dpo.models.weights import read_json, weight_files
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import refuse_occupied, sha256_of, whole_folder

_LIBRARIES = ("mlx", "mlx-lm", "transformers", "tokenizers", "gguf")


def convert(
    source: str, out: Path, *, quantize: Quantize = "keep", dtype: Dtype = "keep"
) -> Generator[Event, None, None]:
    """Convert `source` to an MLX model folder `out`, check it and describe it in manifest.json; ends with Converted.

    `source`: a recipe's name, a Hub id with an optional @revision, a folder, or a .gguf file. Raises Refusal, and
    leaves nothing behind, where the source cannot be read, the result differs from it, or `out` cannot be written.
    """
    request = Request(quantize, dtype)
    try:
        refuse_occupied(out)
        found: Source | None = None
        for event in located(source):
            if isinstance(event, Source):
                found = event
            else:
                yield event
        assert found is not None
        with whole_folder(out) as staging:
            yield from _converted(found, staging, out, request)
    except OSError as error:
        place = error.filename if error.filename and ".part-" not in str(error.filename) else out
        raise Refusal(
            f"{place}: {error.strerror or one_line(error)}: see that {source} can be read, and that there is room and "
            f"permission to write {out}."
        ) from error


def _converted(found: Source, staging: Path, out: Path, request: Request) -> Iterator[Event]:
    scratch = staging / ".source"
    yield Phase(f"Reading {found.path}")
    opened = open_gguf(found.path, scratch) if found.is_gguf else open_folder(found.path, scratch)
    try:
        yield from opened.write(staging, request)
    except RuntimeError as error:  # mlx raises it for every failure to write
        raise Refusal(f"{out} could not be written ({one_line(error)}): make room or choose another --out.") from error
    weight_files(staging)
    yield Phase("Comparing tokens and logits with the source")
    checks, quantisation = _checked(opened, staging, request, str(found.path))
    shutil.rmtree(scratch, ignore_errors=True)
    yield Phase("Hashing the source")
    licence = found.licence or opened.licence()
    manifest = _manifest(found, opened, request, checks) | {"licence": licence, "quantisation": quantisation}
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    yield Converted(out, checks, quantisation, licence)


def _checked(opened: FolderSource | GgufSource, staging: Path, request: Request, where: str) -> tuple[Checks, str]:
    result, tokenizer = verify.load_result(staging, where)
    peer, peer_name = opened.token_peer()
    texts = verify.same_tokens(peer, tokenizer, peer_name)
    quantisation = described(read_json(staging / "config.json"), result)
    layers, all_layers = verify.layers_that_fit(result)
    verify.keep_first_layers(result, layers)
    ids = _comparable_ids(tokenizer, result)
    figures = _figures(opened.model(layers), result, ids, request, where)
    checks = Checks(
        texts=texts,
        tokenizer_peer=peer_name,
        logits_peer=opened.logits_peer(),
        positions=len(ids),
        layers=layers,
        all_layers=all_layers,
        max_logit_difference=figures.largest_difference,
        mean_kl=figures.mean_kl,
        top_token_agreement=figures.agreement,
        tolerance=None if request.bits else verify.TOLERANCE,
    )
    return checks, quantisation


def _comparable_ids(tokenizer: TokenizerWrapper, result: Module) -> list[int]:
    ids = verify.passage_ids(tokenizer)
    size = verify.vocabulary_size(result)
    if not ids or (size and max(ids) >= size):
        raise Refusal(
            f"The tokenizer gives ids up to {max(ids, default=0)}, and the model knows {size}: give a source whose "
            "tokenizer and model belong together."
        )
    return ids


def _figures(source: Module, result: Module, ids: list[int], request: Request, where: str) -> verify.Figures:
    """The difference from the source as it is; what rounding to the result's types does not explain is refused."""
    as_it_is = verify.logits(source, ids, where)
    exact = as_it_is
    if request.bits is None and verify.round_as(source, result):
        exact = verify.logits(source, ids, where)
    del source
    mx.clear_cache()
    converted = verify.logits(verify.in_float32(result), ids, where)
    if request.bits is None:
        own = verify.figures(exact, converted, where)
        if own.relative > verify.TOLERANCE:
            raise Refusal(
                f"The converted model's logits differ from those of {where} by {own.largest_difference:.3g} "
                f"({own.relative:.1%} of the largest): this model is not converted rightly here, and nothing is left."
            )
    return verify.figures(as_it_is, converted, where)


def _manifest(found: Source, opened: FolderSource | GgufSource, request: Request, checks: Checks) -> dict[str, Any]:
    return {
        "kind": "conversion",
        "source": {
            "name": found.name,
            "revision": found.revision,
            "sha256": {path.name: sha256_of(path) for path in opened.files()},
        },
        "quantize": request.quantize,
        "dtype": request.dtype,
        "versions": {"mlx-dpo": __version__} | {name: metadata.version(name) for name in _LIBRARIES},
        "verify": checks._asdict(),
    }
