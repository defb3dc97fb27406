"""Chat and prompt templates: messages in, labeled segments out.

Standard library only. ``data: {template: alpaca}`` means ``data_templates/alpaca.py``.
"""

SHARED = ("markers", "segments")
"""Modules of this folder that are not templates."""
