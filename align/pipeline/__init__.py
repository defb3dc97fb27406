"""Several stages in one file: what each one goes on from, what is finished, and one report for the whole."""
