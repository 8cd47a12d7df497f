"""ArviZ without its announcement."""

import warnings


def arviz():
    """The package; 0.23 announces its successor when a machine first imports it on a day.

    Such a warning is an error in a test, and a machine that has imported it before shows none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz
