"""Functions that grade completions, one file per kind of answer: recipes name them as file.py:function."""
