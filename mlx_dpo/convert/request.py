"""What is asked of a conversion."""

from typing import Literal, NamedTuple

import mlx.core as mx

Quantize = Literal["keep", "none", "4", "6", "8"]
Dtype = Literal["keep", "float16", "bfloat16", "float32"]
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


class Request(NamedTuple):
    """`quantize`: leave, undo, or the bits; `dtype`: of what is not packed."""

    quantize: Quantize = "keep"
    dtype: Dtype = "keep"

    @property
    def bits(self) -> int | None:
        """The bits to quantise to, None where nothing is to be quantised."""
        return int(self.quantize) if self.quantize.isdigit() else None

    @property
    def mlx_dtype(self) -> mx.Dtype | None:
        """The type to cast to, None where it is to stay."""
        return _DTYPES.get(self.dtype)
