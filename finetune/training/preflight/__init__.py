"""What is proved before step 0 and watched in the first steps; pure functions of rows and models."""
