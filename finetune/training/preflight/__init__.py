"""Pre-flight: checks of rows and model before step 0 and in the first steps; pure functions."""
