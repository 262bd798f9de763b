"""The numerical tests under emulated processors: ``make test-portable``.

    python tests/portable.py [--only NAME ...] [pytest arguments]

The libraries' own switches let one machine compute like others: which vector units torch, oneDNN and MKL use, how MKL
orders its sums, how many threads share them. A tolerance that fits one processor alone fails here. What
this processor has not is not tested, and said so. Ends with status 1 where any test failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
PROCESSORS = {
    "SSE4": ("default", "SSE41", "SSE4_2", "", 1),
    "AVX2": ("avx2", "AVX2", "AVX2", "", 1),
    "AVX2, two threads": ("avx2", "AVX2", "AVX2", "", 2),
    "AVX-512 without bfloat16": ("avx512", "AVX512_CORE", "AVX512", "", 1),
    "AVX-512 with bfloat16, two threads": ("avx512", "AVX512_CORE_BF16", "AVX512", "", 2),
    "MKL's sums in one order": ("", "", "", "COMPATIBLE", 1),
}
NAMES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
NUMERICAL = (
    *("architecture", "artifact", "attention", "averaging", "choices", "golden_scores", "kernels", "losses", "model"),
    *("muon", "plain", "published", "qat", "quantization", "scoring", "steps", "training"),
)
SHOW = "import torch; print(torch.backends.cpu.get_cpu_capability())"
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # as torch calls them


def main(arguments: list[str]) -> int:
    """Run the tests once a processor; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PROCESSORS), choices=list(PROCESSORS), metavar="NAME")
    options, more = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as compiled:
        failed = [name for name in options.only if not passes(name, more, compiled)]
    print(f"FAILED under: {'; '.join(failed)}" if failed else "green under all that this processor can act as")
    return int(bool(failed))


def passes(name: str, more: Sequence[str], compiled: str) -> bool:
    """Run the tests as one processor; ``compiled`` is a folder for the code of torch's compiler."""
    *switches, threads = PROCESSORS[name]
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    environment |= {key: value for key, value in zip(NAMES, switches, strict=True) if value}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # torch's compiler would take up code that it has kept for this processor's vector units
    environment["TORCHINDUCTOR_CACHE_DIR"] = f"{compiled}/{list(PROCESSORS).index(name)}"
    used, own = (
        subprocess.run([sys.executable, "-c", SHOW], env=env, capture_output=True, text=True, check=True).stdout.strip()
        for env in (environment, {key: value for key, value in os.environ.items() if key not in NAMES})
    )
    print(f"== {name}: torch uses {used}", flush=True)
    if own not in CAPABILITIES or CAPABILITIES.index(used) > CAPABILITIES.index(own):
        print(f"NOT TESTED: this processor ({own}) cannot act as that one")
        return True
    files = [str(FOLDER / f"test_{part}.py") for part in NUMERICAL]
    command = [sys.executable, "-m", "pytest", "-n", "2" if threads == 1 else "1", "-m", "not slow", *more, *files]
    return subprocess.run(command, env=environment, cwd=FOLDER.parent).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
