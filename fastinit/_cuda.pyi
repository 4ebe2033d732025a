ARCHITECTURES: str
COMPILER: str
DTYPES: dict[str, int]
FILL_SIZE: int
LAYOUTS: dict[str, str]
OPS: dict[str, int]
STEPS: dict[str, int]

def run_fill(
    fills: bytes,
    table: int,
    count: int,
    tiles: int,
    sources: bytes,
    progress: int,
    device: int,
    stream: int,
) -> None: ...
def run_keyed(
    fills: bytes, table: int, count: int, tiles: int, device: int, stream: int
) -> None: ...
def run_qr(
    step: int,
    packed: bytes,
    x: int,
    y: int,
    threads: int,
    shared: int,
    device: int,
    stream: int,
) -> None: ...
def most_shared(device: int) -> int: ...
def why_no_driver() -> str: ...
