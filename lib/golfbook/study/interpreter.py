"""The kernel of a notebook that is executed: this very Python, and how its process ended where it did.

A kernel is usually found by its name, and the one named ``python3`` may belong to another environment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from traitlets import Unicode


class Interpreter(AsyncKernelManager):
    """Starts ipykernel in the running Python, whatever kernels are installed under which names."""

    errors = Unicode(config=True, help="File for what the kernel process writes to its standard error.")
    status = Unicode(config=True, help="File for the exit status of a kernel that ended by itself.")
    first_line = Unicode(config=True, help="Python that the kernel executes before all cells.")

    @property
    def kernel_spec(self) -> KernelSpec:
        """Return what jupyter asks an installed kernel for."""
        return KernelSpec(display_name="Python", language="python")

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """Return the command; none of its words is a template."""
        words = [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file, *(extra_arguments or [])]
        return [*words, f"--IPKernelApp.exec_lines={self.first_line}"] if self.first_line else words

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
        """Start the process; raises OSError where the system refuses."""
        with Path(self.errors).open("wb") as stream:
            await super().start_kernel(stderr=stream, **options)

    async def cleanup_resources(self, restart: bool = False) -> None:  # type: ignore[override]
        """Note how the process ended, unless it was this manager that ended it; then clean up."""
        process = getattr(self.provisioner, "process", None)
        if process is not None and process.poll() is not None:
            Path(self.status).write_text(str(process.returncode), encoding="utf-8")
        await super().cleanup_resources(restart=restart)
