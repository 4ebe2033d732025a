ARCHITECTURES: str
COMPILER: str
FILL_SIZE: int
MOST_INLINED: int
MOST_SOURCES: int
SLOT_SIZE: int

def run(
    fills: bytes,
    table: int,
    count: int,
    tiles: int,
    sources: bytes,
    progress: int,
    device: int,
    stream: int,
) -> None: ...
def why_no_driver() -> str: ...
