"""The linear modules that adapters go to, chosen by name or by pattern."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import mlx.nn as nn

from mlx_dpo.models.load import blocks
from mlx_dpo.refusal import Refusal

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_TO_BLOCK = re.compile(r"\A(?:.*?\.)?(?:\w*layers|h|blocks)\.\d+\.")  # as mlx-lm's models call their lists of blocks


def adaptable_keys(model: nn.Module) -> list[str]:
    """The linear modules of a block, by their path in it, e.g. `self_attn.q_proj`."""
    names: dict[str, None] = {}
    for block in blocks(model):
        names.update(dict.fromkeys(_linear_paths(block)))
    return list(names)


def chosen_keys(model: nn.Module, targets: Sequence[str], layers: int | None = None) -> tuple[str, ...]:
    """The linear modules that `targets` name, as mlx-lm's keys; all those of a block for none.

    A target is a shell pattern, case-sensitive, of paths in a block or of their last parts, and then holds for the
    adapted blocks: the top `layers`, None for all. One that fits none of these is held against whole paths in the
    model, which are then keys of their own wherever they lie. Raises Refusal for a target that fits nothing.
    """
    known, everywhere = adaptable_keys(model), _linear_paths(model)
    if not targets:
        return tuple(known)
    inside: set[str] = set()
    whole: set[str] = set()
    for target in targets:
        if fits := {key for key in known if _fits_in_block(target, key)}:
            inside |= fits
        elif fits := {path for path in everywhere if fnmatchcase(path, target)}:
            whole |= fits
        else:
            raise Refusal(_nothing_fits(model, target))
    # mlx-lm adapts blocks first and whole paths then, and cannot adapt a layer twice.
    paths = _block_paths(model)
    whole -= {f"{path}.{key}" for path in paths[-(layers or len(paths)) :] for key in inside}
    return tuple(key for key in known if key in inside) + tuple(path for path in everywhere if path in whole)


def are_named(targets: Sequence[str], keys: Sequence[str]) -> bool:
    """Whether each of `targets` names one of `keys` at least, and they name them all together.

    As far as keys alone can tell: what else a pattern would choose in the model is not known here.
    """
    every = all(any(_names(target, key) for target in targets) for key in keys)
    return every and all(any(_names(target, key) for key in keys) for target in targets)


def _names(target: str, key: str) -> bool:
    inside = _TO_BLOCK.sub("", key)
    fits = _fits_in_block(target, inside)
    # What fits in a block is never held against whole paths, so such a target does not mean this one layer.
    return fits if inside == key else not fits and fnmatchcase(key, target)


def _fits_in_block(target: str, key: str) -> bool:
    return fnmatchcase(key, target) or fnmatchcase(key.rsplit(".", 1)[-1], target)


def _linear_paths(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, _LINEAR)]


def _block_paths(model: nn.Module) -> list[str]:
    paths = {id(module): name for name, module in model.named_modules()}
    return [paths[id(block)] for block in blocks(model)]


def _nothing_fits(model: nn.Module, target: str) -> str:
    paths = _block_paths(model)
    elsewhere = [name for name in _linear_paths(model) if not name.startswith(tuple(f"{path}." for path in paths))]
    text = f"--targets {target} names no linear module; this model has {', '.join(adaptable_keys(model))} in its blocks"
    text += f", which are {paths[0]} to {paths[-1]}"
    if elsewhere:
        return f"{text}, and {', '.join(elsewhere)}."
    if fnmatchcase("lm_head", target.rsplit(".", 1)[-1]):
        return f"{text}, but no lm_head: its head is tied to its token embedding, which cannot be a target."
    return f"{text}."
