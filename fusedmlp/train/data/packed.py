"""How much a packed file of data may unpack to, since a few bytes can stand for all the memory."""

from ..errors import TrainError

_TIMES = 100  # of ordinary data; a file of zeros packs to a thousandth
_ANYWAY = 1 << 26  # bytes that no machine lacks


def most_bytes(packed: int) -> int:
    return max(_ANYWAY, _TIMES * packed)


def check_unpacked(what: str, unpacked: int, packed: int) -> None:
    """raises  TrainError"""
    if unpacked > most_bytes(packed):
        raise TrainError(
            f"{what} must not unpack to more than {_TIMES} times its {packed:,} bytes, got "
            f"{unpacked:,} or more; store it without packing"
        )
