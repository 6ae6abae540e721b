"""python -m nemohybrid_kernels.cpp: builds the optional C++ kernels for this machine and says where they are."""

import sys
import time

from nemohybrid_kernels.cpp.build import BuildError, build, library_file


def main() -> int:
    """0 where the kernels are there afterwards, 1 with the reason where not."""
    known, started = library_file().exists(), time.perf_counter()
    try:
        file = build()
    except BuildError as error:
        print(
            f"The C++ kernels were not built: {error}\nEverything works without them, in plain PyTorch.",
            file=sys.stderr,
        )
        return 1
    print(f"{file}: " + ("already there" if known else f"built in {time.perf_counter() - started:.0f} seconds"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
