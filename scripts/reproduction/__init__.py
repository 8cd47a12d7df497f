"""The published tables: their rows, how a row is run, and the pages made of the results."""
