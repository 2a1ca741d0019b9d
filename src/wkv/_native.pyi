"""What `native/module.cc` offers. Addresses are integers: `wkv.ops.native` alone calls this."""

from collections.abc import Callable

def engines() -> dict[str, str | None]: ...
def multiply(
    engine: str,
    weights: int,
    format: int,
    inputs: int,
    outputs: int,
    by_input: bool,
    scales: int,
    x: int,
    rows: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def convert(engine: str, source: int, target: int, format: int, n: int, threads: int, /) -> None: ...
def handover(n: int, threads: int, /) -> float: ...
def borrows() -> bool: ...
def read(engine: str, data: int, n: int, threads: int, /) -> float: ...
def normalize(
    engine: str,
    weight: int,
    bias: int,
    format: int,
    eps: float,
    x: int,
    rows: int,
    width: int,
    y: int,
    threads: int,
    /,
) -> None: ...

# engine, sizes (B, T, H, K, V), lengths, inputs, outputs, backward, ..., threads
_Operator = Callable[[str, tuple[int, int, int, int, int], int, list[int], list[int], bool, int], None]

wkv4: _Operator
wkv6: Callable[[str, tuple[int, int, int, int, int], int, list[int], list[int], bool, bool, int], None]
wkv7: _Operator
time_mix7: Callable[[str, tuple[int, int, int, int, int], int, list[int], list[int], bool, float, int], None]
squared_relu: _Operator
token_mix: Callable[[str, tuple[int, int, int, int, int], int, list[int], list[int], bool, bool, int], None]

class Model:
    def __init__(
        self,
        blocks: list[dict[str, tuple[int, int, bool] | int]],
        whole: dict[str, tuple[int, int, bool] | int],
        norm_eps: float,
        head_eps: float,
        engine: str,
        /,
    ) -> None: ...
    def run(
        self,
        tokens: int,
        n: int,
        T: int,
        format: int,
        before: tuple[int, int, int, int],
        after: tuple[int, int, int, int],
        slots_before: int,
        slots_after: int,
        output: int,
        y: int,
        skips: bool,
        rows_at_once: int,
        threads: int,
        /,
    ) -> bool: ...
