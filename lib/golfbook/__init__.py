"""golfbook: a notebook-first workbook for very small language models.

Importing the package does no work; import the module you need, for example ``from golfbook import config``.
"""

__version__ = "0.1.0"
