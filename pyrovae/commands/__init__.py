"""What each command does: one module for each group, imported once its words are understood."""
