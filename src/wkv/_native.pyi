"""What `native/module.cc` offers. Addresses are integers: `wkv.ops.native` alone calls this."""

def engines() -> list[str]: ...
def multiply(
    engine: str,
    weights: int,
    format: int,
    inputs: int,
    outputs: int,
    by_input: bool | None,
    x: int,
    rows: int,
    y: int,
    threads: int,
    /,
) -> None: ...
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

class Runner:
    def __init__(
        self, parts: dict[str, object], norm_eps: float, head_eps: float, engine: str, /
    ) -> None: ...
    def run(
        self,
        n: int,
        T: int,
        source: int,
        source_format: int,
        x: int,
        v_first: int,
        format: int,
        before: tuple[int, int, int],
        after: tuple[int, int, int],
        slots_in: int,
        slots_out: int,
        skips: bool,
        threads: int,
        /,
    ) -> None: ...
