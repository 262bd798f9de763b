"""golfbook: a notebook-first workbook for very small language models.

Importing the package does no work; import the module you need, for example ``from golfbook.model import gpt``. What a
docstring's "PR 1166 section 4" is about: ``docs/published.md``.
"""

__version__ = "0.1.0"
