"""Writes the generated parts of the documentation: ``python -m tools.docs``.

A page holds a generated part between two comments, ``<!-- generated: NAME ARGUMENTS -->`` and
``<!-- end -->``. ``blocks.py`` maps each NAME to the function that writes it from the code.
"""
