"""golfbook: a notebook-first workbook for very small language models.

Importing the package does no work; import the module you need, for example ``from golfbook.model import gpt``.
"""

__version__ = "0.1.0"
