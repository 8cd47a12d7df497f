"""The contestants: pyrovae and its peers, each as its own users would write it."""
