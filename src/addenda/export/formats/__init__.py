"""One file for each export format; its name, with ``-`` for ``_``, is the format's."""
