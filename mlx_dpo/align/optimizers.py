"""The optimisers of a run, MLX's own, each set up as its field knows it."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optimizers
from mlx.optimizers import Optimizer

from mlx_dpo.align.options import TrainOptions

_WHOLE_MATRICES = ("lora_a", "lora_b")


def _adamw(decay: float) -> Optimizer:
    # PyTorch's AdamW, as TRL has it: MLX leaves the bias correction off unless asked.
    return mlx_optimizers.AdamW(learning_rate=0.0, weight_decay=decay, bias_correction=True)


def _adafactor(decay: float) -> Optimizer:
    # The learning rate is the schedule's, not the optimiser's own.
    return mlx_optimizers.Adafactor(
        learning_rate=0.0, weight_decay=decay, relative_step=False, scale_parameter=False, warmup_init=False
    )


def _lion(decay: float) -> Optimizer:
    return mlx_optimizers.Lion(learning_rate=0.0, weight_decay=decay)


def _muon(decay: float) -> Optimizer:
    # Newton-Schulz wants matrices: DoRA's magnitudes are vectors, and AdamW's.
    return mlx_optimizers.MultiOptimizer(
        [mlx_optimizers.Muon(learning_rate=0.0, weight_decay=decay), _adamw(decay)], [_is_matrix]
    )


_MAKERS: dict[str, Callable[[float], Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
    "lion": _lion,
}


def optimizer(options: TrainOptions, parameters: dict[str, Any]) -> Optimizer:
    """The optimiser that `options` ask for, with a state for `parameters`; with LoRA+ one for B beside the others'."""
    make = _MAKERS[options.optimizer]
    made = make(options.weight_decay)
    if options.lora_plus != 1:
        made = mlx_optimizers.MultiOptimizer([make(options.weight_decay), made], [_is_b])
    made.init(parameters)
    return made


def set_rate(optimizer: Optimizer, rate: float, lora_plus: float) -> None:
    """Set the learning rate of all weights, and `lora_plus` times it for B (LoRA+).

    Hayou et al. 2024 (arXiv:2402.12354).
    """
    optimizer.learning_rate = mx.array(rate)
    if lora_plus != 1 and isinstance(optimizer, mlx_optimizers.MultiOptimizer):
        optimizer.optimizers[0].learning_rate = mx.array(rate * lora_plus)


def compiled(optimizer: Optimizer) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """An update as MLX compiles it, once, as no shape in it changes: (gradients, parameters, state of the optimiser).

    Returns the new parameters and the new state, which has to be given back to the optimiser.
    """

    def updated(gradients: Any, parameters: Any, state: Any) -> tuple[Any, Any]:
        optimizer.state = state
        return optimizer.apply_gradients(gradients, parameters), optimizer.state

    return mx.compile(updated)


def _is_b(name: str, value: mx.array) -> bool:
    return name.rsplit(".", 1)[-1] == "lora_b"


def _is_matrix(name: str, value: mx.array) -> bool:
    return name.rsplit(".", 1)[-1] in _WHOLE_MATRICES
