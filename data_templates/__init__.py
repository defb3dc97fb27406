"""Prompt templates: text in, labelled segments out.

Layer 0 of the house: the standard library alone. Each module of this folder whose name does not begin with an
underscore is a template; ``data: {template: alpaca}`` means ``data_templates/alpaca.py``.
"""
