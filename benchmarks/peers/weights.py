"""One model folder for all: `python -m benchmarks.peers.weights MODEL OUT FORMAT`.

MLX writes the weights unpacked under Hugging Face's names, with the logits of a sentence beside them; with `check` in
the place of FORMAT, PyTorch reads OUT and has to come to the same logits.
"""
# pyright: reportMissingImports=false

import json
import shutil
import sys
from pathlib import Path

_IDS = list(range(1000, 1064))
_LOGITS = "logits.json"
_APART = 1e-3


def main() -> None:
    """Write, or check."""
    model, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind == "check":
        check(out)
    else:
        write(model, out, kind)


def write(model: Path, out: Path, kind: str) -> None:
    """Write the folder; the logits are float32's, whatever the weights are kept in."""
    import mlx_dpo  # noqa: F401  # ahead of MLX

    # isort: split
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    mx.set_default_device(mx.cpu)
    loaded, config = load_model(model)
    loaded.set_dtype(mx.float32)
    loaded = dequantize_model(loaded)
    loaded.set_dtype(getattr(mx, kind))
    loaded.eval()
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {name: value for name, value in tree_flatten(loaded.parameters()) if isinstance(value, mx.array)}
    mx.save_safetensors(str(part / "model.safetensors"), weights, metadata={"format": "pt"})
    plain = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (part / "config.json").write_text(json.dumps(plain | {"dtype": kind}, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, part / name)
    loaded.set_dtype(mx.float32)
    logits = loaded(mx.array([_IDS]))[0, -1]
    (part / _LOGITS).write_text(json.dumps(logits.tolist()))
    part.rename(out)
    print(json.dumps({"written": str(out)}))


def check(out: Path) -> None:
    """Exit with a sentence where PyTorch's logits are further than _APART from MLX's."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([_IDS])).logits[0, -1]
    apart = float((logits - torch.tensor(json.loads((out / _LOGITS).read_text()))).abs().max())
    if not apart <= _APART:
        sys.exit(f"PyTorch and MLX differ by {apart:.3g} in the logits of {out}: the comparison would not be one.")
    print(json.dumps({"apart": apart}))


if __name__ == "__main__":
    main()
