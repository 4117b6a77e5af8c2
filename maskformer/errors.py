"""The one error a user should ever see."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a config, a data set, an image, a weight file or a command line that cannot mean what the user wants.

    The message is one sentence that names the file, the key, the value and the remedy. The command line prints it as
    ``error: <message>`` and exits with code 2; ``--debug`` shows the traceback as well.
    """
